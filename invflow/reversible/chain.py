"""A chain's forward under a policy that does not keep all activations."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch.utils.checkpoint import checkpoint

from .._torch import forward_mode_active, transforms_active
from ..context import Context, each_entry, entries, seen
from ..state import Shape, State, leaves, part_of, shape_of, with_part, zero_log_det
from ..steps import Step
from ..wires import Outcome
from .monitor import Fingerprint, Monitor, Reconstruction
from .segment import Segment
from .surroundings import Surroundings

Backprop: TypeAlias = Literal["stored", "reversible", "checkpoint"]
POLICIES = ("stored", "reversible", "checkpoint")


Kept: TypeAlias = Literal["activations", "input", "output"]
"""What is kept of a step for backward: its activations, as in plain training, its input, or its output."""


def run_chain(
    steps: Sequence[Step], x: State, context: Context, *, log_det: bool, monitor: Monitor, record: Reconstruction
) -> Outcome:
    """A chain's forward whose activations are not kept for backward.

    Args:
        steps: in the order in which they are taken.
        x: the state that goes in.
        context: passed to every layer.
        log_det: whether the log-determinant is asked for; else it is None.
        monitor: what to do about a wrong reconstruction.
        record: where the monitor notes what it finds.
    """
    total = zero_log_det(x) if log_det else None
    for kept, group in plan(steps, x, context):
        fingerprint = None if monitor == "off" else Fingerprint(record, monitor)
        x, change = run_group(kept, group, x, context, log_det, fingerprint)
        total = None if total is None or change is None else total + change
    return x, total


def run_group(
    kept: Kept, group: list[Step], x: State, context: Context, log_det: bool, fingerprint: Fingerprint | None
) -> Outcome:
    """What the steps that `plan` takes together make of a state; see `run_chain`."""
    if kept == "output":
        return Segment(group, x, log_det, fingerprint).forward(x, context)
    (step,) = group
    return (_checkpoint if kept == "input" else Step.forward)(step, x, context, log_det)


def plan(steps: Sequence[Step], x: State, context: Context) -> list[tuple[Kept, list[Step]]]:
    """A chain's steps in groups, each with what is kept of it.

    Neighbouring reversible steps are a segment: one autograd function keeps its output and inverts its steps one by
    one. Each other step is a group of its own, which keeps its input and runs forward again. Steps that no gradient
    reaches run plainly, and so do the last layer that trains and those after it: backward begins there, and would first
    recompute what was discarded last.
    """
    # torch.func and forward-mode differentiation cannot differentiate an autograd function that calls modules.
    if transforms_active() or forward_mode_active():
        return [("activations", [step]) for step in steps]
    first, last = 0, len(steps)
    if not any(leaf.requires_grad for leaf in (*leaves(x), *entries(context))):
        while first < last and not any(weight.requires_grad for weight in steps[first].layer.parameters()):
            first += 1
    if torch.compiler.is_compiling():
        steps = _without_randomness(steps, x, context)
    else:
        # The last step with weights; behind the last step if none has any.
        backwards = reversed(range(len(steps)))
        last = max(first, next((i for i in backwards if next(steps[i].layer.parameters(), None) is not None), last))
        last = last if all(step.reversible for step in steps[last:]) else len(steps)
    groups: list[tuple[Kept, list[Step]]] = [("activations", [step]) for step in steps[:first]]
    for reversible, neighbours in itertools.groupby(steps[first:last], key=lambda step: step.reversible):
        group = list(neighbours)
        groups += [("output", group)] if reversible else [("input", [step]) for step in group]
    return groups + [("activations", [step]) for step in steps[last:]]


def _without_randomness(steps: Sequence[Step], x: State, context: Context) -> Sequence[Step]:
    """The steps; those that draw random numbers keep their inputs: a compiled graph cannot draw the same to invert."""
    shape, context_shape = _fixed(shape_of(x)), each_entry(lambda entry: _fixed(shape_of(entry)), context)
    for step in steps:
        part = part_of(shape, step.path)
        step.reversible = step.reversible and not step.layer.draws(
            step.backwards, part, seen(step.around(context_shape), step.layer.sees)
        )
        shape = step.shape_after(shape)
    return steps


def _fixed(shape: Shape) -> Shape:
    """The shape in constants: torch.compile may hold sizes as symbols, which a range turns into numbers."""
    return tuple(_fixed(size) if isinstance(size, tuple) else len(range(size)) for size in shape)


def _checkpoint(step: Step, x: State, context: Context, log_det: bool) -> Outcome:
    """A step that keeps its input only."""
    run = step.of_part
    if not torch.compiler.is_compiling():  # the compiler takes care of random numbers and buffers itself
        surroundings = Surroundings(step.layer, next(leaves(x)).device)
        surroundings.begin()
        # The first call is the forward; all others are recomputations.
        contexts: Iterator[Any] = itertools.chain([contextlib.nullcontext()], iter(surroundings.replay, None))

        def run(part: Any, context: Context, log_det: bool) -> Outcome:
            with next(contexts):
                return step.of_part(part, context, log_det)

    part = part_of(x, step.path)
    made, change = checkpoint(run, part, context, log_det, use_reentrant=False)
    return with_part(x, step.path, made), change
