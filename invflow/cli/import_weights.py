"""``invflow import-weights``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CheckpointError
from .options import AsJson, Plugins, load_document
from .output import out, print_json

NetworkPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The spec of the same network: specs/published/...")]
FilePath = Annotated[Path, typer.Argument(metavar="FILE", help="The official checkpoint, a file of tensors.")]


def import_weights(
    spec: NetworkPath,
    file: FilePath,
    to: Annotated[Path | None, typer.Option("--out", help="The new folder; default: the file's name in runs/.")] = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Turn an official checkpoint into one of invflow.

    It takes the files that the authors' codes of i-RevNet, i-ResNet, Residual Flow and Neural Spline Flows write. Only
    tensors are read; a pickled model is refused. Every key of the file is taken, or listed as left out.
    """
    from ..spec.checkpoint import write_checkpoint
    from ..spec.official import import_weights as run_import

    folder = to or Path("runs") / (file.name.partition(".")[0] or "imported")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists already; name another folder with --out")
    found = run_import(load_document(spec), file)
    write_checkpoint(found.document, found.model.state_dict(), folder)
    parameters = sum(weight.numel() for weight in found.model.parameters())
    if as_json:
        numbers = {"tensors": found.tensors, "parameters": parameters}
        lists = {"left_out": found.left_out, "changes": found.changes}
        print_json({"folder": str(folder), "layout": found.layout, **numbers, **lists})
        return
    out.print(f"checkpoint {folder}")
    out.print(f"  {found.tensors:,} tensors of {found.layout}, {parameters:,} parameters")
    for change in found.changes:
        out.print(f"  {change}")
    for reason, count in Counter(found.left_out.values()).items():
        out.print(f"  left out: {count:,} tensors: {reason}")
