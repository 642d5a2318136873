"""``invflow check``."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated

import typer

from .options import AsJson, Plugins, SpecPath
from .output import err, out, print_json, print_table

if TYPE_CHECKING:
    from ..diagnostics.check import CheckResult
    from ..diagnostics.conditioning import Conditioning, LayerConditioning
    from ..sequential import Sequential
    from ..testing.thorough import Proof, Thorough


def check(
    spec: SpecPath,
    thorough: Annotated[bool, typer.Option("--thorough", help="Check every property of every layer, too.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Measure how well backward reconstructs inputs.")] = False,
    conditioning: Annotated[bool, typer.Option("--conditioning", help="Measure Lipschitz constants.")] = False,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Check that a spec's chain runs backwards, layer by layer.

    Print the shapes, the parameters and the round-trip error of every layer; exit status 1 if the chain fails.
    """
    from ..diagnostics.check import chain_of
    from ..diagnostics.check import check as run_check
    from ..diagnostics.memory import reconstructions

    chain = chain_of(spec)
    report = run_check(chain)
    proofs = _check_thoroughly(chain) if thorough else None
    rebuilt = reconstructions(chain) if memory else None
    stretches = _measure_conditioning(chain) if conditioning else None
    sound = report.ok and (proofs is None or proofs.ok) and (stretches is None or stretches.ok)
    if as_json:
        more = {} if proofs is None else {"thorough": dataclasses.asdict(proofs)}
        more |= {} if rebuilt is None else {"reconstruction_error": rebuilt}
        more |= {} if stretches is None else {"conditioning": dataclasses.asdict(stretches)}
        print_json({"spec": str(spec), **dataclasses.asdict(report), **more})
        raise typer.Exit(0 if sound else 1)
    _print_result(report)
    if proofs is not None:
        _print_proofs(proofs)
    if rebuilt is not None:
        _print_reconstructions(rebuilt)
    if stretches is not None:
        _print_conditioning(stretches)
    if proofs is not None and not proofs.ok:
        out.print("failed: a property does not hold")
    elif stretches is not None and not stretches.ok:
        out.print("failed: a Lipschitz constant exceeds its bound")
    else:
        how = "to rounding" if report.exactness == "float" else "without one wrong bit"
        how += "" if report.surjective else ", on its image only: it adds dimensions"
        out.print(f"ok: it runs backwards {how}" if report.ok else f"failed: it does not run backwards {how}")
    raise typer.Exit(0 if sound else 1)


def _check_thoroughly(chain: Sequential) -> Thorough:
    from ..testing.thorough import check_thoroughly

    with err.status("checking") as status:
        return check_thoroughly(chain, lambda line: status.update(f"checking {line}"))


def _measure_conditioning(chain: Sequential) -> Conditioning:
    from ..diagnostics.conditioning import conditioning

    with err.status("measuring") as status:
        return conditioning(chain, lambda line: status.update(f"measuring {line}"))


def _print_result(report: CheckResult) -> None:
    def errors(found: dict[str, float]) -> list[str]:
        return [f"{error:.1e}" for error in found.values()]

    rows = [
        (
            *(layer.name.removeprefix("layers."), layer.layer, str(layer.input_shape), str(layer.output_shape)),
            *(f"{layer.parameters:,}", layer.exactness, *errors(layer.round_trip_error)),
        )
        for layer in report.layers
    ]
    whole = ("", "whole chain", "", "", f"{report.parameters:,}", report.exactness, *errors(report.round_trip_error))
    print_table(("", "layer", "in", "out", "parameters", "exactness", *report.round_trip_error), rows, [whole])


def _print_conditioning(found: Conditioning) -> None:
    def cells(layer: LayerConditioning) -> list[str]:
        pairs = ((layer.lipschitz, layer.lipschitz_bound), (layer.inverse_lipschitz, layer.inverse_bound))
        return [text for value, bound in pairs for text in (f"{value:.4g}", f"{bound:.4g}" * math.isfinite(bound))]

    rows = [(str(position), layer.layer, *cells(layer)) for position, layer in enumerate(found.layers)]
    heads = ("", "layer", "Lipschitz constant", "bound", "of the inverse", "bound")
    print_table(heads, rows, [("", found.chain.layer, *cells(found.chain))])
    how = "" if found.exact else ", its extreme singular values found by iteration"
    out.print(f"condition number {found.condition_number:.4g}{how}")
    for dtype, predicted in found.predicted_error.items():
        measured = found.round_trip_error[dtype]
        out.print(f"{dtype}: it predicts a round-trip error near {predicted:.1e}, relative; measured: {measured:.1e}")


def _print_proofs(found: Thorough) -> None:
    def cells(proof: Proof) -> tuple[str, ...]:
        held = f"{proof.checked - len(proof.failures)} of {proof.checked}"
        return proof.layer, held, f"{proof.worst['round trip']:.1e}"

    rows = [(str(i), *cells(layer), f"{found.error_by_depth[i]:.1e}") for i, layer in enumerate(found.layers)]
    heads = ("", "layer", "properties", "worst round trip", "error by depth")
    print_table(heads, rows, [("", *cells(found.chain), "")])
    named = {str(position): layer for position, layer in enumerate(found.layers)} | {"chain": found.chain}
    for name, proof in named.items():
        for failure in proof.failures:
            out.print(f"{name}: {proof.layer}: {failure}")
    unmeasured = sorted({name for proof in named.values() for name in proof.unmeasured})
    if unmeasured:
        out.print(f"not measured, the state is too large for its Jacobian: {', '.join(unmeasured)}")
    if found.lost_at is None:
        out.print("no precision is lost on the way back")
    else:
        out.print(f"most precision is lost at layer {found.lost_at}, {found.layers[found.lost_at].layer}")


def _print_reconstructions(found: dict[str, dict[str, float]]) -> None:
    """Prints the errors, and what the monitor would say."""
    import torch

    from ..reversible import tolerance

    allowed = {key: tolerance(getattr(torch, key.split()[0])) for key in found}
    lost = {(name, key) for key in found for name, error in found[key].items() if not error <= allowed[key]}
    rows = [
        (name, *(f"{found[key][name]:.1e}{' lost' * ((name, key) in lost)}" for key in found))
        for name in next(iter(found.values()))
    ]
    print_table(("error of the input, reconstructed in backward", *found), rows, names=1)
    if lost:
        out.print('if an input is lost, backprop "reversible" gives wrong gradients: monitor "anchor" keeps it')
    else:
        out.print('backprop "reversible" reconstructs every input')
