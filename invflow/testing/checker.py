"""The check of any bijection: every property, in many settings, with the smallest failing input."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import random
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..arguments import one_line
from ..bijection import Bijection
from ..context import ContextShape
from ..errors import ReconstructionWarning
from ..numerics import same_batch
from ..numerics.conditioners import draws
from ..state import Shape, State, leaf_paths, map_state, part_of, sample, shape_of, with_part
from .properties import PROPERTIES, Broken, Property
from .report import Finding, Report
from .trial import DOMAINS, KINDS, Domain, Kind, Setting, Subject, Trial, some_settings

EXAMPLES = 10
MOST_SHRINKS = 24  # attempts to make a failing input smaller


def check_bijection(
    bijection: Bijection,
    shape: Shape,
    *,
    context_shape: ContextShape = None,
    domain: Domain | None = None,
    codomain: Domain | None = None,
    examples: int = EXAMPLES,
    perturb: bool = True,
    kinds: Sequence[Kind] = KINDS,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
    seed: int = 0,
) -> Report:
    """Check that a bijection keeps its promises: round trips, log-determinants, gradients, conduct.

    The check works on copies: the caller's module, its dtype, mode and hooks, and all random number generators are left
    unchanged. Hooks run with the copies too, because they may be part of the map. An exception raised by the bijection
    is a finding.

    Args:
        bijection: any bijection; `from_callables` makes one of another library's layer.
        shape: an input shape that it accepts, without the batch.
        context_shape: likewise of its context, if it takes one.
        domain: where inputs lie: "reals", "positive", "unit", "symmetric" or an open interval; by default the domain of
            the class.
        codomain: likewise for outputs; by default the codomain of the class or, if ``domain`` overrides its domain,
            unknown. If it is unknown, only images are inverted.
        examples: the number of settings in which each property is tried: inputs, dtype, mode, weights.
        kinds: the kinds of input; huge ones, for example, overflow if a scale is unbounded.
        perturb: whether noise is added to the weights in all settings but the first.
        only: the names of the properties to check; all by default.
        skip: the names of the properties to skip.
        seed: the seed of everything random.

    Returns:
        A report: for each property, the worst value and the tolerance.

    Raises:
        BijectionError: an AssertionError that names each failed property, what was expected, the worst value, the
            smallest failing input, and the seed.

    Examples:
        >>> from invflow.bijections import Psi
        >>> check_bijection(Psi(2), (1, 4, 4), examples=2, skip=["compiles"]).ok
        True
    """
    subject = Subject(bijection, shape, context_shape, domain, codomain)
    settings = some_settings(seed, examples, perturb=perturb, kinds=kinds)
    return examine(subject, settings, chosen(only, skip), seed).require_ok()


def examine(subject: Subject, settings: Iterable[Setting], properties: Iterable[Property], seed: int = 0) -> Report:
    """Try each property that applies in each setting, until it fails; the seed is only reported."""
    results: dict[Property, list[Finding]] = {prop: [] for prop in properties if prop.applies_to(subject)}
    # Dropout makes a forward and its inverse two functions in train mode, in which only gradients are promised.
    is_random = any(map(draws, subject.bijection.modules()))
    for setting in (dataclasses.replace(one, training=one.training and not is_random) for one in settings):
        trials = functools.cache(subject.trial)  # properties that need the same setting share one copy of the module
        for prop, before in results.items():
            adapted = prop.adapt(setting)
            if len(before) == prop.trials or any(one.setting == adapted or not one.ok for one in before):
                continue
            before.append(_try(prop, subject, adapted, trials))
    worst = [dataclasses.replace(max(found, key=_used), trials=len(found)) for found in results.values() if found]
    return Report(one_line(subject.bijection), tuple(worst), seed)


def chosen(only: Collection[str] | None = None, skip: Collection[str] = ()) -> list[Property]:
    """The properties with these names. Raises ValueError for an unknown name."""
    names = {prop.name for prop in PROPERTIES}
    unknown = sorted({*(only or ()), *skip} - names)
    if unknown:
        raise ValueError(f"unknown properties {unknown}: choose among {', '.join(sorted(names))}")
    return [prop for prop in PROPERTIES if prop.name not in skip and (only is None or prop.name in only)]


def _try(prop: Property, subject: Subject, setting: Setting, trials: Callable[[Setting], Trial]) -> Finding:
    """One property in one setting; if it fails, with the smallest failing input that is found."""
    with warnings.catch_warnings():
        # Repeated values make channels constant on purpose, and gradients, which a monitor protects, are measured here.
        warnings.simplefilter("ignore", ReconstructionWarning)
        try:
            with undisturbed(setting.seed):
                trial = trials(setting)
        except Exception as error:  # a module that cannot be copied
            return _broken(prop, setting, error)
        finding = _measure(prop, trial)
        if finding.ok or setting.spread:  # a search says itself where it failed
            return finding
        anywhere = subject.domains[0 if prop.start == "x" else 1] == DOMAINS["reals"]
        return dataclasses.replace(finding, input=_smallest(prop, trial, anywhere=anywhere))


@contextlib.contextmanager
def undisturbed(seed: int) -> Iterator[None]:
    """Seeds all random number generators and enables gradients, and restores both and the default dtype afterwards."""
    python, numpy, dtype = random.getstate(), np.random.get_state(), torch.get_default_dtype()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        torch.set_default_dtype(dtype)
        random.setstate(python)
        np.random.set_state(numpy)


def _used(finding: Finding) -> float:
    """The part of the tolerance that is used; infinite if the property fails, 0 if there is no tolerance to use."""
    if not finding.ok:
        return math.inf
    return finding.worst / finding.tolerance if finding.tolerance else 0.0


def _measure(prop: Property, trial: Trial) -> Finding:
    fresh = dataclasses.replace(trial, bijection=copy.deepcopy(trial.bijection))
    try:
        # A round trip in train mode is of the whole batch.
        with undisturbed(trial.setting.seed), same_batch(), torch.set_grad_enabled(prop.with_grad):
            worst, tolerance = prop.measure(fresh) or 0.0, prop.tolerance(trial)
    except Exception as error:
        return _broken(prop, trial.setting, error)
    return Finding(prop.name, prop.promise, worst, tolerance, 1, trial.setting)


def _broken(prop: Property, setting: Setting, error: Exception) -> Finding:
    expected = isinstance(error, Broken)
    first_line = next(iter(str(error).splitlines()), "")
    came = f"expected {error}" if expected else f"raised {type(error).__name__}: {first_line}"
    cause = None if expected else error
    return Finding(prop.name, prop.promise, math.inf, 0.0, 1, setting, came=came, cause=cause)


def _smallest(prop: Property, trial: Trial, *, anywhere: bool) -> State | None:
    """A smaller input that fails as well: one sample, simple numbers, zeros wherever possible.

    If the domain is not ``anywhere``, only the number of samples is reduced.
    """
    attempts = iter(range(MOST_SHRINKS))

    def fails(candidate: Trial) -> bool:
        return next(attempts, None) is not None and not _measure(prop, candidate).ok

    def started_from(state: State) -> Trial:
        changed: dict[str, Any] = {prop.start: state}
        return dataclasses.replace(trial, **changed)

    if getattr(trial, prop.start) is None:
        return None
    # A property that needs more than two samples is about several; in train mode one sample has no batch statistics.
    if trial.setting.batch > 1 and prop.needs.get("batch", 0) <= 2 and not trial.setting.training:
        one = {name: sample(getattr(trial, name), 0) for name in ("x", "y", "context", "other_context")}
        alone = dataclasses.replace(trial, setting=dataclasses.replace(trial.setting, batch=1), **one)
        trial = alone if fails(alone) else trial
    state: State = getattr(trial, prop.start)
    if not anywhere:
        return state
    for simplify in (torch.zeros_like, torch.ones_like, torch.round):
        simpler = map_state(simplify, state)
        if fails(started_from(simpler)):
            state = simpler
            break
    for path in leaf_paths(shape_of(state)):
        for index in part_of(state, path).nonzero().tolist():
            leaf = part_of(state, path).clone()
            leaf[tuple(index)] = 0
            simpler = with_part(state, path, leaf)
            state = simpler if fails(started_from(simpler)) else state
    return state
