"""How much a chain stretches: Lipschitz constants of its layers, singular values, and the predicted error."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bijection import Bijection
from ..bijections.inverse import directed, given_to
from ..context import Context
from ..errors import InvflowError
from ..measures import jacobian, with_context
from ..nets.spectral import Map, top_singular_pair
from ..sequential import Sequential
from ..state import State, flat_size, flatten, part_of, sample, shape_of, unflatten
from .check import inputs
from .rounding import in_double
from .roundtrip import round_trips

DENSE = 256
"""The largest state, in numbers, for which the Jacobian is made and all its singular values are computed."""

SAMPLES = 4
LARGE_SAMPLES = 1
"""The number of inputs at which a chain is measured; fewer if each singular value takes an iteration."""

RESIDUAL = 1e-5
"""The residual of the singular equations at which an iteration stops, relative to the singular value; the error of the
singular value is of second order in it."""

SLACK = 1e-3
"""How far a measured constant may exceed its bound, relative to it: spectral norms are estimated with this accuracy."""


@dataclass(frozen=True)
class SingularValues:
    """The singular values of the Jacobian of a bijection at one input.

    Attributes:
        largest: how much the map stretches there; the result of an iteration may be too small, by its tolerance.
        smallest: 1 over how much the inverse stretches; the result of an iteration may be too large.
        all: all of them, largest first, if the Jacobian is small enough to be made; else None.
    """

    largest: float
    smallest: float
    all: Tensor | None = None

    @property
    def condition_number(self) -> float:
        """The largest over the smallest."""
        return self.largest / self.smallest if self.smallest > 0 else math.inf


@dataclass(frozen=True)
class LayerConditioning:
    """What a layer does to distances, in Euclidean norms.

    Attributes:
        layer: a description of the layer, on one line.
        lipschitz: the largest stretch measured, at the states that the inputs reach: a lower bound of the constant.
        lipschitz_bound: an upper bound of the constant, infinite if none is known.
        inverse_lipschitz: the largest stretch of the inverse.
        inverse_bound: an upper bound for the inverse.
    """

    layer: str
    lipschitz: float
    lipschitz_bound: float
    inverse_lipschitz: float
    inverse_bound: float

    @property
    def bounds_hold(self) -> bool:
        """Whether no measured constant exceeds its bound."""
        pairs = ((self.lipschitz, self.lipschitz_bound), (self.inverse_lipschitz, self.inverse_bound))
        return all(found <= bound * (1 + SLACK) for found, bound in pairs)


@dataclass(frozen=True)
class Conditioning:
    """The result of `conditioning`.

    Attributes:
        layers: one entry per step of the chain.
        chain: the entry of the whole chain.
        condition_number: the condition number of the chain's Jacobian, the largest over the inputs.
        exact: whether all singular values were computed; if not, only the extreme ones, by iteration.
        predicted_error: the error of the round trip due to one rounding, at most, relative to the state and by dtype:
            eps times the condition number. The roundings of many layers add up like a random walk.
        round_trip_error: the measured relative error of the round trip in eval mode, by dtype.
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
    """Measures a chain and each of its layers, in float64 and eval mode, at inputs that resemble pixels.

    Args:
        chain: must know its input shape, as every chain built from a spec does; a copy of it runs.
        announce: called with a description of each part before it is measured.

    Raises:
        InvflowError: the chain has a joint, and so no inverse.

    Examples:
        >>> import invflow
        >>> chain = invflow.build({"input": {"shape": [2]}, "layers": [{"type": "scale", "exponent": 3}]})
        >>> found = conditioning(chain)
        >>> found.layers[0].lipschitz_bound, found.layers[0].inverse_bound
        (8.0, 0.125)
    """
    if not chain.invertible:
        raise InvflowError("conditioning expects a chain that has an inverse, got one with a joint")
    x, context = inputs(chain)
    trips = round_trips(chain, x, context)
    measured = {dtype: trip.relative for (dtype, mode), trip in trips.items() if mode == "eval"}
    exact = flat_size(shape_of(x)) <= DENSE
    chain, x, context = in_double(chain, x, context)
    samples = [(sample(x, i), sample(context, i)) for i in range(SAMPLES if exact else LARGE_SAMPLES)]
    with torch.no_grad():
        traces = [(chain.eval().trace(state, given), given) for state, given in samples]
    layers = []
    steps = chain.steps(shape_of(x))
    for position, step in enumerate(steps):
        announce(f"layer {position} of {len(steps)}")
        parts = [(part_of(states[position], step.path), given_to(step, given)) for states, given in traces]
        layers.append(_measure(step.title, directed(step), parts)[0])
    announce("the whole chain")
    whole, condition = _measure("whole chain", chain, samples)
    predicted = {dtype: torch.finfo(getattr(torch, dtype)).eps * condition for dtype in measured}
    ok = all(layer.bounds_hold for layer in (*layers, whole))
    return Conditioning(layers, whole, condition, exact, predicted, measured, ok)


