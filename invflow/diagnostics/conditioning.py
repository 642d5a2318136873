"""How much a chain stretches: Lipschitz constants of its layers, singular values, and the error that they predict."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..bijection import Bijection
from ..bijections.inverse import directed
from ..measures import jacobian, with_context
from ..nets.spectral import top_singular_pair
from ..sequential import Sequential
from ..state import State, flat_size, flatten, map_state, part_of, sample, shape_of, unflatten
from .check import inputs
from .roundtrip import round_trips

Map: TypeAlias = Callable[[Tensor], Tensor]

DENSE = 256
"""Numbers in a state up to which its Jacobian is made and its singular values are all computed."""

SAMPLES = 4
LARGE_SAMPLES = 1
"""At how many inputs it is measured; at fewer where each singular value takes an iteration."""

RESIDUAL = 1e-5
"""Of the singular equations, relative to the singular value, whose own error is of second order in it."""

SLACK = 1e-3
"""By how much a measured constant may exceed its bound before the bound counts as broken: spectral norms are estimates
that are good to this."""


@dataclass(frozen=True)
class SingularValues:
    """Of the Jacobian of a bijection at one input.

    Attributes:
        largest: how much the map stretches there; from an iteration it may be too small, by its tolerance.
        smallest: 1 over how much the inverse stretches; from an iteration it may be too large.
        all: every one, largest first, where the Jacobian is small enough to be made; else None.
    """

    largest: float
    smallest: float
    all: Tensor | None = None

    @property
    def condition_number(self) -> float:
        """Largest over smallest."""
        return self.largest / self.smallest if self.smallest > 0 else math.inf


@dataclass(frozen=True)
class LayerConditioning:
    """What a layer does to distances, in Euclidean norms.

    Attributes:
        layer: what it is, on one line.
        lipschitz: the largest stretch that was met, at the states that the inputs reach: at most the constant itself.
        lipschitz_bound: what no stretch can exceed, infinite where no bound is known.
        inverse_lipschitz: likewise of the inverse.
        inverse_bound: likewise of the inverse.
    """

    layer: str
    lipschitz: float
    lipschitz_bound: float
    inverse_lipschitz: float
    inverse_bound: float

    @property
    def bounds_hold(self) -> bool:
        """Whether nothing that was measured exceeds its bound."""
        pairs = ((self.lipschitz, self.lipschitz_bound), (self.inverse_lipschitz, self.inverse_bound))
        return all(found <= bound * (1 + SLACK) for found, bound in pairs)


@dataclass(frozen=True)
class Conditioning:
    """The result of `conditioning`.

    Attributes:
        layers: one entry per step of the chain.
        chain: of the whole chain.
        condition_number: of the chain's Jacobian, the largest of all inputs.
        exact: whether all singular values were computed, and not the extreme ones by iteration.
        predicted_error: what one rounding, relative to the state, may grow to until it is back: eps of the dtype times
            the condition number. Those of many layers add up, as a random walk does.
        round_trip_error: the relative error of the round trip in eval mode, by dtype like the prediction.
        ok: whether no measured constant exceeds its bound.
    """

    layers: list[LayerConditioning]
    chain: LayerConditioning
    condition_number: float
    exact: bool
    predicted_error: dict[str, float]
    round_trip_error: dict[str, float]
    ok: bool


def conditioning(chain: Sequential, announce: Callable[[str], None] = lambda line: None) -> Conditioning:
    """Measures a chain and each of its layers, in float64 and eval mode, at inputs like pixels.

    Args:
        chain: one that knows its input shape, as every chain built from a spec does; a copy of it runs.
        announce: told what is being measured.
    """
    x, context = inputs(chain)
    trips = round_trips(chain, x, context)
    measured = {dtype: trip.relative for (dtype, mode), trip in trips.items() if mode == "eval"}
    exact = flat_size(shape_of(x)) <= DENSE
    chosen = range(SAMPLES if exact else LARGE_SAMPLES)
    chain = copy.deepcopy(chain).double().eval()
    samples = [map_state(torch.Tensor.double, sample(x, i)) for i in chosen]
    contexts = [None if context is None else context[i : i + 1].double() for i in chosen]
    with torch.no_grad():
        traces = [chain.trace(state, given) for state, given in zip(samples, contexts, strict=True)]
    layers = []
    steps = chain.steps(shape_of(x))
    for position, step in enumerate(steps):
        announce(f"layer {position} of {len(steps)}")
        layer = directed(step)
        parts = [part_of(trace[position], step.path) for trace in traces]
        found = [singular_values(layer, part, given) for part, given in zip(parts, contexts, strict=True)]
        layers.append(_report(step.title, layer, found))
    announce("the whole chain")
    whole = [singular_values(chain, state, given) for state, given in zip(samples, contexts, strict=True)]
    condition = max(values.condition_number for values in whole)
    report = _report("whole chain", chain, whole)
    return Conditioning(
        layers=layers,
        chain=report,
        condition_number=condition,
        exact=exact,
        predicted_error={dtype: torch.finfo(getattr(torch, dtype)).eps * condition for dtype in measured},
        round_trip_error=measured,
        ok=all(layer.bounds_hold for layer in (*layers, report)),
    )


def singular_values(
    bijection: Bijection, x: State, context: Tensor | None = None, *, dense: int = DENSE
) -> SingularValues:
    """The singular values of a bijection's Jacobian at one input, in the dtype and the mode that it is in.

    The largest of a large Jacobian comes from Lanczos iteration with Jacobian-vector products, as power iteration but
    with a memory; the smallest from the same on the bijection's own inverse, whose Jacobian has 1 over it.

    Args:
        bijection: it stays as it is.
        x: a batch of one sample.
        context: likewise, where there is one.
        dense: up to this number of numbers in the sample, all singular values are computed from the Jacobian itself.

    Examples:
        >>> from invflow.bijections import Affine
        >>> layer = Affine(shape=(2,)).double()
        >>> with torch.no_grad():
        ...     _ = layer.log_scale.copy_(torch.tensor([2.0, 0.5]).log())
        >>> [round(float(value), 6) for value in singular_values(layer, torch.zeros(1, 2).double()).all]
        [2.0, 0.5]
    """
    if flat_size(shape_of(x)) <= dense:
        values = torch.linalg.svdvals(jacobian(with_context(bijection, context), x))
        return SingularValues(float(values[0]), float(values[-1]), values) if len(values) else SingularValues(1.0, 1.0)
    with torch.no_grad():
        y = bijection(x, context)
    largest = _largest_singular_value(bijection, x, context)
    return SingularValues(largest, 1 / _largest_singular_value(bijection.inverse, y, context))


def _largest_singular_value(function: Callable[..., State], x: State, context: Tensor | None) -> float:
    apply, transpose = linearized(lambda state: function(state, context), x)
    start = torch.randn(flat_size(shape_of(x)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm: float = top_singular_pair(apply, transpose, start.to(flatten(x)), RESIDUAL)[2]
    return norm


def linearized(function: Callable[[State], State], x: State) -> tuple[Map, Map]:
    """``v -> J v`` and ``u -> J^T u`` for the Jacobian of a map at one sample, on flat vectors.

    ``J^T u`` is linear in u, and its own transposed derivative is J: so reverse mode alone gives both, also through
    functions that know no forward mode, as implicit ones do.
    """
    shape = shape_of(x)
    with torch.enable_grad():
        flat = flatten(x).detach().clone().requires_grad_()
        y = flatten(function(unflatten(flat, shape)))
        u = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, flat, u, create_graph=True)

    def apply(v: Tensor) -> Tensor:
        (pushed,) = torch.autograd.grad(pulled, u, v.reshape(pulled.shape), retain_graph=True)
        return pushed.flatten()

    def transpose(w: Tensor) -> Tensor:
        (back,) = torch.autograd.grad(y, flat, w.reshape(y.shape), retain_graph=True)
        return back.flatten()

    return apply, transpose


def _report(name: str, bijection: Bijection, found: list[SingularValues]) -> LayerConditioning:
    forward, inverse = bijection.lipschitz_bounds()
    smallest = min(values.smallest for values in found)
    return LayerConditioning(
        layer=name,
        lipschitz=max(values.largest for values in found),
        lipschitz_bound=forward,
        inverse_lipschitz=1 / smallest if smallest > 0 else math.inf,
        inverse_bound=inverse,
    )
