"""What stands between two invertible trunks, or before the first: a net, which has no inverse."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn

from ..bijection import Bijection
from ..context import Context
from ..errors import ShapeError
from ..nets.contract import Conditioned
from ..nets.stack import make_all
from ..numerics.modes import Limit
from ..part import Part
from ..registry import register
from ..state import Shape, TensorShape, require_channels, require_state


@register("joint")
class Joint(Conditioned, Bijection):
    """A net made of parts, ``y = part_n(... part_1(x))``, that a state passes between two trunks. It has no inverse.

    Use it for what a published network has between two trunks: pooling, or more channels.

    RevNets embed the image before the first of their stages, and pool and widen between them; reversible vision
    transformers embed patches. What lies below a joint cannot be recovered, and every call of an inverse refuses to
    pass it. What lies between two is a trunk of its own: it runs backwards, is checked, and trains in constant memory,
    for which the inputs of the joints are kept. A chain with a joint has no log-determinant, so it belongs below a
    head, not a prior. The entry ``"stem"`` of a spec is a joint before all layers.

    Reference: Gomez, Ren, Urtasun, Grosse: The Reversible Residual Network, 2017, https://arxiv.org/abs/1707.04585

    Args:
        *parts: the parts, first applied first; a part that chooses its number of channels keeps those of its input
            unless it names another.
        shape: the incoming shape, ``(channels, ...)``.

    Raises:
        ShapeError: a part does not fit, or an inverse is called.

    Examples:
        >>> import torch
        >>> from invflow.nets.pooling import AveragePool, PadChannels
        >>> joint = Joint(AveragePool(), PadChannels(2), shape=(2, 4, 4))
        >>> joint(torch.ones(1, 2, 4, 4)).shape
        torch.Size([1, 4, 2, 2])
        >>> joint.inverse(torch.ones(1, 4, 2, 2))
        Traceback (most recent call last):
        invflow.errors.ShapeError: joint has no inverse; only the layers between joints run backwards
    """

    invertible = False
    surjective = False
    limit = Limit("float", "it has no inverse")
    codomain = None
    examples = [
        ({"parts": [{"type": "conv", "channels": 5, "stride": 2}, {"type": "batch_norm"}]}, (2, 5, 4)),
        ({"parts": [{"type": "average_pool"}, {"type": "pad", "channels": 2}]}, (2, 4, 4)),
        ({"parts": [{"type": "linear", "channels": 2}]}, (3,)),
    ]

    def __init__(self, *parts: Part, shape: Shape) -> None:
        super().__init__()
        self.shape = require_channels(self.tag, shape)
        modules, self.made_shape = make_all(parts, self.shape, None)
        self.net = nn.Sequential(*modules)

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        require_state(self.tag, self.shape, None, x)
        return self.net(x).to(x.dtype)  # type: ignore[no-any-return]

    def inverse(self, y: Any, context: Context = None) -> NoReturn:
        """Raises ShapeError: there is none."""
        raise ShapeError(f"{self.tag} has no inverse; only the layers between joints run backwards")

    def forward_and_log_det(self, x: Any, context: Context = None) -> NoReturn:
        """Raises ShapeError: there is no log-determinant."""
        raise ShapeError(f"{self.tag} has no inverse, so it has no log-determinant; use it below a head, not a prior")

    def inverse_and_log_det(self, y: Any, context: Context = None) -> NoReturn:
        """Raises ShapeError: there is none."""
        self.inverse(y)

    def output_shape(self, shape: Shape) -> TensorShape:
        if shape != self.shape:
            raise ShapeError(f"{self.tag} expects the shape {self.shape}, got {shape}")
        return self.made_shape

    def input_shape(self, shape: Shape) -> NoReturn:
        """Raises ShapeError: there is no inverse."""
        self.inverse(None)
