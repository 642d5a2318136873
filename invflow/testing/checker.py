"""Checking anybody's bijection: every property, in many settings, and the smallest input that fails."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import random
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import one_line
from ..bijection import Bijection
from ..errors import ReconstructionWarning
from ..numerics import same_batch
from ..state import Shape, State, TensorShape, leaves, map_state, sample
from .properties import PROPERTIES, Broken, Property
from .report import BijectionError, Finding, Report
from .trial import DOMAINS, KINDS, Domain, Kind, Setting, Subject, Trial, some_settings

EXAMPLES = 10
MOST_SHRINKS = 60  # tries to make a failing input smaller


def check_bijection(
    bijection: Bijection,
    shape: Shape,
    *,
    context_shape: TensorShape | None = None,
    domain: Domain | None = None,
    codomain: Domain | None = None,
    examples: int = EXAMPLES,
    perturb: bool = True,
    kinds: Sequence[Kind] = KINDS,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
    seed: int = 0,
) -> Report:
    """Proves a bijection, or says how it fails: round trips, log-determinants, gradients, conduct.

    It works on copies: the caller's module, its dtype, mode, hooks, and all generators of random numbers stay as they
    are; hooks run with the copies too, for they may be part of the map. What the bijection raises is a finding.

    Args:
        bijection: yours, or anybody's through `from_callables`.
        shape: an input shape that it accepts, without the batch.
        context_shape: likewise of its context, where it has one.
        domain: where inputs lie, if not where the class says: "reals", "positive", "unit", or an open interval.
        codomain: likewise for outputs; by default the attribute ``codomain`` of the bijection, the reals where the
            domain is, and else whatever forward returns.
        examples: how many settings each property is tried in: inputs, dtype, mode, weights.
        kinds: which inputs; huge ones, for example, overflow where a scale is unbounded.
        perturb: whether the weights are moved by noise in all settings but the first.
        only: the names of the properties to check; all by default.
        skip: the names of those to leave out.
        seed: decides everything random.

    Returns:
        A report: per property the worst value and what is allowed.

    Raises:
        BijectionError: an AssertionError that names each property that fails, what was expected, the worst value, the
            smallest failing input, and the seed.

    Examples:
        >>> from invflow.bijections import Psi
        >>> check_bijection(Psi(2), (1, 4, 4), examples=2, skip=["compiles"]).ok
        True
    """
    subject = Subject(bijection, shape, context_shape, domain, codomain)
    report = examine(subject, examples=examples, perturb=perturb, kinds=kinds, only=only, skip=skip, seed=seed)
    if not report.ok:
        raise BijectionError(report) from next(
            (finding.cause for finding in report.failures if finding.cause is not None), None
        )
    return report


def examine(
    subject: Subject,
    *,
    examples: int = EXAMPLES,
    perturb: bool = True,
    kinds: Sequence[Kind] = KINDS,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
    seed: int = 0,
) -> Report:
    """What `check_bijection` does, without raising."""
    findings: dict[str, Finding] = {}
    properties = [prop for prop in chosen(only, skip) if prop.applies_to(subject)]
    tried: dict[str, set[Setting]] = {prop.name: set() for prop in properties}
    for setting in some_settings(seed, examples, perturb=perturb, kinds=kinds):
        trials = functools.cache(subject.trial)  # properties that need the same share its copy of the module
        for prop in properties:
            adapted, before = prop.adapt(setting), findings.get(prop.name)
            enough = prop.trials is not None and len(tried[prop.name]) >= prop.trials
            if enough or adapted in tried[prop.name] or (before is not None and not before.ok):
                continue
            tried[prop.name].add(adapted)
            found = try_property(prop, subject, setting, trials)
            if before is None or _used(found) > _used(before):
                findings[prop.name] = found
    counted = [dataclasses.replace(one, trials=len(tried[one.name])) for one in findings.values()]
    return Report(one_line(subject.bijection), tuple(counted), seed)


def chosen(only: Collection[str] | None = None, skip: Collection[str] = ()) -> list[Property]:
    """The properties of these names. Raises ValueError for an unknown name."""
    names = {prop.name for prop in PROPERTIES}
    unknown = sorted({*(only or ()), *skip} - names)
    if unknown:
        raise ValueError(f"unknown properties {unknown}: there is {', '.join(sorted(names))}")
    return [prop for prop in PROPERTIES if prop.name not in skip and (only is None or prop.name in only)]


def try_property(
    prop: Property, subject: Subject, setting: Setting, trials: Callable[[Setting], Trial] | None = None
) -> Finding:
    """One property in one setting; where it fails, with the smallest input found that fails.

    Args:
        prop: the property.
        subject: what it is tried on.
        setting: adapted to what the property needs.
        trials: ``subject.trial``, or what remembers its results.
    """
    setting = prop.adapt(setting)
    with undisturbed(setting.seed), warnings.catch_warnings():
        # Repeated values make channels constant on purpose; what a monitor fears for, gradients, is measured here.
        warnings.simplefilter("ignore", ReconstructionWarning)
        try:
            trial = (trials or subject.trial)(setting)
        except Exception as error:
            # Nothing can be tried on a module that has no copy.
            return _finding(prop, setting, error=error)
        finding = _measure(prop, trial)
        if finding.ok:
            return finding
        anywhere = subject.domains[0 if prop.start == "x" else 1] == DOMAINS["reals"]
        return dataclasses.replace(finding, input=_smallest(prop, trial, anywhere=anywhere))


@contextlib.contextmanager
def undisturbed(seed: int) -> Iterator[None]:
    """Leaves every generator of random numbers, and the gradient mode, as they were; inside, they start from a seed."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _used(finding: Finding) -> float:
    """How much of the tolerance is used up; where there is none, nothing or everything."""
    if not finding.ok:
        return math.inf
    return finding.worst / finding.tolerance if finding.tolerance else 0.0


