"""Inverses that are fixed points, found without a graph: their gradients, and what is said if they were not found."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from .._torch import reparametrized
from ..context import Context, entries, with_entries
from ..errors import InvflowError
from ..solvers import Method, Solution, accuracy, solve

Step: TypeAlias = Callable[..., Tensor]
SolveLinear: TypeAlias = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
OnFailure: TypeAlias = Literal["warn", "raise"]

GRADIENT_ERROR = 10
"""The relative error of the inverse's gradient, in units of the inverse's own accuracy."""

ROUNDING_RESIDUAL = 32
"""The relative residual that rounding errors may leave, in units of eps. The error is then this over ``1 - L`` with the
contraction L that is met: for L = 0.97, at most 1.3e-4 in float32. In 64 dimensions up to 14 eps remain."""


class NotConverged(RuntimeWarning):
    """The inverse of some samples is less accurate than requested."""


def permitted(dtype: torch.dtype) -> float:
    """The residual at which an inverse counts as converged if no tolerance is given."""
    return ROUNDING_RESIDUAL * torch.finfo(dtype).eps


def complain(what: str, start: Tensor, solution: Solution, on_failure: OnFailure, stacklevel: int) -> None:
    """Warns of the samples that did not converge, or raises an error; not of those that were not finite."""
    finite = start.flatten(1).isfinite().all(1)
    failed = [i for i in solution.convergence.failed if finite[i]]
    if not failed:
        return
    shown = ", ".join(map(str, failed[:10])) + (", ..." if len(failed) > 10 else "")
    message = f"the {what} did not converge for {len(failed)} of {len(start)} samples ({shown}): {solution.convergence}"
    if on_failure == "raise":
        raise InvflowError(message)
    warnings.warn(message, NotConverged, stacklevel=stacklevel + 1)


def solve_transposed(step: Callable[[Tensor], Tensor], start: Tensor, contraction: float, method: Method) -> Solution:
    """The fixed point ``u = w + J^T u`` for a gradient w of the inverse, by a step for the whole batch."""

    def of_rows(u: Tensor, rows: Tensor) -> Tensor:
        return step(torch.zeros_like(start).index_copy(0, rows, u))[rows]

    tolerance = GRADIENT_ERROR * accuracy(start.dtype)
    return solve(
        of_rows, start, contraction=contraction, method=method, tolerance=tolerance, permitted=permitted(start.dtype)
    )


def attached(step: Step, x: Tensor, inputs: tuple[Tensor | None, ...], solve_linear: SolveLinear) -> Tensor:
    """The fixed point ``x = step(x, *inputs)``, differentiable with respect to the inputs, as often as the step is.

    With the Jacobian ``J`` of the step at x, ``dx = (1 - J)^-1 (dstep / dinputs) dinputs``. So for a gradient w of x,
    that of the inputs is what the step passes on of ``u = (1 - J^T)^-1 w``, the fixed point of ``u = w + J^T u``, which
    has gradients for the same reason.

    Args:
        step: a function of x and the inputs, and of nothing else that requires a gradient.
        x: the fixed point.
        inputs: what the step depends on.
        solve_linear: finds the fixed point of ``u -> w + J^T u`` from a start, without a graph.
    """
    if not torch.is_grad_enabled():
        return x
    return cast(Tensor, _Implicit.apply(step, solve_linear, x.detach(), *inputs))


def attached_to_weights(
    module: nn.Module, step: Step, x: Tensor, y: Tensor, context: Context, solve_linear: SolveLinear
) -> Tensor:
    """The fixed point ``x = step(x, y, context)``, differentiable by y, the context and the weights of a module.

    Args:
        module: what the step evaluates.
        step: the step.
        x: the fixed point.
        y: what it depends on.
        context: likewise.
        solve_linear: see `attached`.
    """
    weights = dict(module.named_parameters(remove_duplicate=False))  # each name of one that has several

    def of_values(x: Tensor, y: Tensor, *values: Tensor) -> Tensor:
        pieces = iter(values)
        given = with_entries(context, pieces)
        with reparametrized(module, dict(zip(weights, pieces, strict=True))):
            return step(x, y, given)

    return attached(of_values, x, (y, *entries(context), *weights.values()), solve_linear)


def _transposed(step: Step) -> Step:
    """``w + J^T u`` as a function of u, w, x and the inputs of the step."""

    def pulled(u: Tensor, w: Tensor, x: Tensor, *inputs: Tensor | None) -> Tensor:
        with torch.enable_grad():
            at = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            made = step(at, *inputs)
        return w + _pull(made, at, u)

    return pulled


def _pull(made: Tensor, at: Tensor, u: Tensor) -> Tensor:
    again = torch.is_grad_enabled()
    return torch.autograd.grad(made, at, u, retain_graph=True, create_graph=again, materialize_grads=True)[0]


class _Implicit(torch.autograd.Function):
    """The identity on x, whose backward solves the transposed linear system."""

    @staticmethod
    def forward(ctx: Any, step: Step, solve_linear: SolveLinear, x: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.step, ctx.solve_linear = step, solve_linear
        x = x.clone()
        ctx.save_for_backward(x, *inputs)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *inputs = ctx.saved_tensors
        again = torch.is_grad_enabled()  # this gradient is differentiated again

        def fresh(one: Tensor | None) -> Any:
            # Of a new tensor the derivative is partial: inputs may depend on each other.
            if one is None or (again and one.requires_grad):
                return one if one is None else one.view_as(one)
            return one.detach().requires_grad_(one.requires_grad)

        with torch.enable_grad():
            at, *others = (fresh(one) for one in (x, *inputs))
            made = ctx.step(at, *others)
        wanted = [one for one in others if one is not None and one.requires_grad]
        if not made.requires_grad:  # a constant
            return (None,) * (3 + len(others))
        w = grad.detach()
        u = ctx.solve_linear(lambda u: w + _pull(made, at, u), w)
        if again:
            u = attached(_transposed(ctx.step), u, (grad, x, *inputs), ctx.solve_linear)
        found = iter(torch.autograd.grad(made, wanted, u, create_graph=again, allow_unused=True))
        passed = (next(found) if one is not None and one.requires_grad else None for one in others)
        return None, None, None, *passed
