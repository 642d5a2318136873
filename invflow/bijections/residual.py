"""Invertible residual blocks: ``y = x + g(x)`` with a contraction g."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeAlias, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from ..bijection import Bijection
from ..context import Context, ContextShape, each_entry
from ..errors import InvflowError, ShapeError
from ..log_det import AUTO, Branch, Estimator, require_differentiable
from ..nets.contract import Conditioned, Lipschitz
from ..nets.lipschitz import LipschitzConv, LipschitzMLP, LipschitzNet
from ..numerics.backend import own_precision
from ..registry import nets, register
from ..solvers import Method, Solution, solve
from ..state import Shape, TensorShape, flat_size, require_tensor
from .implicit import OnFailure, attached_to_weights, complain, permitted, solve_transposed

Fraction: TypeAlias = Annotated[float, Field(gt=0, lt=1)]


@register("residual")
class Residual(Conditioned, Bijection):
    """``y = x + g(x)`` with a contraction ``g = coefficient * net``, where the net is divided by its bound if above 1.

    Use it for free-form layers, those of an ordinary ResNet, if the inverse may take an iteration.

    For a given y the map ``x -> y - g(x)`` contracts by the coefficient c. So it has exactly one fixed point (Banach),
    the x with ``x + g(x) = y``; a point with the residual ``r = |y - x - g(x)|`` is within ``r / (1 - c)`` of it. The
    Jacobian ``1 + J`` has a positive determinant: ``det(1 + t J)`` is 1 for t = 0, and as ``|J| <= c < 1``, t J does
    not have the eigenvalue -1 for any t from 0 to 1.

    Autocast is off inside, because g in bfloat16 could not be inverted in float32. The loop of the solver depends on
    the data: `torch.compile` breaks the graph there and at the norms, and gives the same numbers.

    Reference: Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen: Invertible Residual Networks, 2018,
    https://arxiv.org/abs/1811.00995

    Args:
        net: a net with a certified Lipschitz constant that keeps the shape of the state; by default `LipschitzConv`
            for images and `LipschitzMLP` for anything else.
        coefficient: the bound of g's Lipschitz constant, below 1; null if g is the net itself, whose own bound must
            then be below 1.
        solver: the method for the inverse: "anderson" or "picard".
        tolerance: the relative error of the inverse at which the solver stops; null stops at rounding errors, which
            permit a larger one the nearer the contraction is to 1.
        on_failure: whether samples that do not converge cause a warning or an error.
        log_det: the method for the log-determinant: ``{"type": "exact"}`` from the dense Jacobian; "power_series",
            truncated; "roulette", unbiased; "auto", exact for states of at most 64 numbers and roulette for larger
            ones; each with its own options. In eval mode nothing is random.
        shape: the incoming shape, for which the default net is built.
        context_shape: likewise for the context.

    Examples:
        >>> block = Residual(shape=(2,))
        >>> x = torch.randn(5, 2)
        >>> bool((block.inverse(block(x)) - x).abs().max() < 1e-5)
        True
    """

    examples = [
        ({}, (3,)),
        ({"coefficient": 0.9}, (2, 4, 3)),
        ({"coefficient": 0.5, "log_det": {"type": "roulette", "probes": 2}}, (1, 3, 3)),
        ({"coefficient": 0.5, "net": {"type": "lipschitz_mlp", "hidden": [4], "activation": "tanh"}}, (2,)),
        ({"coefficient": None, "net": {"type": "lipschitz_conv", "hidden": [4], "bound": 0.9}}, (2, 3, 2)),
    ]

    traceable = False  # the solver's loop depends on the numbers

    def __init__(
        self,
        net: nn.Module | None = None,
        coefficient: Fraction | None = 0.9,
        solver: Method = "anderson",
        tolerance: Fraction | None = None,
        on_failure: OnFailure = "warn",
        log_det: Estimator = AUTO,
        shape: Shape | None = None,
        context_shape: ContextShape = None,
    ) -> None:
        super().__init__()
        if net is None:
            if shape is None:
                raise InvflowError("residual expects a net, or the incoming shape to build one: Residual(shape=(2,))")
            extents = require_tensor("residual", shape)
            default = LipschitzConv if len(extents) == 3 else LipschitzMLP
            net = default(extents, extents, context_shape)
        if not isinstance(net, Lipschitz):
            raise InvflowError(
                f"residual expects a net whose Lipschitz constant is known, got {nets.name_of(type(net))}; use "
                "lipschitz_conv or lipschitz_mlp, or give yours a method lipschitz_bound() that returns an upper bound"
            )
        self.net = net
        self.coefficient = coefficient
        self.solver = solver
        self.tolerance = tolerance
        self.on_failure = on_failure
        self.log_det = log_det
        self.shape = shape
        log_det.check(self.contraction)

    @property
    def contraction(self) -> float:
        """The bound of g's Lipschitz constant: the coefficient, or the net's own bound.

        Raises:
            InvflowError: there is no coefficient, and the net's bound is not below 1.
        """
        if self.coefficient is not None:
            return self.coefficient
        bound = float(cast(Lipschitz, self.net).lipschitz_bound())
        if bound < 1:
            return bound
        raise InvflowError(
            f"residual without a coefficient expects a net whose Lipschitz constant is below 1, got {bound:g}; give it "
            "a coefficient, or the net a bound below 1"
        )

    @property
    def inverse_tolerance(self) -> float | None:
        return self.tolerance

    @property
    def log_det_is_estimated(self) -> bool:
        return not self.log_det.is_exact(sys.maxsize if self.shape is None else flat_size(self.shape))

    def branch(self) -> Branch:
        """``g`` as a function of ``(x, context)``, with the normalised weights computed once."""
        net = self.net.prepared() if isinstance(self.net, LipschitzNet) else self.net
        scale = self._scale()

        def g(x: Tensor, context: Context) -> Tensor:
            given = self.for_net(context)
            made: Tensor = net(x) if given is None else net(x, given)
            if made.shape == x.shape:
                return scale * made
            raise ShapeError(f"residual expects its net to return the shape {tuple(x.shape)}, got {tuple(made.shape)}")

        return g

    def _scale(self) -> float | Tensor:
        """``g / net``."""
        if self.coefficient is None:
            _ = self.contraction  # whose bound may have come to be above 1
            return 1.0
        bound = cast(Lipschitz, self.net).lipschitz_bound()
        return self.coefficient / (bound.clamp(min=1.0) if isinstance(bound, Tensor) else max(1.0, bound))

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        with own_precision(x):
            return x + self.branch()(x, context)

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        with own_precision(y):
            return self._invert(self.branch(), y, context)

    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        with own_precision(x):
            g = self.branch()
            return x + g(x, context), self._log_det(g, x, context)

    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        with own_precision(y):
            g = self.branch()
            x = self._invert(g, y, context)
            return x, -self._log_det(g, x, context)

    @torch.no_grad()
    def solve(self, y: Tensor, context: Context = None) -> Solution:
        """The inverse without a gradient and the solver's report, without a warning or an error."""
        with own_precision(y):
            return self._solve(self.branch(), y, context)

    def output_shape(self, shape: Shape) -> TensorShape:
        extents = require_tensor("residual", shape)
        if self.shape is not None and extents != self.shape:
            raise ShapeError(f"residual expects the shape {self.shape}, got {extents}")
        return extents

    def input_shape(self, shape: Shape) -> TensorShape:
        return self.output_shape(shape)

    def lipschitz_bounds(self) -> tuple[float, float]:
        """``1 + c`` and ``1 / (1 - c)`` for the contraction c."""
        return 1 + self.contraction, 1 / (1 - self.contraction)

    def _log_det(self, g: Branch, x: Tensor, context: Context) -> Tensor:
        require_differentiable("residual")
        if x.is_meta or not x.numel():
            return x.flatten(1).sum(1)
        return self.log_det.find(g, x, context, self.contraction, self.training)

    def _invert(self, g: Branch, y: Tensor, context: Context) -> Tensor:
        """The inverse, differentiable with respect to y, the context and the weights."""
        if y.is_meta:
            return y - g(y, context)
        solution = self._solve(g, y.detach(), context)
        self._complain("inverse", y, solution)

        def step(x: Tensor, y: Tensor, context: Context) -> Tensor:
            return y - self.branch()(x, context)

        return attached_to_weights(self.net, step, solution.x, y, context, self._solve_linear)

    def _solve(self, g: Branch, y: Tensor, context: Context) -> Solution:
        def step(x: Tensor, rows: Tensor) -> Tensor:
            if len(rows) == len(y):
                return y - g(x, context)
            return y[rows] - g(x, each_entry(lambda entry: entry[rows], context))

        options: dict[str, Any] = {"contraction": self.contraction, "method": self.solver, "tolerance": self.tolerance}
        return solve(step, y, **options, permitted=permitted(y.dtype) if self.tolerance is None else 0.0)

    def _solve_linear(self, step: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
        solution = solve_transposed(step, start, self.contraction, self.solver)
        self._complain("gradient of the inverse", start, solution)
        return solution.x

    def _complain(self, what: str, start: Tensor, solution: Solution) -> None:
        complain(f"{what} of residual", start, solution, self.on_failure, stacklevel=4)
