"""A flow as a distribution of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from ..context import Context, each_entry, rows_of
from ..errors import ShapeError
from ..state import is_tensor_shape

if TYPE_CHECKING:
    from .model import Flow

_INTERVALS: Mapping[str, Any] = {"positive": constraints.positive, "symmetric": constraints.interval(-1, 1)}  # type: ignore[no-untyped-call]
"""What a chain's domain says of the support. A logit has the domain "unit", and takes more if its alpha is not 0."""

_SCALAR = Size()


class FlowDistribution(Distribution):
    """See `invflow.Flow.distribution`, which returns it.

    Args:
        flow: the density.
        context: ``batch_shape + context_shape`` for any batch_shape; None for none.
        validate_args: as in torch.
        batch_shape: the leading dimensions of the context; by default the first one, or none without a context.

    Examples:
        >>> import torch, invflow
        >>> flow = invflow.build_model(
        ...     {"input": {"shape": [2]}, "layers": [{"type": "affine"}], "prior": {"type": "standard_normal"}}
        ... )
        >>> distribution = flow.distribution()
        >>> distribution.event_shape, distribution.log_prob(torch.zeros(3, 2)).shape
        (torch.Size([2]), torch.Size([3]))
    """

    def __init__(
        self,
        flow: Flow,
        context: Context = None,
        validate_args: bool | None = None,
        *,
        batch_shape: Sequence[int] | None = None,
    ) -> None:
        shape = flow.shape
        if not is_tensor_shape(shape):
            raise ShapeError(
                f"a distribution expects a flow over one tensor, got one over tuples of shape {shape}; begin its "
                "chain with a layer that takes one"
            )
        self.flow = flow
        self.context = context
        rows = () if context is None else (rows_of(context),)
        super().__init__(Size(rows if batch_shape is None else batch_shape), Size(shape), validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        return {"context": constraints.real} if isinstance(self.context, Tensor) else {}

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]  # a class attribute, which instances of torch replace too
        return self.flow.prior.reparametrized

    @property
    def support(self) -> constraints.Constraint:
        """The chain's domain if it is known, else the reals: there may be numbers in it whose density is 0."""
        interval = _INTERVALS.get(self.flow.bijection.domain, constraints.real)
        return constraints.independent(interval, len(self.event_shape))  # type: ignore[no-untyped-call]

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """The same distribution with another batch_shape, to which the present one broadcasts; nothing is copied."""
        batch = Size(batch_shape)
        if _broadcast(batch, self.batch_shape) != batch:
            raise ShapeError(f"a batch_shape of {tuple(self.batch_shape)} does not expand to {tuple(batch)}")
        return FlowDistribution(
            self.flow, self._context_of(batch), self.__dict__.get("_validate_args"), batch_shape=batch
        )

    def sample(self, sample_shape: Any = _SCALAR) -> Tensor:
        """Samples without gradients, ``sample_shape + batch_shape + event_shape``."""
        with torch.no_grad():
            return self._draw(sample_shape)

    def rsample(self, sample_shape: Any = _SCALAR) -> Tensor:
        """Samples, ``sample_shape + batch_shape + event_shape``, with gradients to the weights and the context.

        Raises:
            NotImplementedError: the prior chooses among components, which has no gradient.
        """
        if not self.has_rsample:
            raise NotImplementedError(
                f"rsample expects a prior that is reparametrized, got {type(self.flow.prior).__name__}; use sample"
            )
        return self._draw(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of each event in nats; the leading dimensions of the value and the batch_shape broadcast."""
        if self._validate_args:
            self._validate_sample(value)
        before = value.shape[: value.dim() - len(self.event_shape)]
        batch = _broadcast(before, self.batch_shape)
        # One row of context is for all samples; it needs no copies.
        rows = self.batch_shape if self.batch_shape.numel() == 1 else batch
        context = self._rows(self._context_of(rows), rows)
        x = value.expand(batch + self.event_shape).reshape(-1, *self.event_shape)
        return self.flow.log_prob(x, context).reshape(batch)

    def _draw(self, sample_shape: Any) -> Tensor:
        wanted = self._extended_shape(sample_shape)
        count = math.prod(sample_shape)
        if self.context is None:
            drawn: Tensor = self.flow.sample(count * self.batch_shape.numel())
        else:
            drawn = self.flow.sample(count, self._rows(self._context_of(self.batch_shape), self.batch_shape))
        return drawn.reshape(wanted)

    def _context_of(self, batch: Size) -> Any:
        """The context, expanded to a batch_shape."""
        before = len(self.batch_shape)
        return each_entry(lambda entry: entry.expand(batch + entry.shape[before:]), self.context)

    def _rows(self, context: Context, batch: Size) -> Any:
        """A context with its batch_shape flattened into one dimension."""
        return each_entry(lambda entry: entry.reshape(-1, *entry.shape[len(batch) :]), context)


def _broadcast(*shapes: Size) -> Size:
    """The shape that they broadcast to. Raises ShapeError."""
    try:
        return torch.broadcast_shapes(*shapes)  # type: ignore[no-any-return, no-untyped-call]
    except RuntimeError as error:
        came = " and ".join(str(tuple(shape)) for shape in shapes)
        raise ShapeError(f"a distribution expects shapes that broadcast, got {came}") from error
