"""A transformer each of whose tokens sees those up to itself alone: the net of TarFlow."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from ..context import Context, ContextShape, entries
from ..errors import ShapeError
from ..registry import register_net
from ..state import Shape, flat_size, require_positions
from .activations import ACTIVATIONS, Activation
from .attention import Past, SelfAttention
from .deep import Depth
from .sizes import require_built_for, shape_with_context

SPREAD = 0.01
"""The standard deviation that the positions, and the weights of the context, start with."""


class CausalBlock(nn.Module):
    """``x + attention(norm(x))`` and then ``x + mlp(norm(x))`` on tokens ``(batch, tokens, channels)``."""

    def __init__(self, channels: int, heads: int, expansion: int, activation: Activation) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = SelfAttention(channels, heads, causal=True, bias=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, expansion * channels),
            ACTIVATIONS[activation]().module(),
            nn.Linear(expansion * channels, channels),
        )

    def forward(self, tokens: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        mixed, past = self.attention.of_tokens(self.norm(tokens), past)
        tokens = tokens + mixed
        return tokens + self.mlp(tokens), past


@register_net("causal_transformer")
class CausalTransformer(nn.Module):
    """``last(blocks(first(x) + positions + map(context)))`` on the positions, in raster order, as tokens: TarFlow's.

    Use it in a `transformer_autoregressive` layer.

    The outputs for a token depend on the tokens up to it alone. A block is ``x + attention(norm(x))`` and then
    ``x + mlp(norm(x))``, with layer norm over the channels. The context, flattened, is added to each token by a map
    without a bias, which for one-hot classes is an embedding of them; it is one for each sample, or one for all. The
    weights of ``last`` start at 0, so that the net starts as a constant.

    Unlike `transformer`, it has no norm before ``last``.

    Reference: Zhai et al.: Normalizing Flows are Capable Generative Models, 2024, https://arxiv.org/abs/2412.06329

    Args:
        in_shape: (channels, ...) of the input, without the batch; it has positions.
        out_shape: likewise for the output.
        context_shape: the shape of the context.
        channels: the channels of the blocks.
        blocks: the number of blocks.
        heads: the heads of each attention, which divide the channels.
        expansion: the channels within the MLP, in units of those of the blocks.
        activation: the function within the MLP.

    Raises:
        ShapeError: the output has other positions, there is one channel, or the heads do not divide the channels.

    Examples:
        >>> net = CausalTransformer((2, 3, 3), (4, 3, 3), channels=8, heads=2)
        >>> net(torch.zeros(1, 2, 3, 3)).shape
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
    ) -> None:
        super().__init__()
        self.in_shape, (made, *positions) = (
            require_positions("causal_transformer", shape) for shape in (in_shape, out_shape)
        )
        if list(self.in_shape[1:]) != positions:
            raise ShapeError(f"causal_transformer keeps the positions of {self.in_shape}, but must return {out_shape}")
        if channels < 2 or channels % heads:
            raise ShapeError(
                f"causal_transformer with {heads} heads expects channels, at least 2, that it divides, got {channels}"
            )
        self.context_shape = context_shape
        self.first = nn.Linear(self.in_shape[0], channels)
        self.positions = nn.Parameter(SPREAD * torch.randn(flat_size((1, *positions)), channels))
        self.context = None
        if context_shape is not None:
            (features,) = shape_with_context("causal_transformer", (0,), context_shape)
            self.context = nn.Linear(features, channels, bias=False)
            nn.init.normal_(self.context.weight, std=SPREAD)
        self.blocks = nn.ModuleList(CausalBlock(channels, heads, expansion, activation) for _ in range(blocks))
        self.last = nn.Linear(channels, made)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        if x.shape[1:] != self.in_shape:
            raise ShapeError(f"causal_transformer expects the shape {self.in_shape}, got {tuple(x.shape[1:])}")
        return torch.unflatten(self.step(x.flatten(2), context)[0], 2, self.in_shape[1:])

    def step(self, x: Tensor, context: Context = None, past: list[Past] | None = None) -> tuple[Tensor, list[Past]]:
        """The outputs for the tokens that come next, and the past of those after them: see `Stepwise`."""
        require_built_for("causal_transformer", context, self.context_shape)
        before = past[0][0].shape[2] if past else 0
        tokens = self.first(x.transpose(1, 2)) + self.positions[before : before + x.shape[2]]
        if self.context is not None and context is not None:
            flat = torch.cat([entry.flatten(1) for entry in entries(context)], dim=1)
            tokens = tokens + self.context(flat)[:, None]
        now = []
        for place, block in enumerate(self.blocks):
            tokens, kept = block(tokens, past[place] if past else None)
            now.append(kept)
        return self.last(tokens).transpose(1, 2), now
