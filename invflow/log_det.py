"""``log |det(1 + J)|`` for the Jacobian J of a contraction g: exact, truncated or unbiased estimators; and traces.

With ``||J|| <= c < 1`` the series ``log det(1 + J) = sum_k (-1)^(k+1) tr(J^k) / k`` converges, and the determinant is
positive. A trace is the mean of ``v^T J^k v`` over random probes v with uncorrelated entries of variance 1. That takes
k products with J^T and never forms a matrix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from .context import Context, each_entry
from .errors import InvflowError
from .options import Options

Map: TypeAlias = Callable[[Tensor], Tensor]
Branch: TypeAlias = Callable[[Tensor, Context], Tensor]
Probe: TypeAlias = Literal["rademacher", "gaussian"]

EXACT_SIZE = 64
"""The largest state for which "auto" computes the dense Jacobian: that costs about as much as 4 probes of 16 terms."""

EVAL_PROBES = 8
EVAL_SEED = 0
EVAL_ERROR = 0.01
"""The largest truncation error of a series in eval mode, in nats per dimension, if all singular values of J were c."""


class ExactLogDet(Options):
    """Exact, from the dense Jacobian: one product for each number in the state."""

    type: Literal["exact"]

    def is_exact(self, size: int) -> bool:
        """Whether the log-determinant for a state of this size is exact, not an estimate."""
        return True

    def check(self, coefficient: float) -> None:
        """Raises InvflowError if the options do not suit a contraction by this coefficient."""

    def find(self, g: Branch, x: Tensor, context: Context, coefficient: float, training: bool) -> Tensor:
        """``log |det(1 + dg/dx)|`` of each sample, ``(batch,)``.

        Args:
            g: the contraction.
            x: the points, ``(batch, ...)``.
            context: the context of x.
            coefficient: the bound of g's Lipschitz constant.
            training: whether new probes are drawn. Otherwise the same probes are used each time, at least 8, so that a
                density is a function, and the inverse's log-determinant is the negative of the forward's.
        """
        return exact_log_det(g, x, context)


class _Series(Options):
    """The base class of estimates from the power series."""

    terms: PositiveInt | None = None
    probes: PositiveInt = Field(default=1, description="the number of probes for each sample")
    probe: Probe = Field(
        default="rademacher", description="the distribution of probes: random signs, with less variance, or normal"
    )

    def is_exact(self, size: int) -> bool:
        return False

    def check(self, coefficient: float) -> None:
        pass

    def find(self, g: Branch, x: Tensor, context: Context, coefficient: float, training: bool) -> Tensor:
        weights = self._weights(coefficient, training)
        generator = None if training else torch.Generator().manual_seed(EVAL_SEED)
        shape = (self.probes, *x.shape) if training else (max(self.probes, EVAL_PROBES), 1, *x.shape[1:])
        return series_log_det(g, x, context, draw_probes(self.probe, shape, x, generator), weights)

    def _weights(self, coefficient: float, training: bool) -> list[float]:
        return [1.0] * (self.terms or 10)


class PowerSeries(_Series):
    """The truncated power series, with each trace estimated by probes."""

    type: Literal["power_series"]
    terms: PositiveInt | None = Field(default=None, description="the number of terms; null: 10")


class _Roulette(_Series):
    """The power series with a random number of terms."""

    terms: PositiveInt | None = Field(default=None, description="the number of terms that are always used; null: 2")
    continuation: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="the probability of each further term, above coefficient^2, below which the variance is infinite; "
        "null: a third of the way from there to 1",
    )

    def check(self, coefficient: float) -> None:
        if self.continuation is not None and self.continuation <= coefficient**2:
            raise InvflowError(
                f"residual with a coefficient of {coefficient} expects a continuation above its square, "
                f"{coefficient**2:g}, got {self.continuation}: the variance of the log-determinant would be infinite"
            )

    def _weights(self, coefficient: float, training: bool) -> list[float]:
        certain = self.terms or 2
        if not training:
            return [1.0] * max(certain, enough_terms(coefficient, EVAL_ERROR))
        continuation = self.continuation or default_continuation(coefficient)
        return roulette_weights(draw_terms(certain, continuation), certain, continuation)


class Roulette(_Roulette):
    """The series with a random number of terms, weighted to be unbiased; in eval mode a long series."""

    type: Literal["roulette"]


class Auto(_Roulette):
    """Exact for states of at most 64 numbers, roulette for larger ones."""

    type: Literal["auto"]

    def is_exact(self, size: int) -> bool:
        return size <= EXACT_SIZE

    def find(self, g: Branch, x: Tensor, context: Context, coefficient: float, training: bool) -> Tensor:
        if self.is_exact(x[:1].numel()):
            return exact_log_det(g, x, context)
        return super().find(g, x, context, coefficient, training)


Estimator: TypeAlias = Annotated[Auto | ExactLogDet | PowerSeries | Roulette, Field(discriminator="type")]
AUTO = Auto(type="auto")


def exact_log_det(g: Branch, x: Tensor, context: Context) -> Tensor:
    """``log |det(1 + dg/dx)|`` of each sample, from the dense Jacobian: one product for each number in a sample.

    Examples:
        >>> exact_log_det(lambda x, context: x / 2, torch.zeros(1, 3), None)  # 3 log 1.5
        tensor([1.2164])
    """
    batch, size = len(x), x[:1].numel()
    identity = torch.eye(size, dtype=x.dtype, device=x.device)
    # One copy of the batch for each row of the Jacobian works for every g and under every transform of torch.func.
    basis = identity[:, None].expand(size, batch, size).reshape(size * batch, *x.shape[1:])
    dense = _pulled_back_on_copies(g, x, context, size)(basis).reshape(size, batch, size).movedim(1, 0)
    wide = torch.promote_types(x.dtype, torch.float32)  # half precision has no determinants
    found: Tensor = torch.linalg.slogdet(identity.to(wide) + dense.to(wide)).logabsdet
    return found.to(x.dtype)


def series_log_det(g: Branch, x: Tensor, context: Context, probes: Tensor, weights: list[float]) -> Tensor:
    """``sum_k weights[k-1] (-1)^(k+1) / k  mean_v(v^T J^k v)`` over k from 1, of each sample, with its gradient.

    With weights of 1 this is the truncated power series; with weights of ``1 / P(N >= k)`` for a random number N of
    terms it is unbiased. The gradient does not differentiate the terms, which would keep a graph for each. Since
    ``d tr(J^k) = k tr(J^(k-1) dJ)``, it is ``a^T dJ v`` with ``a = sum_k weights[k-1] (-J^T)^(k-1) v``: the gradient of
    a single product, whatever the number of terms. Its mean over the probes is correct. Its own derivative would not
    be; ``create_graph`` is refused.

    Reference: Chen, Behrmann, Duvenaud, Jacobsen: Residual Flows for Invertible Generative Modeling, 2019,
    https://arxiv.org/abs/1906.02735

    Args:
        g: the contraction.
        x: the points, ``(batch, ...)``.
        context: the context of x.
        probes: ``(number, batch, ...)``, or ``(number, 1, ...)`` if all samples share them.
        weights: one for each term.
    """
    number = probes.shape[0]
    v = probes.expand(number, *x.shape).flatten(0, 1)
    pull = _pulled_back_on_copies(g, x, context, number)
    with torch.no_grad():
        value = x.new_zeros(len(v))
        power, weighted = v, torch.zeros_like(v)
        for k, weight in enumerate(weights, start=1):
            weighted = weighted + weight * power
            power = -pull(power)
            value = value - weight / k * (power * v).flatten(1).sum(1)
    if torch.is_grad_enabled():
        attached = _Once.apply((pull(weighted) * v).flatten(1).sum(1))
        value = value + attached - attached.detach()
    return value.reshape(number, -1).mean(0)


def trace_estimate(g: Branch, x: Tensor, context: Context, probes: Tensor) -> Tensor:
    """``mean_v(v^T J v)`` over probes v, for the Jacobian J of any map g: Hutchinson's estimate of its trace.

    It has derivatives of every order.

    Args:
        g: the map.
        x: the points, ``(batch, ...)``.
        context: the context of x.
        probes: ``(number, batch, ...)``, or ``(number, 1, ...)`` if all samples share them.

    Examples:
        >>> trace_estimate(lambda x, context: 3 * x, torch.zeros(1, 2), None, torch.tensor([[[1.0, -1.0]]]))
        tensor([6.])
    """
    number = probes.shape[0]
    v = probes.expand(number, *x.shape).flatten(0, 1)
    found = (_pulled_back_on_copies(g, x, context, number)(v) * v).flatten(1).sum(1)
    return found.reshape(number, -1).mean(0)


def truncation_error(coefficient: float, terms: int, size: int) -> float:
    """A bound of the series' error after this number of terms, for ``||J|| <= coefficient``.

    ``|tr(J^k)| <= size * coefficient^k``, so the remaining terms sum to at most
    ``size * sum_(k > terms) coefficient^k / k <= size * coefficient^(terms+1) / ((terms+1) (1 - coefficient))``.

    Examples:
        >>> round(truncation_error(0.5, terms=9, size=10), 4)
        0.002
    """
    return size * coefficient ** (terms + 1) / ((terms + 1) * (1 - coefficient))


def enough_terms(coefficient: float, error: float) -> int:
    """The smallest number of terms whose truncation error is at most ``error`` per dimension."""
    return next(terms for terms in itertools.count(1) if truncation_error(coefficient, terms, 1) <= error)


def roulette_weights(number: int, certain: int, continuation: float) -> list[float]:
    """``1 / P(N >= k)`` for k from 1 to ``number``, where N is ``certain`` plus a geometric random number.

    The estimate's variance is a sum of ``(coefficient^2 / continuation)^k``: finite only for a continuation above
    ``coefficient^2``.

    Examples:
        >>> roulette_weights(4, certain=2, continuation=0.5)
        [1.0, 1.0, 2.0, 4.0]
    """
    return [continuation ** -max(0, k - certain) for k in range(1, number + 1)]


def default_continuation(coefficient: float) -> float:
    """A third of the way from ``coefficient^2``, at which the variance is infinite, to 1, at which the cost is.

    Examples:
        >>> default_continuation(0.5)
        0.5
    """
    return (1 + 2 * coefficient**2) / 3


def require_differentiable(who: str) -> None:
    """Raises InvflowError in inference mode, in which nothing can be differentiated, not even inside."""
    if torch.is_inference_mode_enabled():
        raise InvflowError(f"{who} differentiates for its log-determinant; use no_grad instead of inference_mode")


def draw_probes(kind: Probe, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Probes of a shape in the dtype and on the device of a tensor; drawn from the global generator by default."""
    device = like.device if generator is None else generator.device
    if kind == "gaussian":
        # From the same seed, another dtype gets other numbers: a density would depend on it.
        dtype = like.dtype if generator is None else torch.float64
        return torch.randn(shape, generator=generator, dtype=dtype, device=device).to(like)
    signs = torch.randint(0, 2, shape, generator=generator, device=device)
    return (2 * signs - 1).to(device=like.device, dtype=like.dtype)


