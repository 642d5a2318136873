"""The autograd function of a run of reversible layers.

Reference: Gomez, Ren, Urtasun, Grosse: The Reversible Residual Network, 2017, https://arxiv.org/abs/1707.04585
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._torch import reparametrized, run_backward
from ..numerics.conditioners import same_batch
from ..state import State, leaves, make_state, map_state, part_of, shape_of, with_part, zero_log_det
from ..wires import Outcome, Step, call
from .monitor import Monitor, Reconstruction, Samples, judge, tolerance
from .retrace import retrace
from .surroundings import Autocast, Surroundings, generators, same

Gradients: TypeAlias = list[Tensor | None]


class Run:
    """A run of reversible steps, and what their forward leaves for their backward.

    Attributes:
        steps: in the order that they are taken.
        weights: the parameters of all of them that are trained, each once.
    """

    def __init__(
        self, steps: Sequence[Step], x: State, log_det: bool, monitor: Monitor, record: Reconstruction | None
    ) -> None:
        self.steps = steps
        self.log_det = log_det
        self.monitor = monitor
        self.record = record
        self.input_shape = shape_of(x)
        self.output_shape: Any = None
        self.device = next(leaves(x)).device
        self.autocast = Autocast(self.device)
        self.compiled = torch.compiler.is_compiling()
        # A compiled graph has no place for words: there the monitor steps aside.
        self.samples = Samples() if monitor != "off" and record is not None and not self.compiled else None
        self.surroundings: list[Surroundings] = []
        self.weights_of: list[list[Tensor]]
        if self.compiled:
            self.weights_of = [[w for w in step.layer.parameters() if w.requires_grad] for step in steps]
        else:
            self.surroundings = [Surroundings(step.layer, self.device) for step in steps]
            self.weights_of = [one.weights for one in self.surroundings]
        # Each once; by identity, because a tensor's own hash takes its time.
        self.weights = list({id(weight): weight for weights in self.weights_of for weight in weights}.values())

    def forward(self, x: State, context: Tensor | None) -> Outcome:
        """All steps, one after the other."""
        total = zero_log_det(x) if self.log_det else None
        drawn = [] if self.compiled else [generators(self.device)]
        for position, step in enumerate(self.steps):
            if not self.compiled:
                self.surroundings[position].begin()
            part = part_of(x, step.path)
            made, change = step.of_part(part, context, self.log_det)
            if self.samples is not None:
                self.samples.keep(position, list(leaves(part)), list(leaves(made)))
            x = with_part(x, step.path, made)
            if not self.compiled:
                drawn.append(generators(self.device))
            total = None if total is None or change is None else total + change
        if not self.compiled and not same(drawn[0], drawn[-1]):
            for position, surroundings in enumerate(self.surroundings):
                if not same(drawn[position], drawn[position + 1]):
                    surroundings.drawn = drawn[position]
        self.output_shape = shape_of(x)
        return x, total

    def judge(self, reconstructed: Samples, output: State) -> None:
        """Hands what the monitor sees on to where it is noted."""
        if self.samples is None or self.record is None:
            return
        dtypes = {leaf.dtype for leaf in leaves(output)} | ({self.autocast.dtype} if self.autocast.dtype else set())
        allowed = max((tolerance(dtype) for dtype in dtypes if dtype.is_floating_point), default=0.0)
        errors = self.samples.errors(reconstructed, self.steps, allowed)
        judge(self.record, self.monitor, self.steps, errors, allowed, output)


def reverse(run: Run, x: State, context: Tensor | None) -> Outcome:
    """The output of a run, whose backward will invert it."""
    inputs = list(leaves(x))
    outputs = _Reverse.apply(run, context, len(inputs), *inputs, *run.weights)
    total = outputs[-1] if run.log_det else None
    pieces = iter(outputs)
    return make_state(lambda _: next(pieces), run.output_shape), total


class _Reverse(torch.autograd.Function):
    """The forward of a run; its backward inverts the steps, one by one, and differentiates each as it goes."""

    @staticmethod
    def forward(ctx: Any, run: Run, context: Tensor | None, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        pieces = iter(tensors[:count])
        y, total = run.forward(make_state(lambda _: next(pieces), run.input_shape), context)
        # Views, because a layer may hand on its input as it is, and an input is not to be saved as an output.
        outputs = [leaf.view_as(leaf) for leaf in leaves(y)]
        ctx.run, ctx.outputs, ctx.inputs = run, len(outputs), count
        ctx.has_context = context is not None
        ctx.set_materialize_grads(False)
        # The weights only so that autograd complains if they change before backward, as it does in plain training.
        ctx.save_for_backward(*outputs, *([] if context is None else [context]), *run.weights)
        return (*outputs, *([] if total is None else [total]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        run: Run = ctx.run
        saved = ctx.saved_tensors
        context = saved[ctx.outputs] if ctx.has_context else None
        pieces = iter(saved[: ctx.outputs])
        y = make_state(lambda _: next(pieces), run.output_shape)
        y_grads = _like(y, grads[: ctx.outputs])
        log_det_grad = grads[ctx.outputs] if run.log_det else None
        differentiate = _step
        if run.compiled or torch.is_grad_enabled():  # somebody differentiates this gradient
            differentiate = _differentiable_step
        else:
            y = map_state(Tensor.detach, y)
            context = None if context is None else context.detach().requires_grad_(ctx.needs_input_grad[1])
        output = y
        inputs_wanted = any(ctx.needs_input_grad[3 : 3 + ctx.inputs])
        context_wanted = [context] if context is not None and context.requires_grad else []
        sums: dict[int, Tensor] = {}
        samples = Samples()
        # No graph can hold the word for the batch; what needs it, batch statistics on a grid, is refused there.
        vouched = contextlib.nullcontext() if run.compiled else same_batch()
        with torch.enable_grad(), run.autocast.again(), vouched:
            for position in reversed(range(len(run.steps))):
                path, wanted = run.steps[position].path, inputs_wanted or position > 0
                part = part_of(y, path)
                part_grads: Gradients = list(leaves(part_of(y_grads, path)))
                x, x_grads, found = differentiate(
                    run, position, part, context, context_wanted, part_grads, log_det_grad, wanted
                )
                y, y_grads = with_part(y, path, x), with_part(y_grads, path, _like(x, x_grads))
                for target, gradient in zip([*run.weights_of[position], *context_wanted], found, strict=True):
                    if gradient is not None:
                        key = id(target)
                        sums[key] = sums[key] + gradient if key in sums else gradient
                if run.samples is not None:
                    samples.like(run.samples, position, x)
        run.judge(samples, output)
        context_grad = None if context is None else sums.get(id(context))
        return None, context_grad, None, *leaves(y_grads), *(sums.get(id(weight)) for weight in run.weights)


Found: TypeAlias = tuple[Any, Gradients, Gradients]


def _step(
    run: Run,
    position: int,
    y: State,
    context: Tensor | None,
    context_wanted: list[Tensor],
    grads: Gradients,
    log_det_grad: Tensor | None,
    inputs_wanted: bool,
) -> Found:
    """From a step's output and the gradients there to its input, the gradients there, and those of all else."""
    surroundings = run.surroundings[position]
    others = [*surroundings.differentiable(), *context_wanted]
    step = run.steps[position]
    x, made, log_det, passes = retrace(
        step.layer, y, context, surroundings.replay, log_det=run.log_det, backwards=step.backwards
    )
    inputs = list(leaves(x))
    reached = [leaf for leaf in inputs if leaf.requires_grad] if inputs_wanted else []
    found = _gradients([*made, log_det], [*grads, log_det_grad], [*reached, *others])
    pieces = iter(found)
    x_grads = [next(pieces) if inputs_wanted and leaf.requires_grad else None for leaf in inputs]
    for output, target in passes if inputs_wanted else ():
        handed, other = grads[output], x_grads[target]
        x_grads[target] = handed if other is None else other if handed is None else other + handed
    return map_state(Tensor.detach, x), x_grads, found[len(reached) :]


