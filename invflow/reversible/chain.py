"""Backpropagation through a chain that keeps the last state and computes the others again.

Reference: Gomez, Ren, Urtasun, Grosse: The Reversible Residual Network, 2017, https://arxiv.org/abs/1707.04585
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..bijection import Bijection
from ..numerics.conditioners import same_batch
from ..state import State, leaves, make_state, map_state, shape_of, zero_log_det
from .surroundings import Autocast, Randomness, buffers_kept

Backprop: TypeAlias = Literal["stored", "reversible", "checkpoint"]
POLICIES = ("stored", "reversible", "checkpoint")


def run_chain(
    layers: Iterable[Bijection], policy: Backprop, x: State, context: Tensor | None, *, log_det: bool
) -> tuple[Any, Tensor | None]:
    """A chain's forward whose activations are not kept for backward.

    Under "reversible", whole runs of layers that are cheap to invert share one autograd function, which keeps their
    last state and inverts them one by one; the other layers, and under "checkpoint" all of them, keep their input and
    run forward again.

    Args:
        layers: in data order.
        policy: "reversible" or "checkpoint".
        x: the state that goes in.
        context: handed to every layer.
        log_det: whether the log-determinant is asked for; else it is None.
    """
    total = zero_log_det(x) if log_det else None
    for cheap, group in itertools.groupby(layers, key=lambda layer: policy == "reversible" and layer.cheap_inverse):
        if cheap:
            x, part = _reverse(list(group), x, context, log_det)
            total = None if total is None or part is None else total + part
            continue
        for layer in group:
            x, part = _checkpoint(layer, x, context, log_det)
            total = None if total is None or part is None else total + part
    return x, total


def _forward(layer: Bijection, x: State, context: Tensor | None, log_det: bool) -> tuple[Any, Tensor | None]:
    return layer.forward_and_log_det(x, context) if log_det else (layer(x, context), None)


def _checkpoint(layer: Bijection, x: State, context: Tensor | None, log_det: bool) -> tuple[Any, Tensor | None]:
    """A layer's forward that keeps its input only."""
    if torch._C._are_functorch_transforms_active():  # torch.func knows no checkpoints: there all is kept
        return _forward(layer, x, context, log_det)
    made: tuple[Any, Tensor | None] = checkpoint(
        functools.partial(_forward, layer, log_det=log_det),
        x,
        context,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), buffers_kept(layer)),
    )
    return made


class _Run:
    """A run of layers, and what their forward needs to be run again.

    Attributes:
        layers: in data order.
        parameters: those of all layers that are trained, each once.
    """

    def __init__(self, layers: Sequence[Bijection], x: State, log_det: bool) -> None:
        self.layers = layers
        self.log_det = log_det
        self.input_shape = shape_of(x)
        self.parameters = list(
            dict.fromkeys(weight for layer in layers for weight in layer.parameters() if weight.requires_grad)
        )
        device = next(leaves(x)).device
        self.autocast = Autocast(device)
        self.device = device
        self.randomness: list[Randomness] = []
        self.output_shape: Any = None

    def forward(self, x: State, context: Tensor | None) -> tuple[Any, Tensor | None]:
        total = zero_log_det(x) if self.log_det else None
        for layer in self.layers:
            randomness = Randomness(self.device)
            x, part = _forward(layer, x, context, self.log_det)
            randomness.forget_if_unused()
            self.randomness.append(randomness)
            total = None if total is None or part is None else total + part
        self.output_shape = shape_of(x)
        return x, total


def _reverse(layers: list[Bijection], x: State, context: Tensor | None, log_det: bool) -> tuple[Any, Tensor | None]:
    run = _Run(layers, x, log_det)
    outputs = _Reverse.apply(run, context, len(list(leaves(x))), *leaves(x), *run.parameters)
    total = outputs[-1] if log_det else None
    pieces = iter(outputs)
    return make_state(lambda _: next(pieces), run.output_shape), total


