"""An autoregressive layer of tokens: TarFlow's block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..context import Context, ContextShape
from ..errors import ShapeError
from ..nets.attention import SelfAttention
from ..nets.causal import CausalTransformer
from ..nets.contract import Stepwise
from ..numerics.backend import own_precision
from ..registry import register
from ..solvers import solve_triangular
from ..state import Shape, TensorShape, require_positions
from .affine_coupling import CLAMP, Scaled
from .autoregressive import AutoregressiveLayer, Solver

Order: TypeAlias = Literal["identity", "reverse"]

_SCORE = 64
"""The operations that a score of attention counts as, because a check needs memory for it."""

_SETTLED = 16
"""A token has settled if it changes by at most this, in units of eps times its largest number. Of random nets of 4
layers, the roundings of the sums change it by 3 to 13, again and again, although all but the roundings is right."""


def _rounding(x: Tensor) -> Tensor:
    return _SETTLED * x.abs().amax(1, keepdim=True)


@register("transformer_autoregressive")
class TransformerAutoregressive(Scaled, AutoregressiveLayer):
    """``z_i = (x_i - mu_i) * exp(-alpha_i)``, where the net makes alpha and mu of the tokens before i: TarFlow's block.

    Use it for densities of images in patches, where samples may take longer.

    The tokens are the positions in raster order, each a vector of the channels; a `psi` before with the layout
    "channel" turns square patches of an image into them. ``(alpha_i, mu_i)`` is the net's output for token i - 1, which
    depends on the tokens up to this one, and on the context; the first token stays as it is. An alpha ends at -10 and
    10. The log-determinant is ``-sum(alpha)``, exact both ways.

    The inverse is the slow direction: the forward, and so a density, takes one evaluation of the net; for a sample the
    tokens depend on each other.

    - "jacobi" changes all tokens at once, from those of the last step, and ends when none changes beyond rounding:
      after at most as many evaluations of the net as there are tokens, and often long before;
    - "sequential" makes one token after the other. With a net such as `causal_transformer`, which keeps the keys and
      values of earlier tokens, all of them together take about as many operations as one evaluation, in many small
      steps; with another net, one evaluation for each token.

    In `grid` and `exact` numerics the layer is refused, as all that scale.

    Reference: Zhai et al.: Normalizing Flows are Capable Generative Models, 2024, https://arxiv.org/abs/2412.06329

    Args:
        net: a causal net, such as `causal_transformer`, or any module that is one: called with x, or with x and the
            context if there is one; it returns alpha for all channels, and then mu. With a method `step` it is a
            `Stepwise` net, whose inverse is faster.
        order: "identity", or "reverse": the last token is the first one. Layers of a flow alternate.
        solver: the method for the inverse.
        shape: the incoming shape, ``(channels, *positions)``.
        context_shape: likewise for the context.

    Raises:
        ShapeError: the net is not causal: an output depends on a later token; or there is no token.

    Examples:
        >>> from invflow.nets import CausalTransformer
        >>> layer = TransformerAutoregressive(CausalTransformer((4, 3, 3), (8, 3, 3)), shape=(4, 3, 3)).double()
        >>> x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
        >>> bool((layer.inverse(layer(x)) - x).abs().max() < 1e-12)
        True
        >>> TransformerAutoregressive(torch.nn.Conv1d(1, 2, 3, padding=1), shape=(1, 9))
        Traceback (most recent call last):
        invflow.errors.ShapeError: transformer_autoregressive expects a net whose outputs for a token depend on the \
tokens up to it alone, got Conv1d, whose output for token 0 depends on token 1 (counted from 0); use causal_transformer
    """

    proven = frozenset({CausalTransformer})
    may_be_flat = True  # of a huge token the rounding of a small one before it decides: attention tells them apart
    examples = [
        ({"net": {"type": "causal_transformer", "channels": 4, "blocks": 1, "heads": 2}}, (2, 4)),
        (
            {"net": {"type": "causal_transformer", "channels": 6, "heads": 1, "expansion": 2}, "order": "reverse"},
            (3, 2, 2),
        ),
        (
            {"net": {"type": "causal_transformer", "channels": 4, "blocks": 2, "heads": 2}, "solver": "sequential"},
            (1, 2, 3),
        ),
    ]

    def __init__(
        self,
        net: nn.Module,
        shape: Shape,
        context_shape: ContextShape = None,
        order: Order = "identity",
        solver: Solver = "jacobi",
    ) -> None:
        super().__init__(net, 2, solver, shape, context_shape)
        self.order = order
        self._set_scale(CLAMP, "exp", 0.0, shift_first=True)

    @property
    def _work(self) -> int:
        # A token meets each weight, and in attention each token: twice with all channels, for scores and for means.
        found = [part for part in self.net.modules() if isinstance(part, SelfAttention)]
        each = sum(2 * part.out.in_features + _SCORE * part.heads for part in found)
        return self.elements * (super()._work + self.elements * each)

    def _solve(self, step: Callable[[Tensor], Tensor], start: Tensor, what: str) -> Tensor:
        return solve_triangular(step, start, self.elements, what, _rounding)

    def _scale_and_shift(self, made: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = super()._scale_and_shift(made)
        return -log_scale, -shift

    def _called(self, x: Tensor, context: Context) -> Tensor:
        """What the net says of each token: its output for the one before, and zeros for the first."""
        made = super()._called(self._turned(x), context).flatten(2)
        return self._in_place(functional.pad(made[:, :, :-1], (1, 0)))

    def _made_of(self, i: int, x: Tensor, context: Context, past: Any) -> tuple[Tensor, Any]:
        if not isinstance(self.net, Stepwise):
            return super()._made_of(i, x, context, past)
        if i == 0:
            return x.new_zeros(len(x), 2 * self.shape[0]), None
        with own_precision(x):
            made, past = self.net.step(x[:, :, i - 1 : i], self.for_net(context), past)
        return made[:, :, 0].to(x.dtype), past

    @classmethod
    def _extents(cls, shape: Shape) -> TensorShape:
        extents = require_positions(cls.tag, shape)
        if 0 in extents:
            raise ShapeError(f"{cls.tag} expects at least one token of at least one channel, got {extents}")
        return extents

    def _turned(self, x: Tensor) -> Tensor:
        """The tokens in their order, or back in their places."""
        return x.flip(tuple(range(2, x.dim()))) if self.order == "reverse" else x

    def _in_order(self, x: Tensor) -> Tensor:
        return self._turned(x).flatten(2)

    def _in_place(self, x: Tensor) -> Tensor:
        return self._turned(torch.unflatten(x, 2, self.shape[1:]))
