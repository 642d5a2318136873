"""Maps that are wrong only for some inputs: large batches, images that are not square, train mode."""

from __future__ import annotations

import torch

from invflow import Bijection

from .base import PAIR, Affinely, ImageScale, Scale, fault

SQUARE = (2, 4, 4)


@fault("large batch")
class LargeBatches(Scale):
    """The inverse loses samples after the 64th."""

    def inverse(self, y, context=None):
        x = super().inverse(y)
        return torch.cat([x[:64], x[64:] + 0.1])


@fault("large batch", PAIR)
class LogDetOfLargeBatches(Affinely):
    """The log-determinants of a batch above 32 are their mean, in both directions."""

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y, log_det if len(log_det) <= 32 else log_det.mean().expand_as(log_det)

    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y, context)
        return x, log_det if len(log_det) <= 32 else log_det.mean().expand_as(log_det)


@fault("round trip")
class LargeBatchesInTrainMode(Scale):
    """In train mode the inverse of a batch above 32 is off."""

    def inverse(self, y, context=None):
        return super().inverse(y) + (self.training and len(y) > 32)


@fault("round trip", SQUARE)
class RowsAndColumns(Bijection):
    """The rows are rolled by the number of columns when inverted."""

    volume_preserving = True

    def forward(self, x, context=None):
        return x.roll(x.shape[2] - 1, 2)

    def inverse(self, y, context=None):
        return y.roll(1 - y.shape[3], 2)


@fault("log det", SQUARE)
class LogDetOfSquares(ImageScale):
    """The log-determinant counts the positions as the height squared."""

    def __init__(self):
        super().__init__()

    def _log_det(self, x):
        return (self.log_scale.sum() * x.shape[2] ** 2).to(x.dtype).expand(x.shape[0])


@fault("log det")
class LogDetInTrainMode(Scale):
    """In train mode the log-determinants are off, in both directions."""

    def _log_det(self, x):
        return super()._log_det(x) * (1.1 if self.training else 1.0)


@fault("inverse log det", PAIR)
class InverseLogDetInTrainMode(Affinely):
    """In train mode the inverse's log-determinant is averaged over the batch."""

    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y, context)
        return x, log_det.mean().expand_as(log_det) if self.training else log_det
