"""``invflow check``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from .options import AsJson, Plugins, SpecPath, load_document
from .output import err, out, print_caveat, print_json, print_table

if TYPE_CHECKING:
    from ..diagnostics.check import CheckResult
    from ..diagnostics.conditioning import Conditioning, LayerConditioning
    from ..sequential import Sequential
    from ..testing.thorough import Proof, Thorough

T = TypeVar("T")


def check(
    spec: SpecPath,
    thorough: Annotated[bool, typer.Option("--thorough", help="Also check every property of every layer.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Measure how well backward reconstructs inputs.")] = False,
    conditioning: Annotated[bool, typer.Option("--conditioning", help="Measure Lipschitz constants.")] = False,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Check that a spec's chain is invertible, layer by layer.

    Print the shapes, the parameters and the round-trip error of every layer; exit status 1 if the chain fails.
    """
    from ..diagnostics.check import chain_of, untrained
    from ..diagnostics.check import check as run_check
    from ..diagnostics.conditioning import conditioning as measure
    from ..diagnostics.memory import reconstructions

    chain, head, proofs = chain_of(spec), load_document(spec).head, None
    report = run_check(chain, None if head is None else head.cls)
    if thorough:
        from ..testing.thorough import check_thoroughly  # imports Hypothesis

        proofs = _watched("checking", check_thoroughly, chain)
    rebuilt = reconstructions(chain) if memory else None
    stretches = _watched("measuring", measure, chain) if conditioning else None
    if as_json:
        found = {"thorough": proofs, "reconstruction_error": rebuilt, "conditioning": stretches}
        print_json({"spec": str(spec)}, report, {name: one for name, one in found.items() if one is not None})
    else:
        if untrained(spec):
            out.print(untrained(spec))
        print_caveat(report)
        _print_result(report)
        if proofs is not None:
            _print_proofs(proofs)
        if rebuilt is not None:
            _print_reconstructions(rebuilt)
        if stretches is not None:
            _print_conditioning(stretches)
        out.print(_verdict(report, proofs, stretches))
    raise typer.Exit(0 if all(one.ok for one in (report, proofs, stretches) if one is not None) else 1)


def _watched(verb: str, measure: Callable[[Sequential, Callable[[str], None]], T], chain: Sequential) -> T:
    """The result of a measurement that takes long, with its progress on stderr."""
    with err.status(verb) as status:
        return measure(chain, lambda line: status.update(f"{verb} {line}"))


def _verdict(report: CheckResult, proofs: Thorough | None, stretches: Conditioning | None) -> str:
    if proofs is not None and not proofs.ok:
        return "failed: a property does not hold"
    if stretches is not None and not stretches.ok:
        return "failed: a Lipschitz constant exceeds its bound"
    how = "up to rounding" if report.exactness == "float" else "without one wrong bit"
    how += "" if report.surjective or not report.invertible else ", on its image only"
    what = "the chain alone is " if report.caveat else ""
    what = what if report.invertible else "between its joints the chain is "
    verdict = f"{'ok: ' if report.ok else 'failed: '}{what}{'' if report.ok else 'not '}invertible {how}"
    grown = (f"in {mode} mode roundings grow {times:.0e} times" for mode, times in report.growth.items())
    return "; ".join([verdict, *grown]) if report.ok else verdict


def _print_result(report: CheckResult) -> None:
    def cells(parameters: int, exactness: str, errors: Mapping[str, float | None]) -> list[str]:
        shown = ("no inverse" if error is None else f"{error:.1e}" for error in errors.values())
        return [f"{parameters:,}", exactness, *shown]

    rows = []
    for layer in report.layers:
        names = [layer.name.removeprefix("layers."), layer.layer, str(layer.input_shape), str(layer.output_shape)]
        rows.append([*names, *cells(layer.parameters, layer.exactness, layer.round_trip_error)])
    whole = ["", "whole chain", "", "", *cells(report.parameters, report.exactness, report.round_trip_error)]
    print_table(("", "layer", "in", "out", "parameters", "exactness", *report.round_trip_error), rows, [whole])
    out.print(f"errors of {report.samples} samples")


def _print_conditioning(found: Conditioning) -> None:
    def cells(layer: LayerConditioning) -> list[str]:
        pairs = ((layer.lipschitz, layer.lipschitz_bound), (layer.inverse_lipschitz, layer.inverse_bound))
        return [text for value, bound in pairs for text in (f"{value:.4g}", f"{bound:.4g}" * math.isfinite(bound))]

    rows = [(str(position), layer.layer, *cells(layer)) for position, layer in enumerate(found.layers)]
    heads = ("", "layer", "Lipschitz constant", "bound", "of the inverse", "bound")
    print_table(heads, rows, [("", found.chain.layer, *cells(found.chain))])
    how = "" if found.exact else ", from extreme singular values found by iteration"
    out.print(f"condition number {found.condition_number:.4g}{how}")
    for dtype, predicted in found.predicted_error.items():
        measured = found.round_trip_error[dtype]
        out.print(f"{dtype}: relative round-trip error: predicted {predicted:.1e}, measured {measured:.1e}")


def _print_proofs(found: Thorough) -> None:
    def cells(proof: Proof) -> tuple[str, ...]:
        held = f"{proof.checked - len(proof.failures)} of {proof.checked}"
        worst = proof.worst.get("round trip")
        return proof.layer, held, "no inverse" if worst is None else f"{worst:.1e}"

    rows = [(str(i), *cells(layer), f"{found.error_by_depth[i]:.1e}") for i, layer in enumerate(found.layers)]
    heads = ("", "layer", "properties", "worst round trip", "error by depth")
    print_table(heads, rows, [("", *cells(found.chain), "")])
    named = [*((str(position), layer) for position, layer in enumerate(found.layers)), ("chain", found.chain)]
    for name, proof in named:
        for failure in proof.failures:
            out.print(f"{name}: {proof.layer}: {failure}")
    unmeasured = sorted({name for _, proof in named for name in proof.unmeasured})
    if unmeasured:
        out.print(f"not measured, because the state is too large for its Jacobian: {', '.join(unmeasured)}")
    if found.lost_at is None:
        out.print("the inverse loses no precision")
    else:
        out.print(f"most precision is lost at layer {found.lost_at}, {found.layers[found.lost_at].layer}")


def _print_reconstructions(found: dict[str, dict[str, float]]) -> None:
    """Print the errors, and which of them the monitor would reject."""
    import torch

    from ..reversible import tolerance

    allowed = {key: tolerance(getattr(torch, key.split()[0])) for key in found}

    def cell(key: str, error: float) -> str:
        return f"{error:.1e}" + ("" if error <= allowed[key] else " lost")

    rows = [(name, *(cell(key, found[key][name]) for key in found)) for name in next(iter(found.values()))]
    print_table(("error of the input, reconstructed in backward", *found), rows, names=1)
    if any(text.endswith("lost") for row in rows for text in row[1:]):
        out.print('monitor "repair" repairs each lost input once and keeps it from then on, as "anchor" does')
    else:
        out.print('backprop "reversible" reconstructs every input')