def _measure(prop: Property, trial: Trial) -> Finding:
    fresh = dataclasses.replace(trial, bijection=copy.deepcopy(trial.bijection))
    try:
        with same_batch():  # a round trip in train mode is one of the whole batch
            value, allowed = prop.measure(fresh), prop.tolerance(trial)
    except Exception as error:
        return _finding(prop, trial.setting, error=error)
    return _finding(prop, trial.setting, value, allowed)


def _finding(
    prop: Property, setting: Setting, value: float = math.inf, allowed: float = 0.0, error: Exception | None = None
) -> Finding:
    came = ""
    if isinstance(error, Broken):
        came = f"expected {error}"
    elif error is not None:
        came = f"raised {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    cause = None if isinstance(error, Broken) else error
    return Finding(prop.name, prop.promise, value, allowed, 1, setting, came=came, cause=cause)


def _smallest(prop: Property, trial: Trial, *, anywhere: bool) -> State | None:
    """A small input that fails as well: one sample, plain numbers, zeros wherever they will do.

    Where the domain is not ``anywhere``, only the number of samples is made smaller.
    """
    tries = iter(range(MOST_SHRINKS))

    def fails(candidate: Trial) -> bool:
        return next(tries, None) is not None and not _measure(prop, candidate).ok

    def start(of: Trial) -> Any:
        return getattr(of, prop.start)

    if start(trial) is None:
        return None
    # Properties of more than two samples are about several; in train mode one sample has no statistics.
    if trial.setting.batch > 1 and prop.needs.get("batch", 0) <= 2 and not trial.setting.training:
        alone = _first_sample(trial)
        trial = alone if fails(alone) else trial
    if not anywhere:
        return start(trial)  # type: ignore[no-any-return]

    def started_from(state: State) -> Trial:
        changed: dict[str, Any] = {prop.start: state}
        return dataclasses.replace(trial, **changed)

    for simplify in (torch.zeros_like, torch.ones_like, torch.round):
        simpler = started_from(map_state(simplify, start(trial)))
        if fails(simpler):
            trial = simpler
            break
    for which, leaf in enumerate(leaves(start(trial))):
        for index in leaf.nonzero().tolist():
            simpler = started_from(_with_zero(start(trial), which, tuple(index)))
            trial = simpler if fails(simpler) else trial
    return start(trial)  # type: ignore[no-any-return]


def _with_zero(state: State, which: int, index: tuple[int, ...]) -> State:
    """The state with one number of one of its tensors set to zero."""
    numbers = iter(range(sum(1 for _ in leaves(state))))

    def change(leaf: Tensor) -> Tensor:
        if next(numbers) != which:
            return leaf
        changed = leaf.clone()
        changed[index] = 0
        return changed

    return map_state(change, state)


def _first_sample(trial: Trial) -> Trial:
    one = {name: sample(getattr(trial, name), 0) for name in ("x", "y", "context", "other_context")}
    return dataclasses.replace(trial, setting=dataclasses.replace(trial.setting, batch=1), **one)
