"""``invflow freeze``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvflowError
from .options import AsJson, DataName, DataRoot, Device, Plugins, RunPath, named_data
from .output import out, percent, print_caveat, print_json, stdout_for_the_answer

if TYPE_CHECKING:
    from ..numerics import Mode


def freeze(
    run: RunPath,
    mode: Annotated[str, typer.Option(help="exact, grid or snap.")] = "exact",
    frac_bits: Annotated[int | None, typer.Option(help="The grid is the multiples of 2^-FRAC_BITS.")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="The new run folder; default: RUN-MODE.")] = None,
    device: Device = "auto",
    data: DataName = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Make a trained run exact, in a new run folder.

    If the model is invertible, its images are then reconstructed without one wrong bit, which is measured.
    """
    from pydantic import TypeAdapter, ValidationError

    from ..fields import describe
    from ..numerics import Numerics
    from ..training.frozen import freeze_run
    from ..training.run_folder import Run

    options = {"mode": mode} | ({} if frac_bits is None else {"frac_bits": frac_bits})
    try:
        numerics: Mode = TypeAdapter(Numerics).validate_python(options)
    except ValidationError as error:
        raise InvflowError(f"freeze: {describe(error.errors(include_url=False)[0])}") from None
    with stdout_for_the_answer(as_json):
        folder = to or run.with_name(f"{run.resolve().name}-{mode}")
        frozen, found = freeze_run(Run.open(run), folder, numerics, data_root, device, named_data(data))
    if as_json:
        known = {"run": str(frozen.folder), "unfinished": frozen.unfinished}
        print_json({**known, "numerics": numerics.model_dump()}, found)
        return
    print_caveat(found)
    out.print(f"run {frozen.folder}")
    out.print(f"  test accuracy {percent(found.accuracy_after)}, before {percent(found.accuracy_before)}")
    for way, count in found.bit_equal.items():
        out.print(f"  {count:,} of {found.images:,} test images come back bit-equal: {way}")
