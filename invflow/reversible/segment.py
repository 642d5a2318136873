"""Segments: neighbouring reversible steps, which backward inverts one by one and differentiates as it goes.

Reference: Gomez, Ren, Urtasun, Grosse: The Reversible Residual Network, 2017, https://arxiv.org/abs/1707.04585
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._torch import collectives, reparametrized, run_backward
from ..context import Context, each_entry, entries, with_entries
from ..errors import InvflowError
from ..numerics.conditioners import same_batch
from ..state import State, arranged, leaves, map_state, part_of, with_part, zero_log_det
from ..steps import Step
from ..wires import Outcome, call
from .monitor import Fingerprint, Pair
from .retrace import rerun, retrace
from .surroundings import Surroundings, autocast_dtype, generators, same, under_autocast

Gradients: TypeAlias = list[Tensor | None]
Found: TypeAlias = tuple[Any, Gradients, Gradients]
"""The input of a step, the gradients of its tensors, and those of the weights and the context."""
At: TypeAlias = tuple[State, Any, dict[int, Tensor]]
"""In backward, between two steps: the state, its gradients, and those of the weights and the context up to here."""

PARTS, LEAST_STEPS = 4, 4
"""Backward is judged in at most so many parts, of at least so many steps: a repair repeats no part before the one where
a fault began. More parts would cost healthy steps more than they save in repairs."""


class Segment:
    """Neighbouring reversible steps, and what their forward leaves for their backward.

    Args:
        steps: in the order in which they are taken.
        x: the state that goes in.
        log_det: whether the log-determinant is asked for.
        fingerprint: what the monitor keeps of the states; None if it is off.

    Raises:
        InvflowError: a step's layer, or a module within it, is sharded by itself.
    """

    def __init__(self, steps: list[Step], x: State, log_det: bool, fingerprint: Fingerprint | None) -> None:
        self.steps = steps
        self.log_det = log_det
        self.device = next(leaves(x)).device
        self.autocast = autocast_dtype(self.device)
        self.compiled = torch.compiler.is_compiling()
        self.input = self.output = map_state(_nothing, x)
        """The structure of the states at the two ends, without their tensors."""
        self.surroundings = [Surroundings(step.layer, self.device) for step in steps]
        # Each once; by identity, because hashing a tensor is slow.
        self.weights = list({id(weight): weight for one in self.surroundings for weight in one.weights}.values())
        for step, one in zip(steps, self.surroundings, strict=True):
            if one.holds_sharded:
                raise InvflowError(
                    f"{step.name}, {step.layer.tag}: reversible training cannot gather the weights of a sharded layer "
                    'in backward; set backprop to "checkpoint", or shard the whole chain and not its layers'
                )
        self.fingerprint = None if self.compiled else fingerprint  # a compiled graph cannot warn
        self.repairs = self.fingerprint is not None and self.fingerprint.repairs
        self.talked: list[Any] = []
        """The process groups in which the steps' forward communicated."""

    def forward(self, x: State, context: Context) -> Outcome:
        """What the steps make of a state; backward will reconstruct their inputs."""
        self.context = each_entry(lambda _: True, context)
        outputs = iter(_Reverse.apply(self, *leaves(x), *entries(context), *self.weights))
        return arranged(self.output, outputs), next(outputs, None)

    @torch.no_grad()
    def inputs(self, x: State, context: Context, count: int) -> list[State]:
        """What the first ``count`` steps act on, computed again from the segment's input."""
        found: list[State] = []
        for step, surroundings in zip(self.steps[:count], self.surroundings, strict=False):
            found.append(part_of(x, step.path))
            if len(found) < count:
                with surroundings.replay():
                    x = step.after(x, context)
        return found

    def agreed(self, position: int) -> int:
        """The largest position that a process with which the steps communicate found: all of them repair, or none."""
        for group in self.talked:
            largest = torch.tensor(position, device=self.device)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
            position = int(largest)
        return position

    def pull_back(
        self, x: State, y: State, grads: Gradients, context: Context, input_wanted: bool, twice: bool
    ) -> tuple[Gradients, dict[int, Tensor]]:
        """All steps differentiated, the last first, and those that were reconstructed wrongly once more.

        Args:
            x: the input, if the monitor repairs.
            y: the output.
            grads: the gradients of its tensors and of the log-determinant.
            context: the context, or None; its gradient is wanted if it requires one.
            input_wanted: whether the gradients of the input are wanted.
            twice: whether the gradients will be differentiated.

        Returns:
            The gradients of the input's tensors, and those of the weights and the context by their ids.
        """
        fingerprint, log_det_grad, count = self.fingerprint, grads[-1], len(self.steps)
        if fingerprint is not None:
            fingerprint.begin(y, self.autocast)
        agreed = self.agreed if self.repairs and not twice else None
        known: list[State] = []
        at: At = y, arranged(y, grads), {}
        stop = count
        while stop:
            start = max(0, stop - max(LEAST_STEPS, -(-count // PARTS))) if agreed else 0
            pull = functools.partial(
                self.pull_back_part, range(start, stop), at, log_det_grad, context, input_wanted, twice
            )
            reached, pairs = pull(known)
            if fingerprint is not None and not known:
                wrong = fingerprint.judge(self.steps, pairs, y, agreed)
                if wrong is not None:
                    del reached  # its memory is needed
                    known = self.inputs(x, context, wrong + 1)
                    reached = pull(known)[0]
            at, stop = reached, start
        return list(leaves(at[1])), at[2]

    def pull_back_part(
        self,
        part: range,
        at: At,
        log_det_grad: Tensor | None,
        context: Context,
        input_wanted: bool,
        twice: bool,
        known: list[State],
    ) -> tuple[At, list[Pair]]:
        """Some steps differentiated: what is known before the first of them, and what was compared.

        Args:
            part: the positions of the steps.
            at: what is known behind the last of them.
            log_det_grad: the gradient of the log-determinant.
            context: as in `pull_back`.
            input_wanted: as in `pull_back`.
            twice: as in `pull_back`.
            known: the inputs of the first steps, which need no reconstruction; they are used up.
        """
        differentiate = self.differentiate_twice if twice else functools.partial(self.differentiate, known=known)
        context_wanted = [entry for entry in entries(context) if entry.requires_grad]
        y, y_grads, sums = at[0], at[1], dict(at[2])
        pairs: list[Pair] = []
        for index in reversed(part):
            path, is_known = self.steps[index].path, index < len(known)
            made, made_grads = part_of(y, path), [*leaves(part_of(y_grads, path)), log_det_grad]
            wanted = input_wanted or index > 0
            x, x_grads, found = differentiate(index, made, context, context_wanted, made_grads, wanted)
            if self.fingerprint is not None and not is_known:
                x, compared = self.fingerprint.compare(index, x)
                pairs += compared
            y, y_grads = with_part(y, path, x), with_part(y_grads, path, arranged(x, x_grads))
            targets = [*self.surroundings[index].weights, *context_wanted]
            for target, gradient in zip(targets, found, strict=True):
                if gradient is not None:
                    key = id(target)
                    sums[key] = sums[key] + gradient if key in sums else gradient
        return (y, y_grads, sums), pairs[::-1]

    def differentiate(
        self,
        index: int,
        y: State,
        context: Context,
        wanted: list[Tensor],
        grads: Gradients,
        input_wanted: bool,
        known: list[State],
    ) -> Found:
        """From a step's output and the gradients there to its input, the gradients there, and all others.

        Args:
            index: which step.
            y: its output.
            context: the context, or None.
            wanted: the entries of the context whose gradients are wanted.
            grads: the gradients of the output's tensors and of the log-determinant.
            input_wanted: whether the gradients of the input are wanted.
            known: the inputs of the first steps; the last of them is taken if it is that of this step.
        """
        step, surroundings = self.steps[index], self.surroundings[index]
        others = [*surroundings.differentiable(), *wanted]
        again, given = (rerun, known.pop()) if index < len(known) else (retrace, y)
        x, made, log_det, passes = again(
            step.layer, given, step.around(context), surroundings.replay, log_det=self.log_det, backwards=step.backwards
        )
        inputs = list(leaves(x))
        variables = [*(leaf for leaf in inputs if leaf.requires_grad), *others] if input_wanted else others
        used: list[Tensor] = []
        slopes: list[Tensor] = []
        for output, grad in zip([*made, log_det], grads, strict=True):
            if output is not None and grad is not None and output.requires_grad:
                used.append(output)
                slopes.append(grad)
        # None for variables that the output does not depend on.
        found = iter(run_backward(used, slopes, variables) if used and variables else [None] * len(variables))
        x_grads = [next(found) if input_wanted and leaf.requires_grad else None for leaf in inputs]
        for source, target in passes if input_wanted else ():
            passed, other = grads[source], x_grads[target]
            x_grads[target] = passed if other is None else other if passed is None else other + passed
        return map_state(Tensor.detach, x), x_grads, list(found)

    def differentiate_twice(
        self, index: int, y: State, context: Context, wanted: list[Tensor], grads: Gradients, input_wanted: bool
    ) -> Found:
        """`differentiate` as a differentiable function of the output, the weights and the gradients.

        The input has to depend on the output here, and yet be fixed while the layer is differentiated: hence vjp,
        inside which buffers that move have to be copies.
        """
        step, surroundings = self.steps[index], self.surroundings[index]
        if surroundings.stand_ins:  # an earlier backward's
            surroundings.stand_ins.clear()
        with surroundings.replay():
            by_identity = {id(weight): name for name, weight in step.layer.named_parameters()}
            names = [by_identity[id(weight)] for weight in surroundings.weights]
            buffers = dict(step.layer.named_buffers())
            with reparametrized(step.layer, {name: buffer.clone() for name, buffer in buffers.items()}):
                x = call(step.layer, y, step.around(context), log_det=False, backwards=not step.backwards)[0]

        def forward(*values: Tensor) -> tuple[Tensor, ...]:
            pieces = iter(values)
            start = arranged(x, pieces)
            state = {name: next(pieces) for name in names}
            state.update({name: buffer.clone() for name, buffer in buffers.items()})
            changed = dict(zip(map(id, wanted), pieces, strict=True))
            seen = each_entry(lambda entry: changed.get(id(entry), entry), context)
            with reparametrized(step.layer, state):
                made, log_det = step.of_part(start, seen, self.log_det)
            return (*leaves(made), *([] if log_det is None else [log_det]))

        with surroundings.replay():
            made, pull_back = torch.func.vjp(forward, *leaves(x), *surroundings.weights, *wanted)[:2]
        given = zip(made, grads, strict=False)  # the last gradient is None without a log-determinant
        found = iter(pull_back(tuple(torch.zeros_like(value) if grad is None else grad for value, grad in given)))
        return x, [next(found) for _ in leaves(x)], list(found)


class _Reverse(torch.autograd.Function):
    """The forward of a segment; its backward inverts the steps, one by one, and differentiates each as it goes."""

    @staticmethod
    def forward(ctx: Any, segment: Segment, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        x, context = arranged(segment.input, given), with_entries(segment.context, given)
        ctx.inputs = len(list(leaves(x)))
        total = zero_log_det(x) if segment.log_det else None
        fingerprint, compiled = segment.fingerprint, segment.compiled
        drawn = [] if compiled else [generators(segment.device)]
        before_all = collectives() if segment.repairs else {}
        for index, step in enumerate(segment.steps):
            segment.surroundings[index].begin()
            part = part_of(x, step.path)
            made, change = step.of_part(part, context, segment.log_det and not step.layer.volume_preserving)
            if fingerprint is not None:
                fingerprint.keep(index, list(leaves(part)), list(leaves(made)))
            x = with_part(x, step.path, made)
            if not compiled:
                drawn.append(generators(segment.device))
            total = total if total is None or change is None else total + change
        if not compiled and not same(drawn[0], drawn[-1]):
            for surroundings, before, after in zip(segment.surroundings, drawn, drawn[1:], strict=False):
                surroundings.drawn = None if same(before, after) else before
        if before_all:
            segment.talked = [group for group, count in collectives().items() if before_all.get(group) != count]
        segment.output = map_state(_nothing, x)
        # Views, because a layer may return its input itself, and an input must not be saved as an output.
        outputs = [leaf.view_as(leaf) for leaf in leaves(x)]
        ctx.segment = segment
        ctx.set_materialize_grads(False)
        # The weights only so that autograd complains if they change before backward, as it does in plain training.
        own = tensors[: ctx.inputs] if segment.repairs else ()
        ctx.save_for_backward(*outputs, *entries(context), *own, *segment.weights)
        return (*outputs, *([] if total is None else [total]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        segment: Segment = ctx.segment
        saved = iter(ctx.saved_tensors)
        y = arranged(segment.output, saved)
        context = with_entries(segment.context, saved)
        x: Any = arranged(segment.input, saved) if segment.repairs else None
        given = [*grads, *([] if segment.log_det else [None])]
        twice = segment.compiled or torch.is_grad_enabled()  # this gradient will be differentiated
        if not twice:
            y = map_state(Tensor.detach, y)
        # Each entry as a tensor of its own, because one may have two names.
        wanted = iter(ctx.needs_input_grad[1 + ctx.inputs :])
        own = [one.view_as(one) if twice else one.detach().requires_grad_(next(wanted)) for one in entries(context)]
        context = with_entries(context, own)
        input_wanted = any(ctx.needs_input_grad[1 : 1 + ctx.inputs])
        # A compiled graph cannot set `same_batch`; layers that need it, with batch statistics on a grid, refuse there.
        vouched = contextlib.nullcontext() if segment.compiled else same_batch()
        with torch.enable_grad(), under_autocast(segment.device, segment.autocast), vouched:
            x_grads, sums = segment.pull_back(x, y, given, context, input_wanted, twice)
        return None, *x_grads, *(sums.get(id(one)) for one in (*own, *segment.weights))


def _nothing(_: Tensor) -> Any:
    return None