def _differentiable_step(
    run: Run,
    position: int,
    y: State,
    context: Tensor | None,
    context_wanted: list[Tensor],
    grads: Gradients,
    log_det_grad: Tensor | None,
    inputs_wanted: bool,
) -> Found:
    """The same as a differentiable function of the output, the weights and the gradients.

    The input has to depend on the output here, and yet be held fixed while the layer is differentiated: so by vjp, in
    which buffers that move have to be copies made inside.
    """
    step, others = run.steps[position], [*run.weights_of[position], *context_wanted]
    replay = contextlib.nullcontext if run.compiled else run.surroundings[position].replay
    with replay():
        by_identity = {id(weight): name for name, weight in step.layer.named_parameters()}
        names = [by_identity[id(weight)] for weight in run.weights_of[position]]
        buffers = dict(step.layer.named_buffers())
        with reparametrized(step.layer, {name: buffer.clone() for name, buffer in buffers.items()}):
            x = call(step.layer, y, context, log_det=False, backwards=not step.backwards)[0]
    inputs = list(leaves(x))

    def forward(*values: Tensor) -> tuple[Tensor, ...]:
        pieces = iter(values)
        start = make_state(lambda _: next(pieces), shape_of(x))
        state = {name: next(pieces) for name in names}
        state.update({name: buffer.clone() for name, buffer in buffers.items()})
        with reparametrized(step.layer, state):
            made, log_det = step.of_part(start, next(pieces, context), run.log_det)
        return (*leaves(made), *([] if log_det is None else [log_det]))

    with replay():
        made, pull_back = torch.func.vjp(forward, *inputs, *others)[:2]
    given = [*grads, *([log_det_grad] if run.log_det else [])]
    cotangents = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(made, given, strict=True))
    found = list(pull_back(cotangents))
    return x, found[: len(inputs)], found[len(inputs) :]


def _like(state: State, values: Iterable[Tensor | None]) -> Any:
    """Values for the tensors of a state, arranged as these are."""
    pieces: Iterator[Any] = iter(values)
    return map_state(lambda _: next(pieces), state)


def _gradients(outputs: Gradients, grads: Gradients, wanted: list[Tensor]) -> Gradients:
    """The gradients of what was used of the outputs; None for what they do not depend on."""
    used, given = [], []
    for output, grad in zip(outputs, grads, strict=True):
        if output is not None and grad is not None and output.requires_grad:
            used.append(output)
            given.append(grad)
    if not used or not wanted:
        return [None] * len(wanted)
    return run_backward(used, given, wanted)
