"""Autoregressive layers: each element is changed as a net of the elements before it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from .._torch import forward_mode_active, transforms_active
from ..bijection import Bijection
from ..context import Context, ContextShape
from ..errors import ShapeError
from ..nets.contract import Conditioned
from ..nets.masked import CUTS, elements_of, require_autoregressive
from ..numerics.backend import own_precision
from ..progress import progress
from ..registry import register
from ..solvers import solve_triangular
from ..state import Shape, TensorShape, require_tensor, shape_of
from .affine_coupling import CLAMP, Scale, Scaled
from .implicit import attached_to_weights
from .rational_quadratic import RationalQuadratic
from .spline import Bins, Part, Slope, Splined
from .univariate import Univariate, summed

Solver: TypeAlias = Literal["jacobi", "sequential"]

_CHECKED = 12 * CUTS
"""What a check of a net costs, in evaluations for one sample: two passes, forward and backward, on `CUTS` samples."""


class AutoregressiveLayer(Conditioned, Bijection, Univariate):
    """``y_i = g(x_i; net(x)_i)``, where the net's outputs for element i depend on the elements before i alone.

    The elements are the features of a vector; a subclass may have others. A subclass defines g: see `Univariate`. The
    forward is one evaluation of the net. The inverse is slow: it takes one for each element, if the solver does not end
    before. Its gradients are those of the implicit function, a triangular system that is solved by Jacobi's iteration
    too. Autocast is off inside, because a net in bfloat16 could not be inverted in float32.

    Args:
        net: the net.
        outputs: the number of its outputs for each number of an element.
        solver: the method for the inverse.
        shape: the incoming shape.
        context_shape: likewise for the context.

    Attributes:
        shape: the incoming shape.
        elements: the number of elements.
    """

    traceable = False  # the solver's loop depends on the numbers

    proven: ClassVar[frozenset[type[nn.Module]]] = frozenset()
    """The nets that are autoregressive whatever their weights are, and may be too large to be checked in seconds."""

    def __init__(self, net: nn.Module, outputs: int, solver: Solver, shape: Shape, context_shape: ContextShape) -> None:
        super().__init__()
        self.shape = self._extents(shape)
        self.elements = elements_of(self.shape)
        if type(net) not in self.proven:
            require_autoregressive(self.tag, net, self.shape, outputs, context_shape)
        self.net = net
        self.solver = solver
        self._outputs = outputs

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        return self._transform(x, self._made(x, context))[0]

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        """The inverse, differentiable with respect to y, the context and the weights."""
        if y.is_meta:
            return self._step(y, y, context)
        if transforms_active() or forward_mode_active():  # nobody may look at the numbers
            return self._one_by_one(y, context)
        with torch.no_grad():
            x = self._all_at_once(y, context) if self.solver == "jacobi" else self._one_by_one(y, context)
        return attached_to_weights(self.net, self._step, x, y, context, self._solve_linear)

    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        y, log_scale = self._transform(x, self._made(x, context))
        return y, summed(log_scale, x)

    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        x = self.inverse(y, context)
        return x, -self.forward_and_log_det(x, context)[1]

    @classmethod
    def net_shapes(cls, shape: Shape, fields: Mapping[str, Any]) -> Mapping[str, tuple[Shape, Shape]]:
        """The net maps the elements to `outputs` numbers for each of theirs."""
        extents = cls._extents(shape)
        return {"net": (extents, (cls.outputs(fields) * extents[0], *extents[1:]))}

    def output_shape(self, shape: Shape) -> TensorShape:
        extents = self._extents(shape)
        if extents != self.shape:
            raise ShapeError(f"{self.tag} expects the shape {self.shape}, got {extents}")
        return extents

    def input_shape(self, shape: Shape) -> TensorShape:
        return self.output_shape(shape)

    @property
    def building_cost(self) -> int:
        return 0 if type(self.net) in self.proven else _CHECKED * self._work

    @property
    def _work(self) -> int:
        """The operations of an evaluation of the net for one sample."""
        return sum(weight.numel() for weight in self.net.parameters())

    def _made(self, x: Tensor, context: Context) -> Tensor:
        """What the net says of each element, for x."""
        if not isinstance(x, Tensor) or x.shape[1:] != self.shape:
            self.output_shape(shape_of(x))
        return self._called(x, context)

    def _called(self, x: Tensor, context: Context) -> Tensor:
        """The net's output for x, checked to fit it."""
        with own_precision(x):
            made: Tensor = self.conditioned(x, context)
        expected = (len(x), self._outputs * self.shape[0], *self.shape[1:])
        if made.shape != expected:
            raise ShapeError(f"{self.tag} expects its net to return the shape {expected}, got {tuple(made.shape)}")
        return made.to(x.dtype)

    def _step(self, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """What x would be if the net's output for this one was right; the inverse is its fixed point."""
        return self._untransform(y, self._made(x, context))[0]

    def _all_at_once(self, y: Tensor, context: Context) -> Tensor:
        """The inverse by Jacobi's iteration."""
        x = self._solve(lambda x: self._step(x, y, context), y, f"inverse of {self.tag}")
        # Later elements may overflow, and spoil earlier ones, before they are right: 0 times infinity is no number.
        return x if bool(x.isfinite().all()) else self._one_by_one(y, context)

    def _one_by_one(self, y: Tensor, context: Context) -> Tensor:
        """The inverse, one element after the other, with its gradients if they are enabled."""
        wanted, past = self._in_order(y), None
        x = torch.zeros_like(wanted)
        with progress(f"inverse of {self.tag}", self.elements) as advance:
            for i in range(self.elements):
                of_one, past = self._made_of(i, x, context, past)
                one, _ = self._untransform(wanted[:, :, i], of_one)
                x = torch.cat([x[:, :, :i], one[:, :, None], x[:, :, i + 1 :]], dim=2)
                advance()
        return self._in_place(x)

    def _made_of(self, i: int, x: Tensor, context: Context, past: Any) -> tuple[Tensor, Any]:
        """What the net says of element i if those before are right in x, which is in order, and what the next needs.

        ``past`` is what the element before has returned as the second, None for the first.
        """
        return self._in_order(self._made(self._in_place(x), context))[:, :, i], None

    @classmethod
    def _extents(cls, shape: Shape) -> TensorShape:
        """The incoming shape, if the layer takes it, else a ShapeError."""
        return require_tensor(cls.tag, shape, 1)

    def _in_order(self, x: Tensor) -> Tensor:
        """A state or an output of the net as ``(batch, numbers of each element, elements)``, in their order."""
        return torch.unflatten(x, 1, (x.shape[1] // self.shape[0], self.shape[0]))

    def _in_place(self, x: Tensor) -> Tensor:
        """The inverse of `_in_order`."""
        return x.flatten(1)

    def _solve_linear(self, step: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
        return self._solve(step, start, f"gradient of the inverse of {self.tag}")

    def _solve(self, step: Callable[[Tensor], Tensor], start: Tensor, what: str) -> Tensor:
        return solve_triangular(step, start, self.elements, what)


@register("autoregressive")
class Autoregressive(Scaled, AutoregressiveLayer):
    """``y_i = scale_i * x_i + t_i``, where scale and shift are computed from the features before i: a layer of MAF.

    Use it for densities of tables: likelihoods are fast, and samples slow.

    The scale is the function of r that `AffineCoupling` has, and ``(r, t) = net(x)``, in which the numbers for feature
    i depend on x_0 to x_(i-1) alone, and on the context. The log-determinant is ``sum(log(scale))``, exact both ways.

    The inverse is the slow direction: the forward, and so a density, takes one evaluation of the net, the inverse, and
    so a sample, up to one for each feature. `Inverse` of the layer is fast where this is slow: a layer of IAF.

    - "jacobi" changes all features at once, from those of the last step, and ends when none changes beyond rounding:
      after at most as many steps as there are features, and often long before; if a step overflows, which the result
      need not do, it starts again as "sequential";
    - "sequential" makes one feature after the other.

    In `grid` and `exact` numerics the layer is refused, as all that scale.

    Reference: Papamakarios, Pavlakou, Murray: Masked Autoregressive Flow, 2017, https://arxiv.org/abs/1705.07057;
    Kingma et al.: Inverse Autoregressive Flow, 2016, https://arxiv.org/abs/1606.04934

    Args:
        net: an autoregressive net, such as `masked_mlp`, or any module that is one: called with x, or with x and the
            context if there is one; it returns r for all features, and then t.
        clamp: the bound of the log-scale, for "tanh" and "soft_clip".
        scale: the function of r.
        floor: what "sigmoid" adds to the scale.
        shift_first: whether the output is ``(x + t) * scale`` instead of ``scale * x + t``.
        solver: the method for the inverse.
        shape: the incoming shape, ``(features,)``.
        context_shape: likewise for the context.

    Raises:
        ShapeError: the net is not autoregressive: an output depends on its own feature or a later one.
        InvflowError: a clamp or a floor for a scale that has none.

    Examples:
        >>> from invflow.nets import MaskedMLP
        >>> layer = Autoregressive(MaskedMLP((3,), (6,), hidden=[8]), shape=(3,)).double()
        >>> x = torch.randn(5, 3, dtype=torch.float64)
        >>> bool((layer.inverse(layer(x)) - x).abs().max() < 1e-12)
        True
        >>> Autoregressive(torch.nn.Linear(3, 6), shape=(3,))
        Traceback (most recent call last):
        invflow.errors.ShapeError: autoregressive expects a net whose outputs for a feature depend on the features \
before it alone, got Linear, whose output for feature 0 depends on feature 2 (counted from 0); use masked_mlp
    """

    examples = [
        ({"net": {"type": "masked_mlp", "hidden": [6]}}, (3,)),
        ({"net": {"type": "masked_mlp", "hidden": [5, 4], "activation": "tanh", "degrees": "random"}}, (4,)),
        ({"net": {"type": "masked_mlp", "hidden": [4, 4], "residual": True}, "solver": "sequential"}, (3,)),
        ({"net": {"type": "masked_mlp"}, "scale": "sigmoid", "floor": 0.001, "shift_first": True}, (2,)),
    ]

    def __init__(
        self,
        net: nn.Module,
        shape: Shape,
        context_shape: ContextShape = None,
        clamp: PositiveFloat = CLAMP,
        scale: Scale = "tanh",
        floor: NonNegativeFloat = 0.0,
        shift_first: bool = False,
        solver: Solver = "jacobi",
    ) -> None:
        super().__init__(net, 2, solver, shape, context_shape)
        self._set_scale(clamp, scale, floor, shift_first)


@register("spline_autoregressive")
class SplineAutoregressive(Splined, AutoregressiveLayer):
    """``y_i = g_i(x_i)`` with a monotonic rational-quadratic spline g_i, given by a net of the features before i.

    Use it as `autoregressive`, for conditional distributions with several modes.

    The splines are those of `SplineCoupling`: each maps ``[-bound, bound]`` onto itself and is the identity outside,
    and where the net returns zeros. The log-determinant is the sum of ``log g_i'``, exact both ways. As for
    `Autoregressive`, the inverse is the slow direction: up to one evaluation of the net for each feature.

    Reference: Durkan, Bekasov, Murray, Papamakarios: Neural Spline Flows, 2019, https://arxiv.org/abs/1906.04032

    Args:
        net: an autoregressive net, such as `masked_mlp`, or any module that is one: called with x, or with x and the
            context if there is one; it returns ``3 bins - 1`` numbers for each feature: first the logits of the first
            bin's width for all features, then those of the second one; after the widths the heights, then the slopes at
            the inner knots.
        bins: the number of bins.
        bound: the half of the interval that is transformed.
        min_size: the least width and height of a bin, as a part of the interval.
        min_slope: the least slope at a knot; the largest is 1 over it.
        logit_divisor: what the logits of widths and heights are divided by: in neural spline flows the root of the
            number of channels in the net, which makes the bins about equal at first.
        solver: the method for the inverse: see `Autoregressive`.
        shape: the incoming shape, ``(features,)``.
        context_shape: likewise for the context.

    Raises:
        ShapeError: the net is not autoregressive: an output depends on its own feature or a later one.

    Examples:
        >>> from invflow.nets import MaskedMLP
        >>> layer = SplineAutoregressive(MaskedMLP((2,), (46,), hidden=[8], zero_last=True), shape=(2,))
        >>> layer(torch.tensor([[0.5, 4.0]])).tolist()
        [[0.5, 4.0]]
    """

    examples = [
        ({"net": {"type": "masked_mlp", "hidden": [6]}, "bins": 4}, (3,)),
        ({"net": {"type": "masked_mlp", "hidden": [4], "activation": "tanh"}, "bound": 1.0, "min_size": 0.01}, (2,)),
        ({"net": {"type": "masked_mlp", "hidden": [4]}, "min_slope": 0.1, "solver": "sequential"}, (4,)),
    ]

    def __init__(
        self,
        net: nn.Module,
        shape: Shape,
        context_shape: ContextShape = None,
        bins: Bins = 8,
        bound: PositiveFloat = 3.0,
        min_size: Part = 1e-3,
        min_slope: Slope = 1e-3,
        logit_divisor: PositiveFloat = 1.0,
        solver: Solver = "jacobi",
    ) -> None:
        spline = RationalQuadratic(bins, bound, min_size, min_slope, logit_divisor)
        super().__init__(net, spline.numbers, solver, shape, context_shape)
        self.spline = spline
