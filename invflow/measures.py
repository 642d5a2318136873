"""Measures of states and of maps: differences, Jacobians, derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .context import Context, spread
from .state import State, batch_size, flatten, leaves, shape_of, unflatten

GRADIENT_STEP = 1e-5
"""The step of central differences in float64: the truncation error, about its square, and the rounding error, eps over
it, are both about 1e-10."""

CLOSE = 1e-7
FINE_STEP = 1e-7
"""The step of central differences that do not agree with autodiff to `CLOSE`: their rounding error is 2e-9, and the
truncation error is small even if the slope has a kink, as that of a soft clip at 0, or bends within a few longer steps,
as that of a norm of numbers that are nearly equal."""

LARGEST_JACOBIAN = 1024
"""The largest size of a sample for which a dense Jacobian is computed, of 8 MB."""

ROWS_AT_ONCE = 256
"""The largest number of rows of a Jacobian that are computed at once: each takes the memory of a sample in training."""

ROWS_OF_A_GRAPH = 16
"""The largest number of gradients of one graph."""


def difference(a: State, b: State) -> float:
    """The largest |a - b| over all tensors of two states; NaN if they hold NaN, or infinities that do not cancel."""
    found = [
        (q.double() - p.double()).abs().max()
        for p, q in zip(leaves(a), leaves(b), strict=True)
        if p.numel() or q.numel()
    ]
    return float(torch.stack(found).max()) if found else 0.0


def magnitude(*states: State) -> float:
    """max(1, the largest magnitude in any of the states); NaN if they hold NaN, which Python's max would lose."""
    found = [float(leaf.abs().max()) for state in states for leaf in leaves(state) if leaf.numel()]
    return float(torch.tensor([1.0, *found], dtype=torch.float64).max())


def same_bits(a: Any, b: Any) -> bool:
    """Whether two states are equal in structure, dtype and every number; NaN equals NaN."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same_bits(p, q) for p, q in zip(a, b, strict=True))
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and bool(((a == b) | (a.isnan() & b.isnan())).all())


def jacobian(function: Callable[[State], State], x: State) -> Tensor:
    """The dense Jacobian of a map of one sample, ``(outputs, inputs)``, by reverse mode."""
    shape, sample = shape_of(x), flatten(x).detach()
    with torch.no_grad():
        outputs = torch.arange(flatten(function(x)).shape[1], device=sample.device)
    found = []
    for rows in torch.split(outputs, ROWS_AT_ONCE):
        # One copy of the sample per row: samples do not mix, so the batch does the work of vmap, for any function.
        with torch.enable_grad():
            copies = sample.expand(len(rows), -1).clone().requires_grad_()
            y = flatten(function(unflatten(copies, shape)))
            found += gradients(y.gather(1, rows[:, None]).sum(), [copies])
    return torch.cat(found)


def gradients(total: Tensor, variables: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of a number with respect to each variable; zero for those that it does not depend on."""
    if not total.requires_grad:
        return [torch.zeros_like(variable) for variable in variables]
    return list(torch.autograd.grad(total, variables, retain_graph=True, allow_unused=True, materialize_grads=True))


def joint_jacobian(function: Callable[[State], State], x: State) -> Tensor:
    """The dense Jacobian of a map of a whole batch, for modes in which samples mix."""
    shape = shape_of(x)
    return slopes_of(lambda flat: flatten(function(unflatten(flat, shape))).flatten(), flatten(x)).flatten(1)


def slopes_of(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The gradient of each of the numbers that a function returns in a vector, one after the other.

    The graph is made anew for every few of them, with the same random numbers: PyTorch's checkpoint keeps in it what it
    computes again.
    """
    draws, found = torch.get_rng_state(), list[Tensor]()
    while True:
        torch.set_rng_state(draws)
        with torch.enable_grad():
            variable = at.detach().clone().requires_grad_()
            numbers = function(variable)
            some = numbers[len(found) : len(found) + ROWS_OF_A_GRAPH].unbind()
        for number in some:
            found += gradients(number, [variable])
        if len(found) == len(numbers):
            return torch.stack(found) if found else at.new_zeros(0, *at.shape)


def with_context(function: Callable[..., Any], context: Context) -> Callable[[State], Any]:
    """A function of the state alone; the context of a single sample is used for every sample of the state."""

    def apply(state: State) -> Any:
        return function(state, spread(context, batch_size(state)))

    return apply


def derivatives(
    function: Callable[[State], State], x: State, weights: Sequence[Tensor], generator: torch.Generator
) -> tuple[float, float]:
    """The difference between autodiff and central differences, for x and for the weights.

    Each is taken along one random direction of the variables and of the result, in units of max(1, the derivative, the
    result).
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

    @torch.no_grad()
    def slope(chosen: list[int], directions: list[Tensor], step: float) -> float:
        ends = []
        for sign in (1, -1):
            for i, direction in zip(chosen, directions, strict=True):
                variables[i].add_(direction, alpha=sign * step)
            ends.append(float((flatten_all(function(unflatten(flat.clone(), shape))) * weighting).sum()))
            for i, direction in zip(chosen, directions, strict=True):
                variables[i].sub_(direction, alpha=sign * step)
        return (ends[0] - ends[1]) / (2 * step)

    def error(chosen: list[int]) -> float:
        directions = [draw(variables[i]) for i in chosen]
        exact = sum(float((slopes[i] * d).sum()) for i, d in zip(chosen, directions, strict=True))
        found = slope(chosen, directions, GRADIENT_STEP)
        if not abs(found - exact) <= CLOSE * max(unit, abs(exact)):
            found = slope(chosen, directions, FINE_STEP)
        return abs(found - exact) / max(unit, abs(exact))

    return error([0]), error(list(range(1, len(variables)))) if weights else 0.0


def flatten_all(state: State) -> Tensor:
    """A state or a log-determinant as rows, one per sample."""
    return flatten(state) if isinstance(state, tuple) or state.dim() > 1 else state[:, None]
