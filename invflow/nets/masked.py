"""Masked nets, of which each output sees the features before its own alone; and a check that a net is like that."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeAlias

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn
from torch.nn import functional

from .._torch import Constants
from ..context import Context, ContextShape, make_context, seen
from ..errors import InvflowError, ShapeError
from ..fields import counted
from ..registry import nets, register_net
from ..state import Shape, TensorShape, flat_size, require_tensor
from .activations import ACTIVATIONS, Activation
from .blocks import Skip
from .contract import takes_context
from .sizes import Widths, set_to_zero, shape_with_context, with_context

Degrees: TypeAlias = Literal["sequential", "random"]

_DEGREE = 10_000
"""The operations that a degree takes: a microsecond."""

MOST_DEGREES = 2**22
"""Of all inputs, units and outputs. They are listed before anything else knows how large a net is, in seconds."""

CUTS = 64
"""The most places between the elements that a check looks at in one pass."""

TRIES = 64
"""The least number of random points in one pass: with few elements, many for each, so that no kink hides a slope."""


class MaskedLinear(Constants, nn.Linear):
    """A linear layer whose output of degree e sees the inputs of degrees up to e alone; if strict, those below e.

    Args:
        before: the degrees of the inputs.
        after: the degrees of the outputs.
        strict: whether an output does not see the inputs of its own degree.
    """

    constants = ("mask",)
    saved = False  # the degrees say it
    mask: Tensor

    def __init__(self, before: Sequence[int], after: Sequence[int], *, strict: bool = False) -> None:
        super().__init__(len(before), len(after))
        self.before, self.after, self.strict = tuple(before), tuple(after), strict
        self.mask = self.made("mask")

    def made(self, name: str) -> Tensor:
        before, after = torch.tensor(self.before), torch.tensor(self.after)
        mask = before < after[:, None] if self.strict else before <= after[:, None]
        return mask.to(torch.get_default_dtype())  # a product with booleans takes as long as the whole layer

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.mask, self.bias)


@register_net("masked_mlp")
class MaskedMLP(nn.Sequential):
    """MADE: masked linear layers, by which the outputs for feature i depend on the features before i alone.

    Use it in an `autoregressive` layer.

    Feature i of D has the degree i, counted from 1, and so have its outputs; a hidden unit has a degree from 1 to
    D - 1. A hidden unit sees the inputs and the units of degrees up to its own, an output those of degrees below. So
    the Jacobian of the outputs for all features, in their order, is strictly lower triangular: the others of its
    numbers are 0 exactly, whatever the weights are. The outputs for the first feature are constants.

    The context, flattened, is a further input of degree 0, which each unit sees. If there is one, hidden degrees start
    at 0, because the outputs for the first feature see units of degree 0 alone.

    Reference: Germain, Gregor, Murray, Larochelle: MADE, 2015, https://arxiv.org/abs/1502.03509

    Args:
        in_shape: (D,), the shape of the input, without the batch.
        out_shape: (k D,) for k numbers a feature: first one for all features, then the next.
        context_shape: the shape of the context.
        hidden: the features between the layers; an empty list makes one masked linear map.
        activation: the function after each layer but the last.
        degrees: those of hidden units, with the least degree m of what they see, at most D - 1: "sequential", unit h
            has ``m + h mod (D - m)``; or "random", each of m to D - 1 is equally likely.
        seed: of random degrees, which are the same on every machine.
        residual: whether the layers after the first form blocks: the first number of ``hidden`` is the width of h, and
            each further one that of a map within ``h + map(act(map(act(h))))``.
        zero_last: whether the last layer starts at zero, so that the net is 0 until it is trained.

    Raises:
        ShapeError: the input is no vector, or the outputs are not as many for each feature.
        InvflowError: residual blocks without a width, a seed for sequential degrees, or too many units.

    Examples:
        >>> net = MaskedMLP((3,), (6,), hidden=[4])
        >>> net(torch.zeros(5, 3)).shape, net[0].after
        (torch.Size([5, 6]), (1, 2, 1, 2))
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        context_shape: ContextShape = None,
        hidden: Widths = [],  # noqa: B006 -- a JSON default, never changed
        activation: Activation = "relu",
        degrees: Degrees = "sequential",
        seed: NonNegativeInt = 0,
        residual: bool = False,
        zero_last: bool = False,
    ) -> None:
        (features,), (outputs,) = (require_tensor("masked_mlp", shape, 1) for shape in (in_shape, out_shape))
        if not features or outputs % features:
            raise ShapeError(f"masked_mlp expects as many outputs for each feature, got {outputs} for {features}")
        if residual and len(hidden) < 2:
            raise InvflowError(
                f"masked_mlp with residual blocks expects their width and one of each block in hidden, got {hidden}"
            )
        if seed and degrees == "sequential":
            raise InvflowError(f'masked_mlp has a seed with degrees "random" only, got {seed} with "sequential"')
        (inputs,) = shape_with_context("masked_mlp", (features,), context_shape)
        listed = inputs + sum(hidden) + outputs
        if listed > MOST_DEGREES:
            raise InvflowError(
                f"masked_mlp expects at most {MOST_DEGREES:,} inputs, hidden units and outputs, got {listed:,}"
            )
        source = random.Random(seed)

        def drawn(seen: Sequence[int], width: int) -> list[int]:
            least = min(*seen, features - 1)
            choices = features - least
            if degrees == "sequential":
                return [least + unit % choices for unit in range(width)]
            # Of Python's generator, only random() is the same in every version.
            return [least + int(source.random() * choices) for _ in range(width)]

        own = range(1, features + 1)
        seen = [*own, *[0] * (inputs - features)]
        act = ACTIVATIONS[activation]().module
        modules: list[nn.Module] = []
        for position, width in enumerate(hidden):
            after = drawn(seen, width)
            if residual and position:
                modules.append(Skip(act(), MaskedLinear(seen, after), act(), MaskedLinear(after, seen)))
            else:
                modules += [MaskedLinear(seen, after), *([] if residual else [act()])]
                seen = after
        last = MaskedLinear(seen, [*own] * (outputs // features), strict=True)
        super().__init__(*modules, last)
        self.context_shape = context_shape
        self.building_cost = _DEGREE * listed
        if zero_last:
            set_to_zero(last)

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        return super().forward(with_context("masked_mlp", x, context, self.context_shape))  # type: ignore[no-any-return, no-untyped-call]


def elements_of(shape: TensorShape) -> int:
    """The number of features of a vector, or of positions that channels stand at."""
    return flat_size((1, *shape[1:])) if len(shape) > 1 else shape[0]


def require_autoregressive(
    who: str, net: nn.Module, shape: TensorShape, numbers: int, context_shape: ContextShape
) -> None:
    """Refuses a net with an output that depends on an element which comes too late; not on the meta device.

    The elements of a vector are its features, on whose own one its outputs may not depend either. Those of channels at
    positions are the positions in raster order, the tokens; on its own token an output may depend.

    The net is differentiated in float64, on a copy in eval mode, at random points: with its own weights, and with
    random positive ones for all that can be trained, because weights of 0 hide a dependence until they are trained.
    One gradient tells what all outputs up to an element see of those that come too late for them. There are at most
    `CUTS` of them in a pass, between which the search goes on if one is not 0; so a check costs about as much as two
    steps of training on `CUTS` samples, however many elements there are.

    Args:
        who: the tag of the layer, for messages.
        net: from ``(batch, *shape)`` to as many channels times ``numbers``: first one number for all of them.
        shape: ``(features,)``, or ``(channels, *positions)``.
        numbers: the number of outputs for each number of the input.
        context_shape: the shape of the context, if there is one.

    Raises:
        ShapeError: the net is not autoregressive, does not run on a copy, or returns another shape.
    """
    if any(tensor.is_meta for tensor in (torch.empty(0), *net.parameters(), *net.buffers())):
        return
    name = nets.name_of(type(net))
    try:
        # A net in inference mode, without gradients, or that draws random numbers is checked like any other.
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            given = seen(context_shape, getattr(net, "sees", ...)) if takes_context(net) else None
            found = _forbidden_dependence(net, shape, numbers, given)
    except Exception as error:
        on = counted(*shape, "feature") if len(shape) == 1 else f"the shape {shape}"
        raise ShapeError(
            f"{who} expects a net that runs on {on}, got {name}: {type(error).__name__}: {error}"
        ) from error
    if found is not None:
        output, cause = found
        one, those, known = (
            ("feature", "features before it", "masked_mlp")
            if len(shape) == 1
            else ("token", "tokens up to it", "causal_transformer")
        )
        raise ShapeError(
            f"{who} expects a net whose outputs for a {one} depend on the {those} alone, got {name}, "
            f"whose output for {one} {output} depends on {one} {cause} (counted from 0); use {known}"
        )


def _forbidden_dependence(
    net: nn.Module, shape: TensorShape, numbers: int, context_shape: ContextShape
) -> tuple[int, int] | None:
    """The first element with an output that sees an element which it must not see, and that one; None if none does."""
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(net).to("cpu", torch.float64).eval().requires_grad_(False)
    found = _search(probe, shape, numbers, context_shape, partial(_drawn, torch.randn, generator))
    if found is None:
        positive = partial(_drawn, torch.rand, generator)
        for weight, own in zip(probe.parameters(), net.parameters(), strict=True):
            if own.requires_grad:
                # Means of what a layer sees rather than sums, so that no activation saturates.
                weight.copy_(positive(*weight.shape) / max(1, weight.shape[1:].numel()))
        found = _search(probe, shape, numbers, context_shape, positive)
    return found


def _rows(draw: Callable[..., Tensor], count: int, shape: TensorShape) -> Tensor:
    return draw(count, *shape)


def _drawn(draw: Callable[..., Tensor], generator: torch.Generator, *shape: int) -> Tensor:
    return draw(shape, generator=generator, dtype=torch.float64, device="cpu")


def _search(
    net: nn.Module,
    shape: TensorShape,
    numbers: int,
    context_shape: ContextShape,
    draw: Callable[..., Tensor],
) -> tuple[int, int] | None:
    elements, strict = elements_of(shape), len(shape) == 1
    expected = numbers * shape[0], *shape[1:]
    places = torch.arange(elements, device="cpu")
    low, high, found = 0, max(0, elements - 1 if strict else elements - 2), None  # no token is later than the last
    while True:
        cuts = torch.linspace(low, high, min(CUTS, high - low + 1), dtype=torch.float64, device="cpu").round().long()
        rows = cuts.repeat(max(1, TRIES // len(cuts)))[:, None]
        x = draw(len(rows), *shape).requires_grad_()
        context = make_context(partial(_rows, draw, len(rows)), context_shape)
        made: Tensor = net(x) if context is None else net(x, context)
        if made.shape != (len(rows), *expected):
            raise ShapeError(f"it must return {expected}, but returns {tuple(made.shape[1:])}")
        if not made.requires_grad:  # a constant
            return None
        # Each row asks for the outputs up to its element.
        weights = draw(len(rows), made[0].numel() // elements, elements) * (places <= rows)[:, None]
        (slopes,) = torch.autograd.grad(made, x, weights.reshape(made.shape), materialize_grads=True)
        depends = (slopes.nan_to_num() != 0).reshape(len(rows), -1, elements).any(1)
        wrong = depends & (places >= rows if strict else places > rows)
        if not bool(wrong.any()):
            return found
        cut = int(rows[wrong.any(1)].min())
        found = cut, int(wrong[rows[:, 0] == cut].any(0).nonzero().max())
        low = max((place + 1 for place in cuts.tolist() if place < cut), default=low)
        if low == cut:
            return found
        high = cut
