"""``invflow show``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvflowError
from .options import AsJson, Plugins, SpecPath, load_document
from .output import out, print_json, print_table

if TYPE_CHECKING:
    from ..diagnostics.memory import ActivationMemory
    from ..spec import Spec

PICTURE = Path("diagram.svg")


def show(
    spec: SpecPath,
    expanded: Annotated[bool, typer.Option("--expanded", help="Print the spec without repeat and variables.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Print the activation memory of training.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="With --memory: override the batch size.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="With --memory: also measure training steps.")] = False,
    diagram: Annotated[bool, typer.Option("--diagram", help="Draw the layers and their shapes as SVG.")] = False,
    to: Annotated[Path | None, typer.Option("--out", help=f"With --diagram: the picture to write [{PICTURE}].")] = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Print a spec's layers, expansion or memory, or draw it."""
    from ..diagnostics.memory import activation_memory
    from ..spec import build, build_model
    from ..spec.text import printable
    from ..spec.training import Training

    document = load_document(spec)
    if to is not None and not diagram:
        raise InvflowError("--out goes with --diagram")
    if diagram:
        if expanded or memory or measure or as_json or batch_size is not None:
            raise InvflowError("--diagram goes with no other option than --out and --plugin")
        _draw(document, document.name or str(spec), to or PICTURE)
        return
    if expanded:
        print_json(document.expanded)
        return
    if memory:
        size, density = batch_size or (document.training or Training()).batch_size, document.prior is not None
        found = activation_memory(build(document), size, log_det=density, measure=measure)
        if as_json:
            print_json({"spec": str(spec)}, found)
        else:
            _print_memory(found)
        return
    if batch_size is not None or measure or as_json:
        raise InvflowError("--batch-size, --measure and --json go with --memory")
    model = build_model(document) if document.head or document.prior else build(document)
    count = sum(weight.numel() for weight in model.parameters())
    out.print(f"{printable(document.name or str(spec))}: {count:,} parameters, hash {document.hash[:16]}")
    out.print(repr(model))


def _draw(document: Spec, name: str, to: Path) -> None:
    """Write the diagram of a spec, which takes no weights."""
    import torch

    from ..files import write_atomically
    from ..report.canvas import MARK
    from ..report.diagram import diagram
    from ..spec import build, build_model

    if to.exists() and not (to.is_file() and to.read_bytes()[:200].startswith(MARK.encode())):
        raise InvflowError(f"{to}: exists already and is no diagram; name another file with --out")
    with torch.device("meta"):
        model = build_model(document) if document.head or document.prior else build(document)
    to.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(to, diagram(model, name=name).encode())
    out.print(f"wrote {to}")


def _print_memory(found: ActivationMemory) -> None:
    totals = {
        "whole chain": found.kept,
        "and recomputed, at most": found.peak,
        "kept, measured": found.measured,
        "peak of a step, measured": found.measured_peak,
    }
    print_table(
        ("", f"kept for backward, batch {found.batch}", *found.kept),
        [(str(i), layer.layer, *map(_bytes, layer.kept.values())) for i, layer in enumerate(found.layers)],
        [("", name, *map(_bytes, sizes.values())) for name, sizes in totals.items() if sizes is not None],
    )
    out.print("in addition: weights, gradients, the optimiser's state and the head")


def _bytes(count: int) -> str:
    """A number of bytes in KiB or MiB."""
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"
