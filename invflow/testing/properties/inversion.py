"""Round trips, shapes, and the context."""

from __future__ import annotations

import torch

from ...diagnostics.rounding import condition_number, in_double, trace
from ...measures import difference, magnitude
from ...state import State, batch_size, flat_size, shape_of
from ..tolerances import EXACT, JUDGED, ROUND_TRIP_ROUNDINGS
from ..trial import Trial
from .base import expect, promised, roundings


def _round_trip_tolerance(trial: Trial) -> float:
    return EXACT if trial.is_exact else roundings(ROUND_TRIP_ROUNDINGS)(trial)


def _inverse_tolerance(trial: Trial) -> float:
    """As forwards; what snaps to the data's grid computes its image anew, in real numbers."""
    return roundings(ROUND_TRIP_ROUNDINGS)(trial) if trial.snaps else _round_trip_tolerance(trial)


def relative(trial: Trial, error: float, states: list[State], tolerance: float, *, backwards: bool = False) -> float:
    """An error in units of the largest magnitude met and of the condition number.

    The second is worked out only where the first alone does not settle it, so that what comes back is a bound.
    """
    settled = error / magnitude(*states)
    if not settled > tolerance or trial.is_exact:
        return settled
    bijection, x, context = in_double(trial.bijection, states[0], trial.context)
    settled = error / magnitude(*trace(bijection, x, context), *states)
    return settled if settled > JUDGED else settled / condition_number(bijection, x, context, backwards=backwards)


@promised(_round_trip_tolerance, needs={})
def round_trip(trial: Trial) -> float:
    """inverse(forward(x)) is x, in units of the largest magnitude met and of the condition number."""
    with torch.no_grad():
        y = trial.bijection(trial.x, trial.context)
        back = trial.bijection.inverse(y, trial.context)
    expect(shape_of(back) == trial.shape, f"the shape {trial.shape} back, got {shape_of(back)}")
    return relative(trial, difference(trial.x, back), [trial.x, y], _round_trip_tolerance(trial))


@promised(_inverse_tolerance, needs={}, start="y")
def inverse_round_trip(trial: Trial) -> float:
    """forward(inverse(y)) is y, in units of the largest magnitude met and of the condition number."""
    with torch.no_grad():
        y = trial.image
        x = trial.bijection.inverse(y, trial.context)
        again = trial.bijection(x, trial.context)
    expect(shape_of(again) == shape_of(y), f"the shape {shape_of(y)} back, got {shape_of(again)}")
    return relative(trial, difference(y, again), [x, y], _inverse_tolerance(trial), backwards=True)


@promised(_round_trip_tolerance, needs={})
def context(trial: Trial) -> float:
    """Forward and inverse read the context that they are given, whatever the call before was given."""
    bijection, x = trial.bijection, trial.x
    with torch.no_grad():
        first, second = bijection(x, trial.context), bijection(x, trial.other_context)
        backs = [bijection.inverse(first, trial.context), bijection.inverse(second, trial.other_context)]
    error = max(difference(x, back) for back in backs)
    return relative(trial, error, [x, first, second], _round_trip_tolerance(trial))


@promised(EXACT)
def shapes(trial: Trial) -> float:
    """output_shape and input_shape tell the shapes that forward and inverse return."""
    bijection = trial.bijection
    with torch.no_grad():
        y = bijection(trial.x, trial.context)
        x = bijection.inverse(trial.image, trial.context)
    told = bijection.output_shape(trial.shape)
    numbers, made = flat_size(trial.shape), flat_size(shape_of(y))
    expect(made == numbers if bijection.surjective else made >= numbers, f"{numbers} numbers of {numbers}, got {made}")
    expect(told == shape_of(y), f"output_shape({trial.shape}) to be that of forward, {shape_of(y)}, got {told}")
    # A bijection that cannot run without its context need not know: the builder tells it the shape.
    if trial.context is None:
        told = bijection.input_shape(shape_of(y))
        expect(told == shape_of(x), f"input_shape({shape_of(y)}) to be that of inverse, {shape_of(x)}, got {told}")
    expect(batch_size(y) == batch_size(x) == trial.setting.batch, f"a batch of {trial.setting.batch} both ways")
    return 0.0
