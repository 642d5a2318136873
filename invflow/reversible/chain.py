"""A chain's forward under a policy that does not keep all activations."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._torch import forward_mode_active, transforms_active
from ..state import Shape, State, leaves, part_of, shape_of, with_part, zero_log_det
from ..wires import Outcome, Step
from .function import Run, reverse
from .monitor import Monitor, Reconstruction
from .randomness import draw_random_numbers
from .surroundings import Surroundings

Backprop: TypeAlias = Literal["stored", "reversible", "checkpoint"]
POLICIES = ("stored", "reversible", "checkpoint")


@dataclass(slots=True)
class Part:
    """Steps of a chain that are taken together, and how.

    Attributes:
        steps: all steps of a run that is reversed; else one.
        keeps: what is kept for backward: the "activations" as in plain training, the "input", or the "output".
    """

    steps: list[Step]
    keeps: str

    def forward(
        self,
        x: State,
        context: Tensor | None,
        log_det: bool,
        monitor: Monitor = "off",
        record: Reconstruction | None = None,
    ) -> Outcome:
        """What the steps return."""
        if self.keeps == "output":
            return reverse(Run(self.steps, x, log_det, monitor, record), x, context)
        (step,) = self.steps
        return (_checkpoint if self.keeps == "input" else Step.forward)(step, x, context, log_det)


def run_chain(
    steps: Sequence[Step],
    x: State,
    context: Tensor | None,
    *,
    log_det: bool,
    monitor: Monitor = "off",
    record: Reconstruction | None = None,
) -> Outcome:
    """A chain's forward whose activations are not kept for backward.

    Args:
        steps: in the order that they are taken.
        x: the state that goes in.
        context: handed to every layer.
        log_det: whether the log-determinant is asked for; else it is None.
        monitor: what to do about a reconstruction that is wrong.
        record: where the monitor notes what it finds.
    """
    total = zero_log_det(x) if log_det else None
    for part in plan(steps, x, context):
        x, change = part.forward(x, context, log_det, monitor, record)
        total = None if total is None or change is None else total + change
    return x, total


def plan(steps: Sequence[Step], x: State, context: Tensor | None) -> list[Part]:
    """How a chain's steps are taken.

    Whole runs of reversible steps share one autograd function, which keeps their last state and inverts them one by
    one; each other step keeps its input and runs forward again. What no gradient reaches runs plainly, and so does the
    last layer that trains, with what follows it: backward begins there, and would compute first what was thrown away
    last.
    """
    compiling = torch.compiler.is_compiling()
    # torch.func and forward-mode differentiation see through no autograd function that calls modules: all is kept.
    if transforms_active() or forward_mode_active():
        return [Part([step], "activations") for step in steps]
    first, last = 0, len(steps)
    if not _require_gradients(x, context):
        while first < last and not any(weight.requires_grad for weight in steps[first].layer.parameters()):
            first += 1
    if not compiling:
        last = max(first, _last_trained(steps))
        last = last if all(step.reversible for step in steps[last:]) else len(steps)
    if compiling:
        steps = _without_randomness(steps, x, context)
    parts = [Part([step], "activations") for step in steps[:first]]
    for reversible, together in itertools.groupby(steps[first:last], key=lambda step: step.reversible):
        run = list(together)
        parts += [Part(run, "output")] if reversible else [Part([step], "input") for step in run]
    return parts + [Part([step], "activations") for step in steps[last:]]


def _require_gradients(x: State, context: Tensor | None) -> bool:
    return any(leaf.requires_grad for leaf in leaves(x)) or (context is not None and context.requires_grad)


def _last_trained(steps: Sequence[Step]) -> int:
    """The position of the last step with weights; behind the last one where none has any."""
    last = len(steps) - 1
    while last >= 0 and next(steps[last].layer.parameters(), None) is None:
        last -= 1
    return last if last >= 0 else len(steps)


def _without_randomness(steps: Sequence[Step], x: State, context: Tensor | None) -> Sequence[Step]:
    """The steps, of which those that draw random numbers are kept: a compiled graph cannot draw the same to invert."""
    shape, context_shape = _fixed(shape_of(x)), None if context is None else _fixed(shape_of(context))
    for step in steps:
        part = part_of(shape, step.path)
        step.reversible = step.reversible and not draw_random_numbers(step.layer, step.backwards, part, context_shape)
        shape = step.shape_after(shape)
    return steps


def _fixed(shape: Shape) -> Shape:
    """The shape in numbers that stand: what torch.compile takes for symbols, a range can only have as numbers."""
    return tuple(_fixed(size) if isinstance(size, tuple) else len(range(size)) for size in shape)


def _checkpoint(step: Step, x: State, context: Tensor | None, log_det: bool) -> Outcome:
    """A step that keeps its input only."""
    options: dict[str, Any] = {}
    if not torch.compiler.is_compiling():  # which sees to random numbers and buffers itself
        surroundings = _Replayed(step, next(leaves(x)).device)
        options["context_fn"] = lambda: (surroundings, surroundings)
    part = part_of(x, step.path)
    made, change = checkpoint(step.of_part, part, context, log_det, use_reentrant=False, **options)
    return with_part(x, step.path, made), change


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
        self._recorded = True
