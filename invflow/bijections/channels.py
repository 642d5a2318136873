"""What layers of a fixed number of channels share."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from ..bijection import Bijection
from ..context import Context
from ..state import Shape, TensorShape, require_channels, shape_of


class OfChannels(Bijection):
    """A layer of a fixed number of channels that keeps the shape, at any positions.

    Attributes:
        channels: their number.

    Args:
        shape: the incoming shape, channels first.
    """

    cheap_inverse = True

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.channels = require_channels(self.tag, shape)[0]

    def require(self, x: Tensor) -> None:
        """Raises ShapeError if the layer does not take a tensor: a quick test that runs in every call."""
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[1] != self.channels:
            self.output_shape(shape_of(x))

    def output_shape(self, shape: Shape) -> TensorShape:
        return require_channels(self.tag, shape, self.channels)

    def input_shape(self, shape: Shape) -> TensorShape:
        return self.output_shape(shape)


class PerPosition(OfChannels):
    """One whose log-determinant depends on the weights alone and is the same at every position."""

    @abstractmethod
    def log_abs_det(self) -> Tensor:
        """The log-determinant at one position, a single number."""

    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return self(x, context), everywhere(self.log_abs_det(), x)

    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return self.inverse(y, context), -everywhere(self.log_abs_det(), y)


def everywhere(log_abs_det: Tensor, x: Tensor) -> Tensor:
    """The log-determinant of a map that is the same at all positions of x, ``(batch,)``, from that at one."""
    return (x.shape[2:].numel() * log_abs_det).to(x.dtype).expand(x.shape[0])


def spread(per_channel: Tensor, x: Tensor) -> Tensor:
    """One number per channel, reshaped to broadcast over the positions of x."""
    return per_channel.reshape(-1, *(1,) * (x.dim() - 2))
