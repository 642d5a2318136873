"""Log-determinants, and gradients of all that is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...bijection import Bijection
from ...diagnostics.rounding import condition_number
from ...measures import derivatives, jacobian, with_context
from ...state import State, batch_size, flatten, leaves, map_state, sample, unflatten
from ..tolerances import EXACT, GRADIENT, LOG_DET, LOG_DET_CONDITION, SAME_ROUNDINGS
from ..trial import KINDS, Trial
from .base import FLOAT64_EVAL, both_ways, expect, promised, roundings

TWO_SAMPLES = {**FLOAT64_EVAL, "batch": 2}
OFF_KINKS = tuple(kind for kind in KINDS if kind != "zeros")
"""Zeros lie on the kinks of a net without biases: an inverse that finds them up to a rounding has another Jacobian."""


def _is_smooth(bijection: Bijection) -> bool:
    """Where a map rounds, its gradients are straight-through, and not those of central differences."""
    return not bijection.numerics.step


def _expected(trial: Trial) -> Tensor:
    """Log |det dy/dx| of each sample, from the dense Jacobian by autodiff."""
    found = []
    for i in range(batch_size(trial.x)):
        dense = jacobian(with_context(trial.bijection, sample(trial.context, i)), sample(trial.x, i))
        found.append(torch.linalg.slogdet(dense).logabsdet)
    return torch.stack(found)


def _log_det_error(trial: Trial, log_det: Tensor) -> float:
    expected = _expected(trial)
    error = float(((log_det - expected).abs() / expected.abs().clamp(min=1)).max())
    if not error > LOG_DET:
        return error
    condition = condition_number(trial.bijection, trial.x, trial.context)
    return error / max(1.0, condition / LOG_DET_CONDITION)


@promised(LOG_DET, needs=TWO_SAMPLES, dense=True)
def log_det(trial: Trial) -> float:
    """The forward log-determinant is log |det dy/dx|, that of the dense Jacobian by autodiff."""
    _, found = trial.bijection.forward_and_log_det(trial.x, trial.context)
    return _log_det_error(trial, found.detach())


@promised(LOG_DET, needs=TWO_SAMPLES, kinds=OFF_KINKS, dense=True)
def inverse_log_det(trial: Trial) -> float:
    """The inverse log-determinant is log |det dx/dy|: the negative of the forward one at x."""
    y = map_state(torch.Tensor.detach, trial.bijection(trial.x, trial.context))
    _, found = trial.bijection.inverse_and_log_det(y, trial.context)
    return _log_det_error(trial, -found.detach())


@promised(EXACT, needs={})
def log_det_form(trial: Trial) -> float:
    """Log-determinants have the shape (batch,), the dtype and the device of the input, and are finite."""
    like = next(leaves(trial.x))
    for name, call, state in both_ways(trial):
        _, found = call(state, trial.context)
        expect(isinstance(found, Tensor), f"{name} to return a tensor second, got {type(found).__name__}")
        expect(found.shape == like.shape[:1], f"{name}: shape {tuple(like.shape[:1])}, got {tuple(found.shape)}")
        expect(found.dtype == like.dtype, f"{name}: {like.dtype}, got {found.dtype}")
        expect(found.device == like.device, f"{name}: device {like.device}, got {found.device}")
        expect(bool(found.isfinite().all()), f"{name}: finite log-determinants, got {found.tolist()}")
    return 0.0


def _gradient_error(trial: Trial, function: Callable[..., State], start: State) -> float:
    """The smaller error of three neighbouring points: a kink between two evaluations is no wrong gradient."""
    weights = [weight for weight in trial.bijection.parameters() if weight.requires_grad]
    errors = []
    for nearby in (1.0, 0.999, 0.998):
        state = map_state(lambda leaf, factor=nearby: leaf * factor, start)  # type: ignore[misc]
        errors.append(max(derivatives(lambda x: function(x, trial.context), state, weights, trial.generator())))
        if errors[-1] <= GRADIENT:
            break
    return min(errors)


def _results(plain: Callable[..., State], name: str, trial: Trial) -> list[Callable[..., State]]:
    """The state and the log-determinant of a direction, each as a function."""
    if not trial.bijection.surjective:
        return [plain]
    both: Callable[..., tuple[State, Tensor]] = getattr(trial.bijection, f"{name}_and_log_det")
    return [plain, lambda state, context: both(state, context)[1]]


@promised(GRADIENT, needs=TWO_SAMPLES, kinds=("normal",), trials=4, about=_is_smooth)
def gradients(trial: Trial) -> float:
    """Gradients of y and of the log-determinant, by inputs and weights, are those of central differences."""
    bijection = trial.bijection
    return max(_gradient_error(trial, call, trial.x) for call in _results(bijection.forward, "forward", trial))


@promised(GRADIENT, needs=TWO_SAMPLES, kinds=("normal",), trials=4, start="y", about=_is_smooth)
def inverse_gradients(trial: Trial) -> float:
    """The same of the inverse: gradients of x and of its log-determinant are those of central differences."""
    bijection = trial.bijection
    with torch.no_grad():
        y = map_state(torch.clone, trial.image)
    return max(_gradient_error(trial, call, y) for call in _results(bijection.inverse, "inverse", trial))


@promised(roundings(SAME_ROUNDINGS), needs=TWO_SAMPLES, kinds=("normal",), trials=2, dense=True)
def vmap(trial: Trial) -> float:
    """torch.func.vmap over jacrev gives the Jacobian of each sample."""
    bijection = trial.bijection

    def one(flat: Tensor, context: Tensor | None) -> Tensor:
        given = None if context is None else context[None]
        return flatten(bijection(unflatten(flat[None], trial.shape), given))[0]

    in_dims = (0, None if trial.context is None else 0)
    found = torch.func.vmap(torch.func.jacrev(one), in_dims=in_dims)(flatten(trial.x), trial.context).detach()
    worst = 0.0
    for i in range(batch_size(trial.x)):
        expected = jacobian(with_context(bijection, sample(trial.context, i)), sample(trial.x, i))
        worst = max(worst, float((found[i] - expected).abs().max() / expected.abs().max().clamp(min=1)))
    if not worst > roundings(SAME_ROUNDINGS)(trial):
        return worst
    return worst / condition_number(bijection, trial.x, trial.context)
