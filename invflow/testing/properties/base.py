"""What a property is: a promise, a number that measures how far it is broken, and a tolerance."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from ...bijection import Bijection
from ...diagnostics.rounding import condition_number, in_double, trace
from ...measures import LARGEST_JACOBIAN, difference, magnitude
from ...state import State, flat_size
from ..foreign import Foreign
from ..tolerances import EXACT, JUDGED, SAME_ROUNDINGS, eps
from ..trial import KINDS, Kind, Setting, Subject, Trial, layer_count, rounding_count

Call: TypeAlias = Callable[..., tuple[Any, ...]]
Condition: TypeAlias = Callable[[Bijection], bool]
Measure: TypeAlias = Callable[[Trial], float | None]

EVAL: Mapping[str, Any] = {"training": False}
FLOAT32_EVAL: Mapping[str, Any] = {"training": False, "dtype": torch.float32}
SEVERAL: Mapping[str, Any] = {"training": False, "batch": 3}
SPREAD: Mapping[str, Any] = {"training": False, "layout": "contiguous", "spread": True}
TWO_IN_FLOAT64: Mapping[str, Any] = {"training": False, "batch": 2, "dtype": torch.float64}


class Broken(AssertionError):
    """A promise that is broken as a whole, not by a number; its text says what was expected and what came."""


@dataclass(frozen=True, eq=False)
class Property:
    """A promise that every bijection keeps.

    Attributes:
        measure: returns how far a trial is from the promise; raises Broken if no number says it, and returns None if it
            has nothing else to say. Its name is the property's name, and its docstring is the promise.
        tolerance: the largest allowed number, for a trial.
        needs: the parts of a setting that the property fixes: log-determinants are measured in float64, for example.
        kinds: the kinds of input that it is tried on.
        start: the state that it starts from, which a report shows as the failing input.
        trials: the most trials in one check, for a property that is slow or the same for every input.
        promised_if: what a bijection must fulfil to make the promise.
        dense: whether it needs a dense Jacobian, which is not computed for states larger than `LARGEST_JACOBIAN`.
        with_grad: whether it is measured with gradients enabled.
    """

    measure: Measure
    tolerance: Callable[[Trial], float]
    needs: Mapping[str, Any]
    kinds: tuple[Kind, ...]
    start: Literal["x", "y"]
    trials: int | None
    promised_if: tuple[Condition, ...]
    dense: bool
    with_grad: bool

    @property
    def name(self) -> str:
        """The name in reports."""
        return self.measure.__name__.replace("_", " ")

    @property
    def promise(self) -> str:
        """What is expected, on one line."""
        return " ".join((self.measure.__doc__ or "").split())

    def adapt(self, setting: Setting) -> Setting:
        """The setting, changed to what this property needs."""
        kind = setting.kind if setting.kind in self.kinds else self.kinds[0]
        adapted = dataclasses.replace(setting, kind=kind, **self.needs)
        # Most properties mean nothing for an empty batch, and batch statistics need two numbers.
        least = 2 if adapted.training else 0 if "batch" in self.needs else 1
        return dataclasses.replace(adapted, batch=max(adapted.batch, least))

    def is_promised(self, bijection: Bijection) -> bool:
        """Whether the bijection makes this promise."""
        foreign = [part for part in bijection.modules() if isinstance(part, Foreign)]
        return all(met(bijection) for met in self.promised_if) and all(self.name not in one.unknown for one in foreign)

    def is_too_large(self, subject: Subject) -> bool:
        """Whether the property is promised, but the state is too large for the Jacobian that it needs."""
        return self.dense and self.is_promised(subject.bijection) and flat_size(subject.shape) > LARGEST_JACOBIAN

    def applies_to(self, subject: Subject) -> bool:
        """Whether the property can be checked: it is promised, a Jacobian is small enough, a context is there."""
        has_inputs = self.name != "context" or subject.context_shape is not None
        return has_inputs and self.is_promised(subject.bijection) and not self.is_too_large(subject)


def promised(
    tolerance: float | Callable[[Trial], float],
    *conditions: Condition,
    needs: Mapping[str, Any] = EVAL,
    kinds: tuple[Kind, ...] = KINDS,
    start: Literal["x", "y"] = "x",
    trials: int | None = None,
    dense: bool = False,
    with_grad: bool = False,
) -> Callable[[Measure], Property]:
    """Turn the function that measures a property into a `Property`, which has the arguments as its attributes."""
    allowed = tolerance if callable(tolerance) else lambda trial: tolerance
    return lambda measure: Property(measure, allowed, needs, kinds, start, trials, conditions, dense, with_grad)


differentiated = functools.partial(promised, needs=TWO_IN_FLOAT64, with_grad=True)
"""`promised` for properties that differentiate: in float64, and few samples, because each takes long."""


def inverts_to_rounding(bijection: Bijection) -> bool:
    """Whether there is an inverse, which does not stop at a tolerance of its own."""
    return bijection.invertible and bijection.inverse_tolerance is None


def has_exact_log_det(bijection: Bijection) -> bool:
    """Whether the log-determinant is not an estimate."""
    return not bijection.log_det_is_estimated


def is_surjective(bijection: Bijection) -> bool:
    """Whether every state is an image; those of an injection are not."""
    return bijection.surjective


def roundings(number: float) -> Callable[[Trial], float]:
    """A tolerance of this number of roundings per layer, times its growth, in the trial's dtype."""
    return lambda trial: number * rounding_count(trial.bijection) * eps(trial.setting.dtype)


