"""The thorough check of a chain: every property of every layer and of the whole, and the layer that loses precision."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..bijections.inverse import directed, given_to
from ..context import each_entry
from ..diagnostics.check import inputs
from ..diagnostics.roundtrip import errors_on_the_way_back
from ..sequential import Sequential
from ..state import map_state, part_of, shape_of
from .checker import chosen, examine
from .properties import PROPERTIES
from .trial import Subject, some_settings

EXAMPLES = 4
SKIPPED = ("compiles",)  # takes seconds per layer, and does not concern the mathematics


@dataclass(frozen=True)
class Proof:
    """The result of checking the properties of a layer or of a chain.

    Attributes:
        layer: the layer or chain, on one line.
        checked: the number of properties.
        failures: one text per failed property.
        worst: the worst value of each property, by name.
        unmeasured: the properties that need too large a Jacobian.
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
        chain: the entry of the whole chain.
        error_by_depth: the error of the state before each step when the chain is run backwards from its end, in float64
            and in eval mode; the last entry is that of the output, which is 0.
        lost_at: the index of the step that adds most to that error; None if no step adds to it.
        ok: whether every property holds.
    """

    layers: list[Proof]
    chain: Proof
    error_by_depth: list[float]
    lost_at: int | None
    ok: bool


def check_thoroughly(chain: Sequential, announce: Callable[[str], None] = lambda line: None) -> Thorough:
    """Check every property of each layer, at the shape that reaches it, and of the whole chain.

    Args:
        chain: a chain that knows its input shape, as every chain built from a spec does.
        announce: called with the name of what is checked next.
    """
    x, context = inputs(chain)
    shapes, steps = chain.shapes(shape_of(x)), chain.steps(shape_of(x))
    layers = []
    for position, (step, shape) in enumerate(zip(steps, shapes, strict=False)):
        announce(f"layer {position} of {len(steps)}")
        context_shape = given_to(step, chain.declared_context_shape)
        subject = Subject(directed(step), part_of(shape, step.path), context_shape)
        layers.append(_proof(subject, step.title))
    announce("the whole chain")
    whole = _proof(Subject(chain, shapes[0], chain.declared_context_shape), "whole chain")
    given = each_entry(torch.Tensor.double, context)
    in_double = copy.deepcopy(chain).double().eval()
    errors = errors_on_the_way_back(in_double, map_state(torch.Tensor.double, x), given)
    added = [before - after for before, after in itertools.pairwise(errors)]
    lost_at = max(range(len(added)), key=added.__getitem__) if added and max(added) > 0 else None
    return Thorough(layers, whole, errors, lost_at, not any(proof.failures for proof in (*layers, whole)))


def _proof(subject: Subject, name: str) -> Proof:
    report = examine(subject, some_settings(0, EXAMPLES), chosen(skip=SKIPPED))
    unmeasured = [prop.name for prop in PROPERTIES if prop.is_too_large(subject)]
    worst = {finding.name: finding.worst for finding in report.findings}
    return Proof(name, len(report.findings), [str(finding) for finding in report.failures], worst, unmeasured)
