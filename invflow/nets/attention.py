"""Parts of transformers, whose tokens are the positions: attention, token MLP, learned positions."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ..errors import ShapeError
from ..part import Made, Part
from ..registry import register_part
from ..state import TensorShape, require_positions
from .activations import ACTIVATIONS, Activation
from .layers import Linear
from .sizes import Probability
from .stack import make_all

Past: TypeAlias = tuple[Tensor, Tensor]
"""The keys and the values of the tokens before, each ``(batch, heads, tokens, channels of a head)``."""


class SelfAttention(nn.Module):
    """Multi-head self-attention between the positions of ``(batch, channels, *positions)``."""

    def __init__(self, channels: int, heads: int, *, causal: bool, bias: bool) -> None:
        super().__init__()
        self.queries_keys_values = nn.Linear(channels, 3 * channels, bias=bias)
        self.out = nn.Linear(channels, channels, bias=bias)
        self.heads = heads
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.of_tokens(x.flatten(2).transpose(1, 2))
        return mixed.transpose(1, 2).reshape(x.shape)

    def of_tokens(self, tokens: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """The result for tokens, ``(batch, tokens, channels)``, and the past of those that follow them.

        Args:
            tokens: some tokens.
            past: that of the tokens before, which causal attention sees too; None if there are none.
        """
        # (3, batch, heads, tokens, channels of a head)
        parts = self.queries_keys_values(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts
        if past is not None:
            keys, values = (torch.cat(both, dim=2) for both in zip(past, (keys, values), strict=True))
        # In plain operations, because the fused ones can neither be differentiated twice nor mapped by torch.func.
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.mT
        if self.causal and scores.shape[-2] > 1:
            new, all_of_them = scores.shape[-2:]
            later = torch.ones(new, all_of_them, dtype=torch.bool, device=tokens.device).triu(1 + all_of_them - new)
            scores = scores.masked_fill(later, -math.inf)
        mixed = scores.softmax(-1) @ values
        return self.out(mixed.transpose(1, 2).flatten(2)), (keys, values)


@register_part("attention")
class Attention(Part):
    """Self-attention between the positions, each of which is a token with its channels.

    ``softmax(q k' / sqrt(size)) v`` for each head, with ``(q, k, v)`` and the result linear maps of the channels.

    Reference: Vaswani et al.: Attention Is All You Need, 2017, https://arxiv.org/abs/1706.03762

    Args:
        heads: the number of heads, which divides the channels.
        causal: whether a token sees only itself and those before it, in the order of the flattened positions.
        bias: whether the linear maps have one.
    """

    def __init__(self, heads: PositiveInt = 4, causal: bool = False, bias: bool = True) -> None:
        self.heads = heads
        self.causal = causal
        self.bias = bias

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        channels, *_ = require_positions(self.tag, shape)
        if channels % self.heads:
            raise ShapeError(f"{self.tag} with {self.heads} heads expects channels that it divides, got {channels}")
        return SelfAttention(channels, self.heads, causal=self.causal, bias=self.bias), shape


@register_part("token_mlp")
class TokenMLP(Part):
    """A linear map to more channels, an activation, and a linear map back, at every position alike.

    Args:
        expansion: the channels between the two maps, in units of those of the input.
        activation: the function between the maps.
        dropout: the probability of each number between the maps to be dropped.
    """

    def __init__(self, expansion: PositiveInt = 4, activation: Activation = "gelu", dropout: Probability = 0.0) -> None:
        self.expansion = expansion
        self.activation = activation
        self.dropout = dropout

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        between = ACTIVATIONS[self.activation]()
        modules, made = make_all([Linear(self.expansion * shape[0]), between, Linear(shape[0])], shape, None)
        modules[2:2] = [nn.Dropout(self.dropout)] if self.dropout else []
        return nn.Sequential(*modules), made


class AddPositions(nn.Module):
    """``x + positions``, with learned positions."""

    def __init__(self, shape: TensorShape, spread: float) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(shape))
        nn.init.normal_(self.positions, std=spread)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions


@register_part("positions")
class Positions(Part):
    """``x + p`` with a learned p for each position and channel, so that attention knows where its tokens are.

    Args:
        spread: the standard deviation that p starts with.
    """

    def __init__(self, spread: PositiveFloat = 0.02) -> None:
        self.spread = spread

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        return AddPositions(require_positions(self.tag, shape), self.spread), shape
