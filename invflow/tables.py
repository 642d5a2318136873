"""The tables of the command line: what checks and measurements found, for people to read."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

out = Console(highlight=False)


def print_conditioning(found: Any) -> None:
    """A Conditioning as a table, and what its condition number says of the round trip."""
    table = Table("", "layer", "Lipschitz constant", "bound", "of the inverse", "bound")
    for position, layer in enumerate([*found.layers, found.chain]):
        if layer is found.chain:
            table.add_section()
        pairs = ((layer.lipschitz, layer.lipschitz_bound), (layer.inverse_lipschitz, layer.inverse_bound))
        cells = [
            text for value, bound in pairs for text in (f"{value:.4g}", f"{bound:.4g}" if math.isfinite(bound) else "")
        ]
        table.add_row("" if layer is found.chain else str(position), layer.layer, *cells)
    wide(out).print(table)
    how = "" if found.exact else ", its extreme singular values found by iteration"
    out.print(f"condition number {found.condition_number:.4g}{how}")
    for dtype, predicted in found.predicted_error.items():
        measured = found.round_trip_error[dtype]
        line = f"{dtype}: it predicts a round-trip error near {predicted:.1e}, relative; measured: {measured:.1e}"
        out.print(line, soft_wrap=True)


def print_thorough(found: Any) -> None:
    """A Thorough as a table, its failures, and where precision is lost."""
    table = Table("", "layer", "properties", "worst round trip", "error by depth")
    for position, layer in enumerate(found.layers):
        table.add_row(str(position), *_proof_cells(layer), f"{found.error_by_depth[position]:.1e}")
    table.add_section()
    table.add_row("", *_proof_cells(found.chain), "")
    wide(out).print(table)
    named = {str(position): layer for position, layer in enumerate(found.layers)} | {"chain": found.chain}
    for name, proof in named.items():
        for failure in proof.failures:
            out.print(f"{name}: {proof.layer}: {failure}", markup=False, soft_wrap=True)
    unmeasured = sorted({name for proof in named.values() for name in proof.unmeasured})
    if unmeasured:
        out.print(f"not measured, the state is too large for its Jacobian: {', '.join(unmeasured)}")
    if found.lost_at is None:
        out.print("no precision is lost on the way back")
    else:
        where = f"layer {found.lost_at}, {found.layers[found.lost_at].layer}"
        out.print(f"most precision is lost at {where}", markup=False, soft_wrap=True)


def print_reconstructions(found: dict[str, dict[str, float]]) -> None:
    """The errors of `reconstructions` as a table, and what the monitor would say."""
    import torch

    from .reversible import tolerance

    allowed = {key: tolerance(getattr(torch, key.split()[0])) for key in found}
    table = Table("error of the input, reconstructed in backward", *found)
    for name in next(iter(found.values())):
        errors = ((key, found[key][name]) for key in found)
        table.add_row(name, *(f"{error:.1e}" + ("" if error <= allowed[key] else " lost") for key, error in errors))
    wide(out).print(table)
    if all(error <= allowed[key] for key, errors in found.items() for error in errors.values()):
        out.print('backprop "reversible" reconstructs every input', soft_wrap=True)
    else:
        out.print(
            'where an input is lost, backprop "reversible" gives wrong gradients: monitor "anchor" keeps it',
            soft_wrap=True,
        )


def print_memory(found: Any, batch: int) -> None:
    """A Memory as a table: what each layer keeps for backward under each policy."""
    policies = list(found.kept)
    table = Table("", f"kept for backward, batch {batch}", *policies)
    for position, layer in enumerate(found.layers):
        table.add_row(str(position), layer.layer, *(_bytes(layer.kept[policy]) for policy in policies))
    table.add_section()
    rows = {
        "whole chain": found.kept,
        "and computed again, at most": found.peak,
        "kept, measured": found.measured,
        "peak of a step, measured": found.measured_peak,
    }
    for name, row in rows.items():
        if row is not None:
            table.add_row("", name, *(_bytes(row[policy]) for policy in policies))
    wide(out).print(table)
    out.print("weights, their gradients, the optimiser's state and the head come on top", markup=False)


def _proof_cells(proof: Any) -> tuple[str, str, str]:
    failed = len(proof.failures)
    return proof.layer, f"{proof.checked - failed} of {proof.checked}", f"{proof.worst['round trip']:.1e}"


def _bytes(count: int) -> str:
    """In KiB or MiB."""
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def wide(console: Console) -> Console:
    """A console that folds no table when it prints into a pipe."""
    return console if console.is_terminal else Console(width=200, highlight=False)