def draw_terms(certain: int, continuation: float) -> int:
    """Draws the N of `roulette_weights` from the global generator of the CPU."""
    uniform = float(torch.rand((), dtype=torch.float64, device="cpu"))
    return certain + math.floor(math.log1p(-uniform) / math.log(continuation))


def pulled_back(g: Map, x: Tensor) -> Map:
    """``u -> (dg/dx)^T u`` at x, for any number of u; differentiable if gradients are enabled at the call."""
    # Under no_grad a view of an input that requires a gradient claims to require one, but is in no graph.
    in_graph = x.requires_grad and torch.is_grad_enabled()
    with torch.enable_grad():
        at = x if in_graph else x.detach().requires_grad_()
        made = g(at)

    def pull(u: Tensor) -> Tensor:
        if not made.requires_grad:  # a constant
            return torch.zeros_like(u)
        again = torch.is_grad_enabled()
        found: Tensor
        (found,) = torch.autograd.grad(made, at, u, retain_graph=True, create_graph=again, materialize_grads=True)
        return found

    return pull


def _pulled_back_on_copies(g: Branch, x: Tensor, context: Context, number: int) -> Map:
    """`pulled_back` at ``number`` copies of a batch, one after the other."""
    copies, given = (each_entry(lambda one: one.expand(number, *one.shape).flatten(0, 1), one) for one in (x, context))
    return pulled_back(lambda at: g(at, given), copies)


class _Once(torch.autograd.Function):
    """The identity, with a gradient that raises an error if it is differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise InvflowError(
                "an estimated log-determinant has first derivatives only; use log_det={'type': 'exact'} for second ones"
            )
        return grad
