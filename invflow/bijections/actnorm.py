"""Scales and shifts per channel that come from data: ActNorm, which is learned from there, and constants."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from .._torch import in_shards, transforms_active, version
from ..context import Context
from ..errors import InvflowError, NumericsError, ShapeError
from ..part import Made, Part
from ..registry import register, register_part
from ..state import Shape, TensorShape, shape_of
from .affine import ScaleAndShift

Numbers: TypeAlias = Annotated[list[float], Field(min_length=1)]
Positives: TypeAlias = Annotated[list[PositiveFloat], Field(min_length=1)]

_ALL = 0.999
"""An average share of at least this is one of ones, which were rounded."""


class _FromData(ScaleAndShift):
    """The base of layers whose scale and shift `initialize` sets so that y has mean 0 and variance 1."""

    initialized: Tensor
    shift: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        # A float, 0 or 1, and a boolean in the state_dict: an average with buffers tells which part of it was set.
        self.register_buffer("initialized", torch.zeros(()))
        self._was_set = False  # here, not by one who wrote into the tensors
        self.register_state_dict_post_hook(_to_boolean)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_from_boolean)  # type: ignore[no-untyped-call]

    @property
    def awaits_data(self) -> bool:
        return not (self._was_set or self._was_copied())

    def train(self, mode: bool = True) -> Any:
        """Sets the mode, and refuses an average that began before `initialize`."""
        _ = self.awaits_data
        return super().train(mode)

    def require(self, x: Tensor) -> None:
        # To read a number of another device would take long: there, only `train` does it.
        unknown = not self._was_set and self.initialized.is_cpu
        if unknown and not (torch.compiler.is_compiling() or transforms_active()):
            self._was_copied()
        super().require(x)

    def _was_copied(self) -> bool:
        """Whether scale and shift were copied from an initialized layer, as DDP does.

        Raises:
            InvflowError: they may be an average over layers before and after `initialize`.
        """
        share = 0.0 if self.initialized.is_meta else float(self.initialized)
        if not share > 0:  # or NaN, after `to_empty`
            return False
        if share < _ALL or (self.learned and version(self.log_scale) > 1):  # buffers are averaged as the share is
            raise InvflowError(
                f"{self.tag} is a copy made before initialize that was averaged with layers initialized since; begin "
                "to average after initialize"
            )
        self._was_set = True
        return True

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Context = None) -> None:
        """Sets scale and shift from a batch, once: a second call changes nothing, after loading either.

        A channel that is constant in the batch is only shifted; in a batch of one vector every channel is. Constant is
        what differs by no more than rounding: a standard deviation of at most eps times the mean, or a subnormal one.

        Raises:
            ShapeError: the batch is empty or has another number of channels.
            NumericsError: the batch is not finite. The layer stays uninitialised.
        """
        self.output_shape(shape_of(x))
        if not self.awaits_data:
            return
        if in_shards(self):  # what is written into gathered weights is lost with them
            raise InvflowError(f"{self.tag} is sharded already; initialize the chain, then call fully_shard")
        if not x.shape[0]:
            raise ShapeError(f"{self.tag} expects a batch of at least one sample to initialize from, got none")
        values = x.movedim(1, 0).flatten(1).cpu().double()  # a device may have no float64
        if spoilt := (~values.isfinite().all(1)).nonzero().flatten().tolist():
            raise NumericsError(
                f"{self.tag} expects finite numbers to initialize from, got NaN or Inf in {len(spoilt)} of "
                f"{self.channels} channels, first in channel {spoilt[0]}; remove those samples"
            )
        # In units of the largest number no square over- or underflows, and a channel of equal numbers is one of ones.
        unit = values.abs().amax(1).clamp(min=torch.finfo(torch.float64).tiny)
        scaled = values / unit[:, None]
        mean = scaled.mean(1)
        deviation = (scaled - mean[:, None]).square().mean(1).sqrt()
        rounding = torch.finfo(x.dtype)
        constant = (deviation <= rounding.eps * mean.abs()) | (deviation * unit < rounding.tiny)
        self._set(mean * unit, (deviation * unit).masked_fill(constant, 1.0))

    @torch.no_grad()
    def _set(self, mean: Tensor, deviation: Tensor) -> None:
        """Sets scale and shift from float64 numbers, one per channel."""
        self.log_scale.copy_(-deviation.log())
        # By the scale as it was rounded: its error, times a large mean, would be a shift.
        self.shift.copy_(-mean * self.log_scale.exp().to(mean))
        self.initialized.fill_(1)
        self._was_set = True


@register("actnorm")
class ActNorm(_FromData):
    """``y = exp(log_scale) * x + shift`` per channel, set by `initialize` so that y has mean 0 and variance 1.

    Use it between couplings of a deep flow, where batch norm would make samples depend on each other.

    It is the identity before `initialize`, and learned afterwards. The log-determinant is
    ``height * width * sum(log_scale)``.

    Reference: Kingma, Dhariwal: Glow, 2018, https://arxiv.org/abs/1807.03039

    Args:
        shape: the incoming shape, channels first.

    Examples:
        >>> norm = ActNorm(shape=(2,))
        >>> x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> norm.initialize(x)
        >>> norm(x).tolist()
        [[-1.0, 0.0], [1.0, 0.0]]
    """

    examples = [({}, (3,)), ({}, (2, 3, 2))]


@register("standardize")
class Standardize(_FromData):
    """``y = (x - mean) / std`` per channel, with constants that come from data: nothing is learned.

    Use it first in a chain, for columns or pixels in units of their own.

    The constants are given, or set once by `initialize`, which is how ActNorm sets its own; before that it is the
    identity. For a table, channels are its columns; of an image, all pixels of a channel have the same mean. The
    log-determinant is ``-height * width * sum(log(std))``. It is stored as ``y = exp(log_scale) * x + shift``.

    Args:
        mean: one number for each channel, given together with ``std``; null if `initialize` shall set both.
        std: likewise, positive.
        shape: the incoming shape, channels first.

    Raises:
        InvflowError: the mean without the standard deviation, or the other way round.
        ShapeError: their number is not that of the channels.

    Examples:
        >>> Standardize(mean=[5.0, 0.0], std=[2.0, 0.5], shape=(2,))(torch.tensor([[7.0, 1.0]])).tolist()
        [[1.0, 2.0]]
    """

    learned = False
    examples = [({}, (3,)), ({"mean": [0.5, -2.0, 100.0], "std": [0.25, 3.0, 10.0]}, (3, 4, 2))]

    def __init__(self, mean: Numbers | None = None, std: Positives | None = None, *, shape: Shape) -> None:
        super().__init__(shape)
        if mean is None and std is None:
            return
        if mean is None or std is None:
            given = "std" if mean is None else "mean"
            raise InvflowError(f"{self.tag} expects both a mean and a std, or neither, got a {given} alone")
        for name, numbers in (("mean", mean), ("std", std)):
            if len(numbers) != self.channels:
                raise ShapeError(
                    f"{self.tag} expects a {name} for each of {self.channels} channels, got {len(numbers)}"
                )
        self._set(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))


def _to_boolean(module: _FromData, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Runs when a state_dict is made."""
    _ = module.awaits_data  # refuses a mixture
    state_dict[f"{prefix}initialized"] = state_dict[f"{prefix}initialized"] > 0.5


def _from_boolean(module: _FromData, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Runs before a load. An average of booleans, a number, is a share too."""
    if (key := f"{prefix}initialized") in state_dict:
        share = state_dict[key]
        module._was_set = not share.is_meta and float(share) > _ALL
        state_dict[key] = share.to(state_dict.get(f"{prefix}log_scale", module.log_scale).dtype)


@register_part("actnorm")
class ActNormPart(Part):
    """`ActNorm` within a net, such as those of Glow: scales and shifts each channel, initialised from data."""

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        return ActNorm(shape), shape
