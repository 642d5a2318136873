"""``invflow show``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InvflowError
from .options import AsJson, Plugins, SpecPath, load_document
from .output import out, print_json, print_table

if TYPE_CHECKING:
    from ..diagnostics.memory import ActivationMemory


def show(
    spec: SpecPath,
    expanded: Annotated[bool, typer.Option("--expanded", help="Print the spec without repeat and variables.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Print the activation memory of training.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="With --memory: override the batch size.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="With --memory: also measure training steps.")] = False,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Print a spec's layers, its expansion, or its memory."""
    from ..diagnostics.memory import activation_memory
    from ..spec import build, build_model
    from ..spec.text import printable
    from ..spec.training import Training

    document = load_document(spec)
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
