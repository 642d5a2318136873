"""The general net: a list of parts, whose shapes are inferred."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..context import Context, ContextShape
from ..errors import InvflowError, ShapeError
from ..part import Made, Part
from ..registry import nets, register_net
from ..state import Shape, TensorShape, flat_size, require_channels
from .sizes import averages_context, shape_with_context, with_context


@register_net("stack")
class Stack(nn.Sequential):
    """Parts, one after another: ``net(x) = part_n(... part_1(x))``. Shapes are inferred along the list.

    Use it for any net that has no name of its own here.

    The last part that chooses its number of channels, such as a convolution, returns those that the net must return; if
    it is a `linear` on a vector, the vector is reshaped to ``out_shape``. The context becomes further channels of the
    input; a vector is spread over all positions.

    In Python it holds the modules that the parts make, as an `nn.Sequential`.

    Args:
        *parts: the parts, first applied first.
        in_shape: (channels, ...) of the input, without the batch.
        out_shape: likewise for the output.
        context_shape: (features,), or (channels, ...) with the input's positions.
        zero_last: whether the last part that chooses its channels starts at zero, so that the net is 0 until it is
            trained.

    Attributes:
        context_features: the number of channels at the end of the input that belong to the context.
        obstacle: why no part list like this can be converted for `exact` numerics; None if no part stands in the way.

    Raises:
        ShapeError: a part does not fit, or the net returns another shape; with the place of the part.

    Examples:
        >>> import torch
        >>> from invflow.nets.layers import Convolution
        >>> from invflow.nets.activations import Relu
        >>> net = Stack(Convolution(8), Relu(), Convolution(), in_shape=(2, 5, 5), out_shape=(3, 5, 5))
        >>> net(torch.zeros(1, 2, 5, 5)).shape
        torch.Size([1, 3, 5, 5])
    """

    def __init__(
        self,
        *parts: Part,
        in_shape: Shape,
        out_shape: Shape,
        context_shape: ContextShape = None,
        zero_last: bool = False,
    ) -> None:
        who = nets.name_of(type(self))
        start, end = (require_channels(who, shape) for shape in (in_shape, out_shape))
        widened = shape_with_context(who, start, context_shape)
        try:
            modules, shape = make_all(parts, widened, end)
        except InvflowError as error:
            if type(self) is not Stack:
                error.place = ()  # a short form has no list of parts
            raise
        if shape not in (end, (flat_size(end),)):
            raise ShapeError(f"{who} must map {in_shape} to {out_shape}, but returns {shape}")
        super().__init__(*modules)
        self.out_shape = end
        self.context_shape = context_shape
        self.context_features = widened[0] - start[0]
        self.obstacle = next((part.obstacle for part in parts if part.obstacle), None)
        if averages_context(start, context_shape):
            self.obstacle = "its context is averaged over positions, in floating point"
        self._name = who
        if zero_last:
            start_at_zero(parts, modules)

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        made: Tensor = super().forward(with_context(self._name, x, context, self.context_shape))  # type: ignore[no-untyped-call]
        return made if made.dim() > 2 or len(self.out_shape) == 1 else made.reshape(-1, *self.out_shape)


def make_all(
    parts: Sequence[Part], shape: TensorShape, wanted: TensorShape | None
) -> tuple[list[nn.Module], TensorShape]:
    """The modules of a list of parts, and the shape that the last one returns.

    Args:
        parts: the parts.
        shape: of the input of the first.
        wanted: the shape to return; None for any.
    """
    modules = []
    for module, after in make_each(parts, shape, wanted):
        modules.append(module)
        shape = after
    return modules, shape


def make_each(parts: Sequence[Part], shape: TensorShape, wanted: TensorShape | None) -> Iterator[Made]:
    """Each module of a list of parts, with the shape that it returns: see `make_all`."""
    last = max((i for i, part in enumerate(parts) if part.chooses), default=None)
    for i, part in enumerate(parts):
        try:
            module, shape = part.make(shape, wanted if i == last else None)
        except InvflowError as error:
            error.place = ("parts", i, *error.place)
            raise
        yield module, shape


def start_at_zero(parts: Sequence[Part], modules: Sequence[nn.Module]) -> None:
    """Lets the last of some parts that does not keep a zero return zeros until it is trained."""
    for part, module in zip(reversed(parts), reversed(modules), strict=True):
        if not part.keeps_zero:
            part.start_at_zero(module)
            return
    raise InvflowError("zero_last expects a convolution or a linear layer among the parts")