class _Reverse(torch.autograd.Function):
    """The forward of a run of layers; its backward inverts them, one by one, and differentiates each as it goes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(run: _Run, context: Tensor | None, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        pieces = iter(tensors[:count])
        y, total = run.forward(make_state(lambda _: next(pieces), run.input_shape), context)
        # Views, because a layer may hand on its input as it is, and an input is not to be saved as an output.
        return (*(leaf.view_as(leaf) for leaf in leaves(y)), *([] if total is None else [total]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        run, context = inputs[:2]
        outputs = output[:-1] if run.log_det else output
        ctx.run = run
        ctx.outputs = len(outputs)
        ctx.has_context = context is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*outputs, *([] if context is None else [context]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        run: _Run = ctx.run
        again = torch.is_grad_enabled()  # somebody differentiates this gradient
        outputs = ctx.saved_tensors[: ctx.outputs]
        context = ctx.saved_tensors[ctx.outputs] if ctx.has_context else None
        if context is not None and not again:
            context = context.detach().requires_grad_(ctx.needs_input_grad[1])
        pieces = iter(outputs)
        y = make_state(lambda _: next(pieces), run.output_shape)
        y_grads = list(grads[: ctx.outputs])
        log_det_grad = grads[ctx.outputs] if run.log_det else None
        sums: dict[Tensor, Tensor] = {}
        for layer, randomness in zip(reversed(run.layers), reversed(run.randomness), strict=True):
            weights: list[Tensor] = [weight for weight in layer.parameters() if weight.requires_grad]
            with torch.enable_grad(), run.autocast.again(), buffers_kept(layer), same_batch():
                differentiate = _differentiable_step if again else _step
                y, y_grads, others = differentiate(
                    layer, y, context, weights, y_grads, log_det_grad, randomness, run.log_det
                )
            for target, gradient in others:
                if gradient is not None:
                    sums[target] = sums[target] + gradient if target in sums else gradient
        context_grad = None if context is None else sums.get(context)
        return None, context_grad, None, *y_grads, *(sums.get(weight) for weight in run.parameters)


Gradients: TypeAlias = list[Tensor | None]
Step: TypeAlias = tuple[Any, Gradients, list[tuple[Tensor, Tensor | None]]]


def _step(
    layer: Bijection,
    y: State,
    context: Tensor | None,
    weights: list[Tensor],
    grads: Gradients,
    log_det_grad: Tensor | None,
    randomness: Randomness,
    log_det: bool,
) -> Step:
    """From a layer's output and the gradients there to its input, the gradients there, and those of all else."""
    x, made, determinant = layer.retrace(map_state(torch.Tensor.detach, y), context, randomness.again, log_det=log_det)
    inputs = list(leaves(x))
    others = weights if context is None or not context.requires_grad else [*weights, context]
    found = _gradients([*leaves(made), determinant], [*grads, log_det_grad], [*inputs, *others])
    return map_state(torch.Tensor.detach, x), found[: len(inputs)], list(zip(others, found[len(inputs) :], strict=True))


def _differentiable_step(
    layer: Bijection,
    y: State,
    context: Tensor | None,
    weights: list[Tensor],
    grads: Gradients,
    log_det_grad: Tensor | None,
    randomness: Randomness,
    log_det: bool,
) -> Step:
    """The same as a differentiable function of the output, the weights and the gradients.

    The input has to depend on the output here, and yet be held fixed while the layer is differentiated: so by vjp.
    """
    with randomness.again():
        x = layer.inverse(y, context)
    inputs = list(leaves(x))
    others = weights if context is None or not context.requires_grad else [*weights, context]
    names: dict[Tensor, str] = {weight: name for name, weight in layer.named_parameters()}
    kept = {name: buffer.clone() for name, buffer in layer.named_buffers()}

    def forward(*values: Tensor) -> tuple[Tensor, ...]:
        pieces = iter(values[: len(inputs)])
        state = {f"layer.{name}": buffer.clone() for name, buffer in kept.items()}
        given = context
        for target, value in zip(others, values[len(inputs) :], strict=True):
            if target is context:
                given = value
            else:
                state[f"layer.{names[target]}"] = value
        start = make_state(lambda _: next(pieces), shape_of(x))
        made, determinant = torch.func.functional_call(_Forward(layer), state, (start, given, log_det))
        return (*leaves(made), *([] if determinant is None else [determinant]))

    with randomness.again():
        made, pull_back = torch.func.vjp(forward, *inputs, *others)[:2]
    given = [*grads, *([log_det_grad] if log_det else [])]
    cotangents = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(made, given, strict=True))
    found = list(pull_back(cotangents))
    return x, found[: len(inputs)], list(zip(others, found[len(inputs) :], strict=True))


class _Forward(nn.Module):
    """A layer's forward, with the log-determinant or without, as a module's: functional_call knows no other."""

    def __init__(self, layer: Bijection) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: State, context: Tensor | None, log_det: bool) -> tuple[Any, Tensor | None]:
        return _forward(self.layer, x, context, log_det)


def _gradients(outputs: Gradients, grads: Gradients, wanted: list[Tensor]) -> Gradients:
    """The gradients of what was used of the outputs; None for what they do not depend on."""
    used = [
        (output, grad)
        for output, grad in zip(outputs, grads, strict=True)
        if output is not None and grad is not None and output.requires_grad
    ]
    if not used or not wanted:
        return [None] * len(wanted)
    made, given = zip(*used, strict=True)
    return list(torch.autograd.grad(made, wanted, given, allow_unused=True))
