"""Multi-scale networks: what is done leaves the stream, and the rest goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ..bijection import Bijection
from ..context import Context
from ..errors import InvflowError, ShapeError
from ..numerics.modes import NONE, Level, Mode
from ..registry import register
from ..state import Shape, is_tensor_shape, shape_of, zero_log_det
from ..wires import Outcome, call
from .affine_coupling import AffineCoupling
from .split import Sizes, Split


@register("factor_out")
class FactorOut(Bijection):
    """Splits the last tensor of a state: ``(..., t) -> (..., done, goes_on)``; a single tensor becomes a pair.

    Use it in multi-scale flows, which are finished with a part of the numbers at each scale and so save time.

    Layers within an `on` then act on the last tensor, ``goes_on``, and so write each level of a multi-scale network. A
    pair comes back as a single tensor.

    With a net, what is done is standardised given what goes on, ``done -> exp(r) * done + t`` with
    ``(r, t) = net(goes_on)``, of log-determinant ``sum(r)``: under a standard normal prior it then has the conditional
    prior of mean ``-t exp(-r)`` and standard deviation ``exp(-r)``; if the shift comes first, as in Glow,
    ``done -> exp(r) * (done + t)``, the mean is ``-t``. In `grid` and `exact` numerics the numbers are left alone in
    either case, and a prior on the grid has the log-scale r and the mean t of each: see `invflow.models.Flow`.

    Reference: Dinh, Sohl-Dickstein, Bengio: Density estimation using Real NVP, 2016, https://arxiv.org/abs/1605.08803

    Args:
        goes_on: the part of the tensor that goes on: the "first" or the "second".
        sizes: the channels of the two parts, in the order in which they lie; halves by default, the first being the
            smaller one of an odd count.
        net: the conditioner, called with ``goes_on``, or with it and the context if there is one; it returns the shape
            of ``done`` with twice the channels, first r and then t.
        shift_first: whether what is done becomes ``exp(r) * (done + t)`` instead of ``exp(r) * done + t``.

    Raises:
        InvflowError: `shift_first` without a net.

    Examples:
        >>> FactorOut().output_shape((4, 2, 2)), FactorOut(goes_on="second").output_shape(((3,), (5, 2)))
        (((2, 2, 2), (2, 2, 2)), ((3,), (2, 2), (3, 2)))
    """

    examples = [
        ({}, (4, 2, 2)),
        ({"goes_on": "second", "sizes": [1, 3]}, ((2,), (4, 3))),
        ({"net": {"type": "conv", "hidden": [3]}}, (4, 3, 2)),
        ({"goes_on": "second", "net": {"type": "mlp"}, "shift_first": True}, ((2, 3), (5,))),
    ]
    cheap_inverse = True
    limit = NONE
    gathered_calls: ClassVar[tuple[str, ...]] = ("told",)

    def __init__(
        self,
        goes_on: Literal["first", "second"] = "first",
        sizes: Sizes | None = None,
        net: nn.Module | None = None,
        shift_first: bool = False,
    ) -> None:
        super().__init__()
        if shift_first and net is None:
            raise InvflowError(f"{self.tag} has shift_first with a net only: without one, nothing is shifted")
        self.goes_on = goes_on
        self.split = Split(sizes)
        self.coupling = None if net is None else AffineCoupling(net, scale="exp", shift_first=shift_first)

    @property
    def net(self) -> nn.Module | None:
        """The conditioner."""
        return None if self.coupling is None else self.coupling.net

    def forward(self, x: Any, context: Context = None) -> Any:
        return self._factored(x, context, log_det=False)[0]

    def inverse(self, y: Any, context: Context = None) -> Any:
        return self._restored(y, context, log_det=False)[0]

    def forward_and_log_det(self, x: Any, context: Context = None) -> tuple[Any, Tensor]:
        y, log_det = self._factored(x, context, log_det=True)
        return y, zero_log_det(y) if log_det is None else log_det

    def inverse_and_log_det(self, y: Any, context: Context = None) -> tuple[Any, Tensor]:
        x, log_det = self._restored(y, context, log_det=True)
        return x, zero_log_det(x) if log_det is None else log_det

    @classmethod
    def net_shapes(cls, shape: Shape, fields: Mapping[str, Any]) -> Mapping[str, tuple[Shape, Shape]]:
        """The conditioner maps what goes on to two numbers for each number that is done."""
        *_, done, goes_on = cls(fields["goes_on"], fields["sizes"]).output_shape(shape)
        return AffineCoupling.net_shapes((goes_on, done), {})

    def output_shape(self, shape: Shape) -> Shape:
        *others, last = (shape,) if is_tensor_shape(shape) else shape
        return (*others, *self._ordered(self.split.part_shapes(self.tag, last))[::-1])  # type: ignore[arg-type]

    def input_shape(self, shape: Shape) -> Shape:
        who = f"the inverse of {self.tag}"
        if is_tensor_shape(shape) or len(shape) < 2:
            raise ShapeError(f"{who} expects a tuple of at least two states, got shape {shape}")
        *others, done, goes_on = shape
        whole = self.split.whole_shape(who, self._ordered((goes_on, done)))
        return (*others, whole) if others else whole

    @property
    def exactness(self) -> Level:
        return "exact" if self._coupling is None else "float"

    def set_numerics(self, numerics: Mode) -> None:
        self.numerics = numerics

    def lipschitz_bounds(self) -> tuple[float, float]:
        return (1.0, 1.0) if self._coupling is None else super().lipschitz_bounds()

    @property
    def awaits_data(self) -> bool:
        return self.coupling is not None and self.coupling.awaits_data

    def initialize(self, x: Any, context: Context = None) -> None:
        if self._coupling is not None:
            last = x[-1] if isinstance(x, tuple) else x
            self._coupling.initialize(self._ordered(self.split.cut(self.tag, last)), context)

    @property
    def tells_the_prior(self) -> bool:
        """Whether the net's numbers are for the prior, because the layer leaves those of the state alone."""
        return self.coupling is not None and self.numerics.on_grid

    def told(self, goes_on: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """``(r, t)`` of what is done, given what goes on, for the prior."""
        assert self.coupling is not None
        r, t = self.coupling.conditioned(goes_on, context).chunk(2, dim=1)
        return r, t

    @property
    def _coupling(self) -> AffineCoupling | None:
        """The map of what is done, in real numbers; None if it stays unchanged."""
        return None if self.numerics.on_grid else self.coupling

    def _ordered(self, pair: tuple[Any, Any]) -> tuple[Any, Any]:
        """The first and the second part as what goes on and what is done, and the other way round."""
        return pair if self.goes_on == "first" else (pair[1], pair[0])

    def _factored(self, x: Any, context: Context, *, log_det: bool) -> Outcome:
        *others, last = x if isinstance(x, tuple) else (x,)
        goes_on, done = self._ordered(self.split.cut(self.tag, last))
        change = None
        if self._coupling is not None:
            (done, goes_on), change = call(self._coupling, (goes_on, done), context, log_det, False)
        return (*others, done, goes_on), change

    def _restored(self, y: Any, context: Context, *, log_det: bool) -> Outcome:
        if not isinstance(y, tuple) or len(y) < 2:
            self.input_shape(shape_of(y))
        *others, done, goes_on = y
        change = None
        if self._coupling is not None:
            (goes_on, done), change = call(self._coupling, (done, goes_on), context, log_det, True)
        whole = self.split.join(f"the inverse of {self.tag}", self._ordered((goes_on, done)))
        return ((*others, whole) if others else whole), change