def same_states(trial: Trial) -> float:
    """The largest distance between the results of two ways to compute the same states.

    It is 0 for an exact bijection. On a grid, where a rounding may change a conditioner's result, it is one step per
    layer more than in real numbers.
    """
    if trial.exactness == "exact":
        return EXACT
    return roundings(SAME_ROUNDINGS)(trial) + layer_count(trial.bijection) * trial.bijection.numerics.step


def same_numbers(trial: Trial, found: list[tuple[Any, Any]]) -> float:
    """The largest distance in pairs of states that should be equal, in units of magnitude.

    Above `same_states`, it is also divided by the condition number, as in `relative`.
    """
    worst = max(difference(a, b) for a, b in found) / magnitude(trial.x, *(state for pair in found for state in pair))
    if not worst > same_states(trial) or worst > JUDGED:
        return worst
    return worst / condition_number(*in_double(trial.bijection, trial.x, trial.context))


def relative(trial: Trial, error: float, states: list[State], tolerance: float, *, backwards: bool = False) -> float:
    """An error of a round trip in units of the largest magnitude of any state on the way.

    Above the tolerance, it is also divided by the condition number, unless the bijection is exact. The result is an
    upper bound, because the states on the way are computed only if they decide.
    """
    settled = error / magnitude(*states)
    if not settled > tolerance or trial.is_exact:
        return settled
    bijection, x, context = in_double(trial.bijection, states[0], trial.context)
    settled = error / magnitude(*trace(bijection, x, context), *states)
    return settled if settled > JUDGED else settled / condition_number(bijection, x, context, backwards=backwards)


def lost(trial: Trial, y: State, back: State, tolerance: float) -> float:
    """The `relative` error of the input that came back; if the bijection may be flat, of its image if it is less.

    What came back may be far larger than the input then, and so the roundings on the way to its image.
    """
    error = relative(trial, difference(trial.x, back), [trial.x, y], tolerance)
    if not error > tolerance or not trial.bijection.may_be_flat:
        return error
    again = trial.bijection(back, trial.context)
    return min(error, relative(trial, difference(y, again), [back, y], tolerance))


def expect(holds: bool, expected: str) -> None:
    """Raises Broken if it does not hold."""
    if not holds:
        raise Broken(expected)


def all_calls(trial: Trial, bijection: Bijection | None = None) -> list[tuple[str, Call, State]]:
    """Every call of a bijection, by name, with a state of the trial to call it with.

    Each call returns a tuple: the state alone, or the state and the log-determinant, which injections do not have.

    Args:
        trial: the trial.
        bijection: the bijection to call, by default the trial's.
    """
    called = trial.bijection if bijection is None else bijection

    def alone(call: Callable[..., Any]) -> Call:
        return lambda state, context: (call(state, context),)

    calls = [("forward", alone(called)), ("inverse", alone(called.inverse))][: 1 + called.invertible]
    if called.surjective:
        calls += [(name, getattr(called, name)) for name in ("forward_and_log_det", "inverse_and_log_det")]
    with torch.no_grad():
        states = (trial.x, trial.image)
    return [(name, call, state) for (name, call), state in zip(calls, states * 2, strict=False)]


def both_ways(trial: Trial, bijection: Bijection | None = None) -> list[tuple[str, Call, State]]:
    """One call of `all_calls` in each direction that there is, with the log-determinant if there is one."""
    return all_calls(trial, bijection)[-2:]
