"""A neural ODE as a bijection: the state moves along a learned velocity, in steps that can be undone to rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ..bijection import Bijection
from ..context import Context, ContextShape, each_entry
from ..errors import InvflowError, ShapeError
from ..log_det import (
    EVAL_PROBES,
    EVAL_SEED,
    EXACT_SIZE,
    Probe,
    draw_probes,
    exact_log_det,
    require_differentiable,
    trace_estimate,
)
from ..nets.contract import Conditioned, Lipschitz
from ..numerics.backend import own_precision
from ..numerics.conditioners import changing_part
from ..registry import nets, register
from ..solvers import Solution, solve
from ..state import Shape, TensorShape, flat_size, require_channels, require_tensor, shape_of
from .implicit import OnFailure, attached_to_weights, complain, permitted, solve_transposed

Steps: TypeAlias = Annotated[int, Field(gt=0, le=1000)]
Method: TypeAlias = Literal["euler", "midpoint", "rk4"]
Trace: TypeAlias = Literal["auto", "exact", "hutchinson"]

CONTRACTION = 0.5
"""What a correction is expected to leave of an error, at most; the solver gives up after twice as many of them as this
takes to get from 1 to eps. With "rk4" it leaves 2 % if a step's length times the Lipschitz constant of the velocity is
1, and a half at about 1.7."""

CORRECTED = 8
"""The relative error at which corrections end, in units of eps: the next one would change no more than roundings do."""


class _RungeKutta(NamedTuple):
    """An explicit method: ``k_i = f(x + h sum_j a_ij k_j, t + c_i h)``, and a step adds ``h sum_i b_i k_i``.

    Attributes:
        nodes: c.
        rows: a, the rows of a lower triangle.
        weights: b.
    """

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    def increment(self, field: Callable[[Any, Any], Any], x: Any, time: Any, length: Any) -> Any:
        """What a step from x adds to it: of a tensor or, to bound it, of a number."""
        slopes: list[Any] = []
        for node, row in zip(self.nodes, self.rows, strict=True):
            slopes.append(field(x + length * _weighted(row, slopes), time + node * length))
        return length * _weighted(self.weights, slopes)


def _weighted(weights: Sequence[float], values: Sequence[Any]) -> Any:
    return sum(weight * value for weight, value in zip(weights, values, strict=True) if weight)


_METHODS: Mapping[Method, _RungeKutta] = {
    "euler": _RungeKutta((0,), ((),), (1,)),
    "midpoint": _RungeKutta((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "rk4": _RungeKutta((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


@register("continuous")
class Continuous(Conditioned, Bijection):
    """``y = x(T)`` for the solution of ``dx/dt = net(x, t)`` that begins with ``x(0) = x``: a continuous flow, FFJORD.

    Use it for smooth densities of few dimensions; it takes many evaluations of its net.

    The equation is solved in ``steps`` steps of equal length ``h = T / steps`` by an explicit Runge-Kutta method. The
    bijection is this discrete map ``F = F_N ... F_1``, not the solution that it approximates: forward, inverse and
    log-determinant are those of F, to rounding, however coarse the steps are.

    Each step is undone by corrections. The method with ``-h``, B, almost undoes a step, up to ``(h L)^(p+1)`` for the
    order p and the velocity's Lipschitz constant L. So ``x <- x + B(y) - B(F(x))``, whose fixed point has
    ``F(x) = y``, leaves that part of the error: with "rk4" 2 % for ``h L = 1``, so that few corrections are enough. It
    costs about four times the forward, or more if steps are long.

    A step maps no two points to one if ``h L`` is at most 0.69 ("midpoint": 0.73, "euler": 1), and corrections converge
    up to about 1.9 (1.4, 1), if the velocity is nearly linear. An inverse that does not converge warns or raises: take
    more steps. A net with a known Lipschitz constant proves that the steps are short enough: the second of its
    `lipschitz_bounds` is finite.

    Algebraically reversible solvers (reversible Heun; McCallum and Foster, 2024) need no corrections, but they invert
    the pair of the state and an auxiliary one. A layer passes on the state alone, so that the inverse would have to
    begin with another auxiliary state than the one in which the forward ended.

    The log-determinant is exact, ``sum log |det dF_n/dx|`` of the steps, or the integral of the trace of the velocity's
    Jacobian along the way, by the same method, with each trace estimated by probes: unbiased for the solution of the
    equation, from which the steps differ by ``h^p``. In eval mode the probes are always the same, at least 8.

    Gradients are those of the steps themselves; the inverse's are those of the implicit function. Autocast is off
    inside, because a net in bfloat16 could not be inverted in float32.

    Reference: Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud: FFJORD, 2018, https://arxiv.org/abs/1810.01367; Chen,
    Rubanova, Bettencourt, Duvenaud: Neural Ordinary Differential Equations, 2018, https://arxiv.org/abs/1806.07366

    Args:
        net: the velocity: a smooth net from the state and, as its last channel, the time, to the shape of the state;
            called with the context, too, if there is one. Parts in `carry` let every layer see the time. Batch norm
            and dropout are refused.
        shape: the incoming shape, channels first.
        context_shape: likewise for the context.
        steps: the number of steps.
        method: "euler", "midpoint" or "rk4", of order 1, 2 and 4: 1, 2 and 4 evaluations of the net in a step.
        time: T, at the start of training if it is trained.
        trained_time: whether T is trained, as the square of a parameter.
        trace: "exact"; "hutchinson"; or "auto", exact for states of at most 64 numbers, which it takes as many
            gradients of a step as there are numbers.
        probes: the number of probes for each sample.
        probe: the distribution of probes: "rademacher" (random signs, with less variance) or "gaussian".
        on_failure: whether samples that cannot be inverted cause a warning or an error.

    Raises:
        InvflowError: the net has batch norm or dropout, or there are probes for an exact trace.

    Examples:
        >>> from invflow.nets import MLP
        >>> layer = Continuous(MLP((3,), (2,), hidden=[8], activation="tanh"), shape=(2,), steps=3).double()
        >>> x = torch.randn(5, 2, dtype=torch.float64)
        >>> bool((layer.inverse(layer(x)) - x).abs().max() < 1e-14)
        True
    """

    examples = [
        ({"net": {"type": "mlp", "hidden": [6], "activation": "softplus"}, "steps": 3}, (2,)),
        (
            {
                "net": {
                    "type": "stack",
                    "parts": [
                        {"type": "carry", "parts": [{"type": "conv", "channels": 3}, {"type": "softplus"}]},
                        {"type": "conv"},
                    ],
                },
                "steps": 2,
                "method": "midpoint",
                "time": 0.5,
            },
            (2, 3, 2),
        ),
        (
            {
                "net": {"type": "mlp", "hidden": [5], "activation": "tanh"},
                "steps": 4,
                "method": "euler",
                "trained_time": False,
            },
            (3,),
        ),
        ({"net": {"type": "conv", "hidden": [3], "activation": "silu"}, "steps": 1, "trace": "hutchinson"}, (1, 3, 3)),
    ]

    traceable = False  # the solver's loop depends on the numbers

    def __init__(
        self,
        net: nn.Module,
        shape: Shape,
        context_shape: ContextShape = None,
        steps: Steps = 8,
        method: Method = "rk4",
        time: PositiveFloat = 1.0,
        trained_time: bool = True,
        trace: Trace = "auto",
        probes: PositiveInt = 1,
        probe: Probe = "rademacher",
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__()
        if trace == "exact" and (probes, probe) != (1, "rademacher"):
            raise InvflowError(f'continuous draws probes for "auto" and "hutchinson" only, got {probes} {probe} ones')
        if reason := changing_part(net):
            raise InvflowError(
                f"continuous expects a net that is the same function in every step, got {nets.name_of(type(net))}: "
                f"{reason}; use layer_norm or group_norm, and no dropout"
            )
        self.net = net
        self.shape = require_channels("continuous", shape)
        self.steps = steps
        self.method = method
        self.time = time
        self.root_time = nn.Parameter(torch.tensor(time).sqrt()) if trained_time else None
        self.exact = trace == "exact" or (trace == "auto" and flat_size(shape) <= EXACT_SIZE)
        self.probes = probes
        self.probe: Probe = probe
        self.on_failure: OnFailure = on_failure

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        self._check(x)
        with own_precision(x):
            for number in range(self.steps):
                x = self._done(number, x, context)
        return x

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        """The inverse, differentiable with respect to y, the context and the weights."""
        self._check(y)
        with own_precision(y):
            for number in reversed(range(self.steps)):
                y = self._undone(number, y, context)
        return y

    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        self._check(x)
        require_differentiable("continuous")
        if x.is_meta or not x.numel():
            y = self(x, context)
            return y, y.flatten(1).sum(1)
        with own_precision(x):
            return self._with_exact(x, context) if self.exact else self._with_estimate(x, context)

    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        x = self.inverse(y, context)
        return x, -self.forward_and_log_det(x, context)[1]

    @property
    def log_det_is_estimated(self) -> bool:
        return not self.exact

    @property
    def rounding_growth(self) -> float:
        """Each step rounds as a layer does."""
        return float(self.steps)

    @classmethod
    def net_shapes(cls, shape: Shape, fields: Mapping[str, Any]) -> Mapping[str, tuple[Shape, Shape]]:
        """The net maps the state and the time, its last channel, to the shape of the state."""
        channels, *positions = require_channels(cls.tag, shape)
        return {"net": ((channels + 1, *positions), shape)}

    def output_shape(self, shape: Shape) -> TensorShape:
        extents = require_tensor(self.tag, shape)
        if extents != self.shape:
            raise ShapeError(f"continuous expects the shape {self.shape}, got {extents}")
        return extents

    def input_shape(self, shape: Shape) -> TensorShape:
        return self.output_shape(shape)

    @torch.no_grad()
    def lipschitz_bounds(self) -> tuple[float, float]:
        """``(1 + q)^steps`` and ``(1 - q)^-steps`` if the net has a Lipschitz constant, which bounds a step's by q."""
        if not isinstance(self.net, Lipschitz):
            return super().lipschitz_bounds()
        slope, length = float(self.net.lipschitz_bound()), float(self._length(torch.empty(0)))
        q = _METHODS[self.method].increment(lambda x, time: slope * x, 1.0, 0.0, length)
        return (1 + q) ** self.steps, (1 - q) ** -self.steps if q < 1 else float("inf")

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.shape[1:] != self.shape:
            self.output_shape(shape_of(x))

    def _length(self, x: Tensor) -> Tensor:
        """The length of a step, in the dtype and on the device of x."""
        whole = x.new_tensor(self.time) if self.root_time is None else self.root_time.square().to(x.dtype)
        return whole / self.steps

    def _velocity(self, context: Context, x: Tensor, time: Tensor) -> Tensor:
        made: Tensor = self.conditioned(torch.cat([x, time.expand(len(x), 1, *x.shape[2:])], dim=1), context)
        if made.shape == x.shape:
            return made
        raise ShapeError(f"continuous expects its net to return the shape {tuple(x.shape)}, got {tuple(made.shape)}")

    def _increment(self, field: Callable[[Tensor, Tensor], Tensor], number: int, x: Tensor, way: int = 1) -> Tensor:
        """What step ``number``, from 0, adds to x; with a way of -1, the step with the time reversed."""
        length = self._length(x)
        time = (number if way == 1 else number + 1) * length
        made: Tensor = _METHODS[self.method].increment(field, x, time, way * length)
        return made

    def _done(self, number: int, x: Tensor, context: Context) -> Tensor:
        """X after a step."""
        return x + self._increment(partial(self._velocity, context), number, x)

    def _nearly_undone(self, number: int, y: Tensor, context: Context) -> Tensor:
        """Y before a step, up to the error of the method."""
        return y + self._increment(partial(self._velocity, context), number, y, way=-1)

    def _undone(self, number: int, y: Tensor, context: Context) -> Tensor:
        """Y before a step, to rounding."""
        if y.is_meta:
            return self._nearly_undone(number, y, context)

        def correct(x: Tensor, y: Tensor, context: Context) -> Tensor:
            again = self._nearly_undone(number, self._done(number, x, context), context)
            return x + (self._nearly_undone(number, y, context) - again)

        solution = self._solve(number, y.detach(), context)
        complain("inverse of continuous", y, solution, self.on_failure, stacklevel=4)
        return attached_to_weights(self, correct, solution.x, y, context, self._solve_transposed)

    @torch.no_grad()
    def _solve(self, number: int, y: Tensor, context: Context) -> Solution:
        start = self._nearly_undone(number, y, context)

        def correct(x: Tensor, rows: Tensor) -> Tensor:
            whole = len(rows) == len(start)
            given = context if whole else each_entry(lambda entry: entry[rows], context)
            again = self._nearly_undone(number, self._done(number, x, given), given)
            return x + ((start if whole else start[rows]) - again)

        eps = torch.finfo(start.dtype).eps
        options: dict[str, Any] = {"tolerance": CORRECTED * eps, "permitted": permitted(start.dtype)}
        return solve(correct, start, beside=y, contraction=CONTRACTION, **options)

    def _solve_transposed(self, step: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
        solution = solve_transposed(step, start, CONTRACTION, "anderson")
        complain("gradient of the inverse of continuous", start, solution, self.on_failure, stacklevel=3)
        return solution.x

    def _with_exact(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The result and the log-determinant, from the dense Jacobian of each step."""
        log_det = x.new_zeros(len(x))
        for number in range(self.steps):

            def added(x: Tensor, context: Context, number: int = number) -> Tensor:
                return self._increment(partial(self._velocity, context), number, x)

            log_det = log_det + exact_log_det(added, x, context)
            x = x + added(x, context)
        return x, log_det

    def _with_estimate(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The result and, as one more number of the state that moves, the integral of estimated traces."""
        generator = None if self.training else torch.Generator().manual_seed(EVAL_SEED)
        size = (self.probes, *x.shape) if self.training else (max(self.probes, EVAL_PROBES), 1, *x.shape[1:])
        probes = draw_probes(self.probe, size, x, generator)

        def field(joint: Tensor, time: Tensor) -> Tensor:
            at = joint[:, :-1].reshape(x.shape)
            trace = trace_estimate(lambda x, context: self._velocity(context, x, time), at, context, probes)
            return torch.cat([self._velocity(context, at, time).flatten(1), trace[:, None]], dim=1)

        joint = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1)
        for number in range(self.steps):
            joint = joint + self._increment(field, number, joint)
        return joint[:, :-1].reshape(x.shape), joint[:, -1]
