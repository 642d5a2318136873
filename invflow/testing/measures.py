"""What the properties measure: differences, Jacobians, condition numbers, derivatives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bijection import Bijection
from ..sequential import Sequential
from ..state import State, flat_size, flatten, leaves, map_state, shape_of, unflatten
from .tolerances import GRADIENT_STEP
from .trial import batch_size, sample

LARGEST_JACOBIAN = 1024
"""Numbers in one sample above which no dense Jacobian is made: 8 MB of it."""


def difference(a: State, b: State) -> float:
    """The largest |a - b| over all tensors of two states; NaN where they have NaN or infinities that do not cancel."""
    found = [
        (q.double() - p.double()).abs().max()
        for p, q in zip(leaves(a), leaves(b), strict=True)
        if p.numel() or q.numel()
    ]
    return float(torch.stack(found).max()) if found else 0.0


def magnitude(*states: State) -> float:
    """max(1, the largest magnitude in any of the states)."""
    return max([1.0, *(float(leaf.abs().max()) for state in states for leaf in leaves(state) if leaf.numel())])


def same_bits(a: Any, b: Any) -> bool:
    """Whether two states are equal in structure, dtype and every number; NaN equals NaN."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same_bits(p, q) for p, q in zip(a, b, strict=True))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def jacobian(function: Callable[[State], State], x: State) -> Tensor:
    """The dense Jacobian of a map of one sample, ``(outputs, inputs)``, by reverse mode."""
    # One copy of the sample per output: where samples do not mix, the batch does the work of vmap, for any function.
    shape, size = shape_of(x), flat_size(shape_of(x))
    with torch.enable_grad():
        flat = flatten(x).detach().expand(size, size).clone().requires_grad_()
        y = flatten(function(unflatten(flat, shape)))
        if y.shape[1] != size:
            raise AssertionError(f"no bijection maps {size} numbers to {y.shape[1]}")
        (rows,) = gradients(y.diagonal().sum(), [flat])
    return rows


def gradients(total: Tensor, variables: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of a number with respect to each variable, zero where it does not depend on it."""
    found: Sequence[Tensor | None] = [None] * len(variables)
    if total.requires_grad:
        found = torch.autograd.grad(total, variables, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(one) if slope is None else slope for one, slope in zip(variables, found, strict=True)]


def joint_jacobian(function: Callable[[State], State], x: State) -> Tensor:
    """The dense Jacobian of a map of a whole batch, for modes in which samples mix."""
    shape = shape_of(x)
    with torch.enable_grad():
        flat = flatten(x).detach().clone().requires_grad_()
        y = flatten(function(unflatten(flat, shape))).flatten()
        rows = [gradients(value, [flat])[0].flatten() for value in y]
    return torch.stack(rows)


def condition_number(
    bijection: Bijection, x: State, context: Tensor | None = None, *, backwards: bool = False
) -> float:
    """How much a rounding on the way may grow until it is back at x, the largest over the batch; at least 1.

    The condition number of the Jacobian with a 1 beside it: errors are measured against max(1, magnitude), so 1 is a
    unit of the state, and a plain scaling counts as well. Of a chain, the largest over its beginnings, for a rounding
    arises after each layer; ``backwards`` over its ends, for a round trip that starts from y. Infinite where a Jacobian
    is singular; 1 where it is too large to be made.
    """
    if flat_size(shape_of(x)) > LARGEST_JACOBIAN or not batch_size(x):
        return 1.0
    layers = flat_layers(bijection)
    if bijection.training:
        return _condition(_steps(layers, x, context, joint_jacobian), backwards)
    samples = range(batch_size(x))
    return max(_condition(_steps(layers, sample(x, i), sample(context, i), jacobian), backwards) for i in samples)


def flat_layers(bijection: Bijection) -> list[Bijection]:
    """The layers of a chain, those of the chains inside it among them; anything else is one layer."""
    if type(bijection) is not Sequential:
        return [bijection]
    return [layer for part in bijection for layer in flat_layers(part)]


def trace(bijection: Bijection, x: State, context: Tensor | None = None) -> list[State]:
    """The input and every state that a layer returns."""
    states = [x]
    with torch.no_grad():
        for layer in flat_layers(bijection):
            states.append(layer(states[-1], context))
    return states


def _steps(
    layers: Sequence[Bijection],
    x: State,
    context: Tensor | None,
    derivative: Callable[[Callable[[State], State], State], Tensor],
) -> list[Tensor]:
    """The Jacobian of each layer at the state that reaches it."""
    found = []
    for layer in layers:
        found.append(derivative(with_context(layer, context), x))
        with torch.no_grad():
            x = layer(x, context)
    return found


def with_context(function: Callable[..., Any], context: Tensor | None) -> Callable[[State], Any]:
    """A function of the state alone; where the context is of one sample, every sample of the state sees it."""

    def apply(state: State) -> Any:
        size = batch_size(state)
        return function(state, context if context is None else context.expand(size, *context.shape[1:]))

    return apply


def _condition(steps: list[Tensor], backwards: bool) -> float:
    worst = 1.0
    product: Tensor | None = None
    for step in reversed(steps) if backwards else steps:
        product = step if product is None else product @ step if backwards else step @ product
        if not product.isfinite().all():
            return math.inf
        values = torch.linalg.svdvals(product)
        smallest, largest = float(values.min()), float(values.max())
        worst = max(worst, max(1.0, largest) / min(1.0, smallest) if smallest else math.inf)
    return worst


def derivatives(
    function: Callable[[State], State], x: State, weights: Sequence[Tensor], generator: torch.Generator
) -> tuple[float, float]:
    """How far autodiff is from central differences, for x and for the weights.

    Each along one random direction of the variables and of the result, in units of max(1, the derivative, the result).
    """
    shape = shape_of(x)

    def draw(like: Tensor) -> Tensor:
        made = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return (made / max(1.0, math.sqrt(made.numel()))).to(like)

    with torch.enable_grad():
        flat = flatten(x).detach().clone().requires_grad_()
        y = flatten_all(function(unflatten(flat, shape)))
        weighting = draw(y) * math.sqrt(max(1, y.numel()))
        variables = [flat, *weights]
        slopes = gradients((y * weighting).sum(), variables)
    unit = max(1.0, float(y.detach().abs().max()) if y.numel() else 1.0)

    def error(chosen: list[int]) -> float:
        directions = [draw(variables[i]) for i in chosen]
        exact = sum(float((slopes[i] * d).sum()) for i, d in zip(chosen, directions, strict=True))
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                for i, direction in zip(chosen, directions, strict=True):
                    variables[i].add_(direction, alpha=sign * GRADIENT_STEP)
                ends.append(float((flatten_all(function(unflatten(flat.clone(), shape))) * weighting).sum()))
                for i, direction in zip(chosen, directions, strict=True):
                    variables[i].sub_(direction, alpha=sign * GRADIENT_STEP)
        return abs((ends[0] - ends[1]) / (2 * GRADIENT_STEP) - exact) / max(unit, abs(exact))

    return error([0]), error(list(range(1, len(variables)))) if weights else 0.0


def flatten_all(state: State) -> Tensor:
    """A state or a log-determinant as rows, one per sample."""
    return flatten(state) if isinstance(state, tuple) or state.dim() > 1 else state[:, None]


def in_double(bijection: Bijection, x: State, context: Tensor | None) -> tuple[Bijection, State, Tensor | None]:
    """A copy and its inputs in float64, in which derivatives are worth something."""
    given = None if context is None else context.double()
    return copy.deepcopy(bijection).double(), map_state(torch.Tensor.double, x), given