def singular_values(bijection: Bijection, x: State, context: Context = None, *, dense: int = DENSE) -> SingularValues:
    """The singular values of a bijection's Jacobian at one input, in its current dtype and mode.

    The largest singular value of a large Jacobian is found by Lanczos iteration with Jacobian-vector products (power
    iteration with a memory); the smallest by the same iteration on the bijection's inverse, of whose Jacobian the
    largest is 1 over it. Of an injection, whose left inverse does not tell it, by iteration on ``L^2 - J^T J``.

    Args:
        bijection: is not modified.
        x: a batch of one sample.
        context: likewise, if there is one.
        dense: the largest sample, in numbers, for which all singular values are computed from the Jacobian itself.

    Examples:
        >>> from invflow.bijections import Affine
        >>> layer = Affine(shape=(2,)).double()
        >>> with torch.no_grad():
        ...     _ = layer.log_scale.copy_(torch.tensor([2.0, 0.5]).log())
        >>> [round(float(value), 6) for value in singular_values(layer, torch.zeros(1, 2).double()).all]
        [2.0, 0.5]

    Raises:
        InvflowError: the Jacobian is too large for `dense`, and the bijection is, or holds, a joint without an inverse.
    """
    if flat_size(shape_of(x)) <= dense:
        values = torch.linalg.svdvals(jacobian(with_context(bijection, context), x))
        return SingularValues(float(values[0]), float(values[-1]), values) if len(values) else SingularValues(1.0, 1.0)
    if not bijection.invertible:
        raise InvflowError(f"{bijection.tag} has no inverse, which the smallest singular value is found by")
    with torch.no_grad():
        y = bijection(x, context)
    largest = _largest_singular_value(bijection, x, context)
    if not bijection.surjective:
        return SingularValues(largest, _smallest_of_injection(bijection, x, context, largest))
    return SingularValues(largest, 1 / _largest_singular_value(bijection.inverse, y, context))


def _largest_singular_value(function: Callable[..., State], x: State, context: Context) -> float:
    apply, transpose = linearized(lambda state: function(state, context), x)
    start = torch.randn(flat_size(shape_of(x)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return top_singular_pair(apply, transpose, start.to(flatten(x)), RESIDUAL)[2]


def _smallest_of_injection(function: Callable[..., State], x: State, context: Context, largest: float) -> float:
    """The smallest singular value of J, of which a left inverse tells a bound only: by the norm of ``L^2 - J^T J``."""
    apply, transpose = linearized(lambda state: function(state, context), x)
    start = torch.randn(flat_size(shape_of(x)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def rest(v: Tensor) -> Tensor:
        return largest**2 * v - transpose(apply(v))

    return math.sqrt(max(0.0, largest**2 - top_singular_pair(rest, rest, start.to(flatten(x)), RESIDUAL)[2]))


def linearized(function: Callable[[State], State], x: State) -> tuple[Map, Map]:
    """``v -> J v`` and ``u -> J^T u`` for the Jacobian of a map at one sample, on flat vectors.

    ``J^T u`` is linear in u, and its transposed derivative is J: so reverse mode alone gives both, also through
    functions without forward-mode derivatives, such as implicit ones.
    """
    shape = shape_of(x)
    with torch.enable_grad():
        flat = flatten(x).detach().clone().requires_grad_()
        y = flatten(function(unflatten(flat, shape)))
        u = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, flat, u, create_graph=True)
    return functools.partial(_pull_back, pulled, u), functools.partial(_pull_back, y, flat)


def _pull_back(y: Tensor, x: Tensor, v: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, v.reshape(y.shape), retain_graph=True)[0].flatten()


def _measure(
    name: str, bijection: Bijection, samples: Sequence[tuple[State, Context]]
) -> tuple[LayerConditioning, float]:
    """The report on a bijection at some inputs with their contexts, and its largest condition number."""
    found = [singular_values(bijection, x, context, dense=DENSE) for x, context in samples]
    forward, inverse = bijection.lipschitz_bounds()
    largest, smallest = max(values.largest for values in found), min(values.smallest for values in found)
    report = LayerConditioning(name, largest, forward, 1 / smallest if smallest > 0 else math.inf, inverse)
    return report, max(values.condition_number for values in found)
