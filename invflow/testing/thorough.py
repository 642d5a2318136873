"""The thorough check of a spec: every property of every layer and of the whole chain, and where precision is lost."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..bijections.inverse import directed
from ..diagnostics.check import inputs
from ..diagnostics.roundtrip import errors_on_the_way_back
from ..sequential import Sequential
from ..state import map_state, part_of, shape_of
from .checker import examine
from .properties import PROPERTIES
from .report import Report
from .trial import Subject

EXAMPLES = 4
SKIPPED = ("compiles",)  # a matter of seconds for each layer, and no question of mathematics


@dataclass(frozen=True)
class Proof:
    """What the properties say of a layer or of a chain.

    Attributes:
        layer: what was checked, on one line.
        checked: how many properties.
        failures: one text per property that fails.
        worst: the worst value of each property, by name.
        unmeasured: the properties that the shape is too large for.
    """

    layer: str
    checked: int
    failures: list[str]
    worst: dict[str, float]
    unmeasured: list[str]


@dataclass(frozen=True)
class Thorough:
    """The result of `check_thoroughly`.

    Attributes:
        layers: one entry per step of the chain.
        chain: of the whole chain.
        error_by_depth: how far the state before each step is off when the chain is run backwards from its end, in
            float64 and in eval mode; the last entry is the output's, which is 0.
        lost_at: the step that adds most to that error; None where none adds any.
        ok: whether every property holds.
    """

    layers: list[Proof]
    chain: Proof
    error_by_depth: list[float]
    lost_at: int | None
    ok: bool


def check_thoroughly(chain: Sequential, announce: Callable[[str], None] = lambda line: None) -> Thorough:
    """Every property of each layer, at the shape that reaches it, and of the whole chain.

    Args:
        chain: one that knows its input shape, as every chain built from a spec does.
        announce: told what is being checked.
    """
    x, context = inputs(chain)
    shapes, steps = chain.shapes(shape_of(x)), chain.steps(shape_of(x))
    layers = []
    for position, (step, shape) in enumerate(zip(steps, shapes, strict=False)):
        announce(f"layer {position} of {len(steps)}")
        subject = Subject(directed(step), part_of(shape, step.path), chain.declared_context_shape)
        layers.append(_proof(subject, step.title))
    announce("the whole chain")
    whole = _proof(Subject(chain, shapes[0], chain.declared_context_shape), "whole chain")
    given = None if context is None else context.double()
    in_double = copy.deepcopy(chain).double().eval()
    errors = errors_on_the_way_back(in_double, map_state(torch.Tensor.double, x), given)
    added = [before - after for before, after in itertools.pairwise(errors)]
    lost_at = max(range(len(added)), key=added.__getitem__) if added and max(added) > 0 else None
    return Thorough(layers, whole, errors, lost_at, not any(proof.failures for proof in (*layers, whole)))


def _proof(subject: Subject, name: str) -> Proof:
    report: Report = examine(subject, examples=EXAMPLES, skip=SKIPPED)
    unmeasured = [prop.name for prop in PROPERTIES if prop.is_too_large(subject)]
    worst = {finding.name: finding.worst for finding in report.findings}
    return Proof(name, len(report.findings), [str(finding) for finding in report.failures], worst, unmeasured)
