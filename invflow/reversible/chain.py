"""A chain's forward under a policy that does not keep all activations."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from ..state import State, leaves, shape_of, zero_log_det
from .function import Run, reverse
from .monitor import Monitor, Reconstruction
from .randomness import draw_random_numbers
from .step import Outcome, Step
from .surroundings import Surroundings


def run_chain(
    steps: Iterable[Step],
    x: State,
    context: Tensor | None,
    *,
    log_det: bool,
    monitor: Monitor = "off",
    record: Reconstruction | None = None,
) -> Outcome:
    """A chain's forward whose activations are not kept for backward.

    Whole runs of reversible steps share one autograd function, which keeps their last state and inverts them one by
    one; each other step keeps its input and runs forward again. What no gradient reaches runs plainly.

    Args:
        steps: in the order that they are taken.
        x: the state that goes in.
        context: handed to every layer.
        log_det: whether the log-determinant is asked for; else it is None.
        monitor: what to do about a reconstruction that is wrong.
        record: where the monitor notes what it finds.
    """
    total = zero_log_det(x) if log_det else None
    waiting = list(steps)
    # torch.func and forward-mode differentiation see through no autograd function that calls modules: all is kept.
    plain = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    while waiting and (plain or not _gradients_reach(waiting[0], x, context)):
        x, total = _add(waiting.pop(0).forward(x, context, log_det), total)
    if torch.compiler.is_compiling():
        waiting = _without_randomness(waiting, x, context)
    rest = [] if torch.compiler.is_compiling() else _tail(waiting)
    for reversible, group in itertools.groupby(waiting, key=lambda step: step.reversible):
        if reversible:
            x, total = _add(reverse(Run(list(group), x, log_det, monitor, record), x, context), total)
            continue
        for step in group:
            x, total = _add(_checkpoint(step, x, context, log_det), total)
    for step in rest:
        x, total = _add(step.forward(x, context, log_det), total)
    return x, total


def _tail(steps: list[Step]) -> list[Step]:
    """Takes the last layer that trains, and what follows it, from the steps: these run plainly.

    Backward begins there, and would compute first what was thrown away last: kept, it takes no more memory than then.
    """
    last = len(steps) - 1
    while last >= 0 and next(steps[last].layer.parameters(), None) is None:
        last -= 1
    if last < 0:
        return []
    rest = steps[last:]
    if not all(step.reversible for step in rest):
        return []
    del steps[last:]
    return rest


def _add(outcome: Outcome, total: Tensor | None) -> Outcome:
    y, part = outcome
    return y, None if total is None or part is None else total + part


def _gradients_reach(step: Step, x: State, context: Tensor | None) -> bool:
    return (
        any(leaf.requires_grad for leaf in leaves(x))
        or (context is not None and context.requires_grad)
        or any(weight.requires_grad for weight in step.layer.parameters())
    )


def _without_randomness(steps: list[Step], x: State, context: Tensor | None) -> list[Step]:
    """The steps with those kept that draw random numbers: a compiled graph cannot draw the same again to invert."""
    shape, context_shape = shape_of(x), None if context is None else shape_of(context)
    found = []
    for step in steps:
        layer, backwards = step.layer, step.backwards
        reversible = step.reversible and not draw_random_numbers(layer, backwards, shape, context_shape)
        found.append(Step(step.name, layer, reversible, backwards))
        shape = layer.input_shape(shape) if backwards else layer.output_shape(shape)
    return found


def _checkpoint(step: Step, x: State, context: Tensor | None, log_det: bool) -> Outcome:
    """A step that keeps its input only."""
    if torch.compiler.is_compiling():  # which sees to random numbers and buffers itself
        made: Outcome = checkpoint(step.forward, x, context, log_det, use_reentrant=False)
        return made
    surroundings = _Replayed(step, next(leaves(x)).device)
    made = checkpoint(
        step.forward, x, context, log_det, use_reentrant=False, context_fn=lambda: (surroundings, surroundings)
    )
    return made


class _Replayed:
    """The contexts of a checkpoint's forward, where it is entered first, and of its recomputations, then."""

    def __init__(self, step: Step, device: torch.device) -> None:
        self._surroundings = Surroundings(step.layer, device)
        self._recorded = False
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> None:
        if self._recorded:
            self._entered.enter_context(self._surroundings.replay())
        else:
            self._surroundings.begin()

    def __exit__(self, *_: object) -> None:
        if self._recorded:
            self._entered.close()
        else:
            self._recorded = True
