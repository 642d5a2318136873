"""What a property is: a promise, a number that measures how far it is broken, and a tolerance with its reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from ...bijection import Bijection
from ...measures import LARGEST_JACOBIAN
from ...state import State, flat_size
from ..tolerances import EXACT, SAME_ROUNDINGS, eps
from ..trial import KINDS, Kind, Setting, Subject, Trial, layer_count

FLOAT64_EVAL: Mapping[str, Any] = {"dtype": torch.float64, "training": False}
EVAL: Mapping[str, Any] = {"training": False}


class Broken(AssertionError):
    """A promise that is broken as a whole, not by a number: what was expected and what came."""


@dataclass(frozen=True)
class Property:
    """A promise that every bijection keeps.

    Attributes:
        name: what reports call it.
        promise: what is expected, in one line.
        measure: how far a trial is from the promise; raises Broken where no number says it.
        tolerance: the largest number that is allowed, for a trial.
        needs: what of a setting the property fixes: log-determinants are measured in float64, for example.
        kinds: the inputs it is tried on.
        start: which state of the trial it starts from: what a report shows as the failing input.
        trials: the most in one check, for what is slow or the same for every input.
        about: which bijections it is about, by their numerics: where a map rounds, some properties have no meaning.
        dense: whether it makes a dense Jacobian, which shapes above `LARGEST_JACOBIAN` are too large for.
    """

    name: str
    promise: str
    measure: Callable[[Trial], float]
    tolerance: Callable[[Trial], float]
    needs: Mapping[str, Any]
    kinds: tuple[Kind, ...]
    start: Literal["x", "y"]
    trials: int | None
    about: Callable[[Bijection], bool]
    dense: bool

    def adapt(self, setting: Setting) -> Setting:
        """The setting with what this property needs."""
        kind = setting.kind if setting.kind in self.kinds else self.kinds[0]
        adapted = dataclasses.replace(setting, kind=kind, **self.needs)
        if not adapted.batch and "batch" not in self.needs:  # of no samples most have nothing to say
            adapted = dataclasses.replace(adapted, batch=1)
        if adapted.training and adapted.batch < 2:
            return dataclasses.replace(adapted, batch=2)  # batch statistics of one number are none
        return adapted

    def is_too_large(self, subject: Subject) -> bool:
        """Whether the property is promised, and the shape is too large for the Jacobian that it takes."""
        return self.dense and self.name not in subject.unpromised and flat_size(subject.shape) > LARGEST_JACOBIAN

    def applies_to(self, subject: Subject) -> bool:
        """Whether there is anything to check: a context, a Jacobian, what the layers themselves promise."""
        if self.name in subject.unpromised or self.is_too_large(subject):
            return False
        if not self.about(subject.bijection):
            return False
        return self.name != "context" or subject.context_shape is not None


def promised(
    tolerance: float | Callable[[Trial], float],
    *,
    needs: Mapping[str, Any] = EVAL,
    kinds: tuple[Kind, ...] = KINDS,
    start: Literal["x", "y"] = "x",
    trials: int | None = None,
    about: Callable[[Bijection], bool] = lambda bijection: True,
    dense: bool = False,
) -> Callable[[Callable[[Trial], float]], Property]:
    """Makes a property of the function that measures it; its docstring is the promise."""

    def decorate(measure: Callable[[Trial], float]) -> Property:
        promise = " ".join((measure.__doc__ or "").split())
        allowed = tolerance if callable(tolerance) else lambda trial: tolerance
        name = measure.__name__.replace("_", " ")
        return Property(name, promise, measure, allowed, needs, kinds, start, trials, about, dense)

    return decorate


def roundings(number: float) -> Callable[[Trial], float]:
    """A tolerance of this number of roundings a layer, in the trial's dtype."""

    def allowed(trial: Trial) -> float:
        return number * layer_count(trial.bijection) * eps(trial.setting.dtype)

    return allowed


def same_states(trial: Trial) -> float:
    """How far two ways to compute the same states may be apart.

    Nothing where they are exact; on a grid, where a rounding may tip a conditioner over, a step a layer more than in
    real numbers.
    """
    if trial.exactness == "exact":
        return EXACT
    return roundings(SAME_ROUNDINGS)(trial) + layer_count(trial.bijection) * trial.step


def expect(holds: bool, expected: str) -> None:
    """Raises Broken unless it holds."""
    if not holds:
        raise Broken(expected)


Call: TypeAlias = Callable[..., tuple[Any, ...]]


def all_there_is(bijection: Bijection) -> dict[str, Call]:
    """Each direction's call that computes all there is, by name; an injection has no log-determinants."""
    if bijection.surjective:
        return {name: getattr(bijection, name) for name in ("forward_and_log_det", "inverse_and_log_det")}
    return {"forward": _alone(bijection), "inverse": _alone(bijection.inverse)}


def both_ways(trial: Trial) -> list[tuple[str, Call, State]]:
    """The calls of `all_there_is`, and a state to give each."""
    with torch.no_grad():
        states = (trial.x, trial.image)
    return [(*named, state) for named, state in zip(all_there_is(trial.bijection).items(), states, strict=True)]


def all_calls(trial: Trial) -> list[tuple[str, Call, State]]:
    """The plain calls too; each returns a tuple, of the state alone or with the log-determinant."""
    (*_, x), (*_, image) = computed = both_ways(trial)
    plain = [("forward", _alone(trial.bijection), x), ("inverse", _alone(trial.bijection.inverse), image)]
    return [*plain, *computed] if trial.bijection.surjective else plain


def _alone(call: Callable[..., Any]) -> Call:
    return lambda state, context: (call(state, context),)
