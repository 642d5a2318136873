"""Deep nets in one document: residual nets, dense nets and transformers, short forms of `stack`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from ..context import ContextShape
from ..errors import InvflowError
from ..part import Part
from ..registry import register_net
from ..state import Shape, require_channels
from .activations import ACTIVATIONS, Activation
from .attention import Attention, Positions, TokenMLP
from .blocks import DenseBlock, ResidualBlock
from .layers import Convolution, Linear
from .norms import BatchNorm, Dropout, LayerNorm, Norm
from .sizes import OddInt, Probability
from .stack import Stack

Depth = Annotated[int, Field(gt=0, le=1000)]
_NORMS: dict[Norm, type[Part]] = {"batch": BatchNorm, "layer": LayerNorm}


@register_net("resnet")
class ResNet(Stack):
    """A residual net before activation: ``last(blocks(first(x)))`` with ``x + map(act(norm(map(act(norm(x))))))``.

    Use it in couplings of images that a plain `conv` cannot fit.

    The maps are convolutions, those of ``first`` and ``last`` of kernel 1; on vectors all are linear.

    Reference: He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks, 2016, https://arxiv.org/abs/1603.05027

    Args:
        in_shape: (channels, ...) of the input, without the batch.
        out_shape: likewise for the output.
        context_shape: (features,), or (channels, ...) with the input's positions.
        channels: the channels of the blocks.
        blocks: the number of blocks.
        kernel_size: the side of the kernels in the blocks, odd.
        norm: "batch" or "layer" normalisation before each activation.
        activation: the function before each map of a block.
        dropout: the probability of each number before the second map of a block to be dropped.
        zero_last: whether the last map starts at zero, so that the net is 0 until it is trained.

    Examples:
        >>> import torch
        >>> ResNet((2, 5, 5), (3, 5, 5), channels=8)(torch.zeros(1, 2, 5, 5)).shape
        torch.Size([1, 3, 5, 5])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        context_shape: ContextShape = None,
        channels: PositiveInt = 64,
        blocks: Depth = 2,
        kernel_size: OddInt = 3,
        norm: Norm | None = "batch",
        activation: Activation = "relu",
        dropout: Probability = 0.0,
        zero_last: bool = False,
    ) -> None:
        inside = Linear() if len(require_channels("resnet", in_shape)) == 1 else Convolution(kernel_size=kernel_size)
        before = [*([_NORMS[norm]()] if norm else []), ACTIVATIONS[activation]()]
        block = ResidualBlock(*before, inside, *before, *([Dropout(dropout)] if dropout else []), inside)
        super().__init__(
            Linear(channels),
            *[block] * blocks,
            Linear(),
            in_shape=in_shape,
            out_shape=out_shape,
            context_shape=context_shape,
            zero_last=zero_last,
        )


@register_net("densenet")
class DenseNet(Stack):
    """A dense net as in integer discrete flows: blocks that append ``channels`` in all, evenly, and a map.

    Use it in couplings of integer flows.

    A block is ``act(map(act(map_1(x))))``: a map of kernel 1 that keeps the channels, and one to those that it appends.
    The maps are convolutions; on vectors all are linear.

    Reference: Hoogeboom, Peters, van den Berg, Welling: Integer Discrete Flows and Lossless Compression, 2019,
    https://arxiv.org/abs/1905.07376

    Args:
        in_shape: (channels, ...) of the input, without the batch.
        out_shape: likewise for the output.
        context_shape: (features,), or (channels, ...) with the input's positions.
        channels: the channels that all blocks together append to the input.
        blocks: the number of blocks.
        kernel_size: the side of the kernels, odd.
        activation: the function after each map of a block.
        zero_last: whether the last map starts at zero, so that the net is 0 until it is trained.

    Raises:
        InvflowError: there are fewer channels to append than blocks.

    Examples:
        >>> import torch
        >>> DenseNet((2, 5, 5), (3, 5, 5), channels=8, blocks=2)(torch.zeros(1, 2, 5, 5)).shape
        torch.Size([1, 3, 5, 5])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        context_shape: ContextShape = None,
        channels: PositiveInt = 64,
        blocks: Depth = 4,
        kernel_size: OddInt = 3,
        activation: Activation = "relu",
        zero_last: bool = False,
    ) -> None:
        if channels < blocks:
            raise InvflowError(f"densenet expects a channel to append for each of {blocks} blocks, got {channels}")
        vectors = len(require_channels("densenet", in_shape)) == 1

        def mapped(to: int | None) -> Part:
            return Linear(to) if vectors else Convolution(to, kernel_size)

        act = ACTIVATIONS[activation]()
        growth = [(channels + block) // blocks for block in range(blocks)]  # the later ones append one more
        parts = [DenseBlock(Linear(), act, mapped(more), act) for more in growth]
        super().__init__(
            *parts,
            mapped(None),
            in_shape=in_shape,
            out_shape=out_shape,
            context_shape=context_shape,
            zero_last=zero_last,
        )


@register_net("transformer")
class Transformer(Stack):
    """A transformer whose tokens are the positions: ``last(norm(blocks(first(x) + positions)))``.

    Use it in couplings whose positions must see each other at any distance.

    A block is ``x + attention(norm(x))`` and then ``x + mlp(norm(x))``, with layer norm over the channels.

    Reference: Dosovitskiy et al.: An Image is Worth 16x16 Words, 2020, https://arxiv.org/abs/2010.11929

    Args:
        in_shape: (channels, ...) of the input, without the batch; it has positions.
        out_shape: likewise for the output.
        context_shape: (features,), or (channels, ...) with the input's positions.
        channels: the channels of the blocks.
        blocks: the number of blocks.
        heads: the heads of each attention, which divide the channels.
        expansion: the channels within the MLP, in units of those of the blocks.
        activation: the function within the MLP.
        dropout: the probability of each number within the MLP to be dropped.
        positions: whether learned positions are added first.
        zero_last: whether the last map starts at zero, so that the net is 0 until it is trained.

    Examples:
        >>> import torch
        >>> Transformer((2, 3, 3), (4, 3, 3), channels=8, heads=2)(torch.zeros(1, 2, 3, 3)).shape
        torch.Size([1, 4, 3, 3])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        context_shape: ContextShape = None,
        channels: PositiveInt = 64,
        blocks: Depth = 2,
        heads: PositiveInt = 4,
        expansion: PositiveInt = 4,
        activation: Activation = "gelu",
        dropout: Probability = 0.0,
        positions: bool = True,
        zero_last: bool = False,
    ) -> None:
        attention = ResidualBlock(LayerNorm(), Attention(heads))
        mlp = ResidualBlock(LayerNorm(), TokenMLP(expansion, activation, dropout))
        super().__init__(
            Linear(channels),
            *([Positions()] if positions else []),
            *[attention, mlp] * blocks,
            LayerNorm(),
            Linear(),
            in_shape=in_shape,
            out_shape=out_shape,
            context_shape=context_shape,
            zero_last=zero_last,
        )
