"""Priors, distributions of the last state of a chain, in which all numbers are independent."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.distributions import Gamma
from torch.nn import functional

from .._torch import Constants
from ..context import Names
from ..errors import InvflowError, ShapeError
from ..registry import priors, register_prior
from ..state import Shape, State, TensorShape, flat_size, flatten, make_state, require_state, unflatten

LOG_2_PI = math.log(2 * math.pi)


class Prior(nn.Module, ABC):
    """A distribution over states.

    Args:
        shape: the shape of the state, without the batch; a parameter of this name is filled when a spec is built, and
            so is ``context_shape``, the shape of the context or None.

    Attributes:
        sees: what of the flow's context it is given, if it takes one.
        takes_context: whether `log_prob` and `sample` take the context, one row or one for each sample, as a further
            argument.
        reparametrized: whether samples are differentiable with respect to all parameters.
        discrete: whether `log_prob` is the logarithm of a probability, and not of a density.
        takes_parameters: whether it has `log_prob_given` and `sample_given`.

    Examples:
        >>> class Cube(Prior):
        ...     def log_prob(self, z):
        ...         return torch.where((z.abs() < 1).all(1), -self.shape[0] * math.log(2), -math.inf)
        ...
        ...     def sample(self, count, temperature=1.0):
        ...         return 2 * torch.rand(count, *self.shape) - 1
        >>> Cube((2,)).log_prob(torch.zeros(1, 2))
        tensor([-1.3863])
    """

    takes_context: bool = False
    sees: Names = ...
    reparametrized: bool = True
    discrete: bool = False
    takes_parameters: bool = False

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def log_prob(self, z: State) -> Tensor:
        """The log-density of each sample, in nats, ``(batch,)``; -inf outside the support."""

    @abstractmethod
    def sample(self, count: int, temperature: float = 1.0) -> State:
        """``count`` independent samples; a temperature below 1 draws them nearer to the most likely states."""

    def log_prob_given(self, x: Tensor, log_scale: Tensor, mean: Tensor) -> Tensor:
        """The log-density of numbers that each have the distribution of a log-scale and a mean, ``(batch,)``."""
        raise NotImplementedError

    def sample_given(self, log_scale: Tensor, mean: Tensor, temperature: float = 1.0) -> Tensor:
        """One sample of such numbers."""
        raise NotImplementedError

    def numbers(self, z: State) -> Tensor:
        """The numbers of each sample, ``(batch, numbers)``.

        Raises:
            ShapeError: a state of another shape, or of integers.
        """
        who = f"the {priors.name_of(type(self))} prior"
        require_state(who, self.shape, None, z)
        flat = flatten(z)
        if not flat.is_floating_point():
            raise ShapeError(f"{who} expects floating-point states, got {flat.dtype}")
        return flat


class _Standard(Constants, Prior):
    """The base of priors without parameters, whose numbers have one distribution."""

    constants = ("origin",)
    saved = False
    origin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        # Samples take the device and the dtype of this tensor, which moves with the model.
        self.origin = self.made("origin")

    def made(self, name: str) -> Tensor:
        return torch.zeros(())

    @abstractmethod
    def log_density(self, x: Tensor) -> Tensor:
        """The log-density of each number."""

    @abstractmethod
    def draw(self, size: TensorShape) -> Tensor:
        """Independent numbers at temperature 1, of the origin's dtype and device."""

    def log_prob(self, z: State) -> Tensor:
        return self.log_density(self.numbers(z)).sum(1)

    def sample(self, count: int, temperature: float = 1.0) -> State:
        return make_state(lambda leaf: temperature * self.draw((count, *leaf)), self.shape)


@register_prior("standard_normal")
class StandardNormal(_Standard):
    """Independent standard normal numbers: ``log p(z) = -1/2 sum(z^2 + log 2 pi)``.

    Use it unless there is a reason for another.

    Samples have the temperature as their standard deviation.

    Args:
        shape: the shape of the state, without the batch.

    Examples:
        >>> StandardNormal(shape=(2,)).log_prob(torch.zeros(1, 2))
        tensor([-1.8379])
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)

    def log_density(self, x: Tensor) -> Tensor:
        return -0.5 * (x.square() + LOG_2_PI)

    def log_prob(self, z: State) -> Tensor:
        # As the sum of `log_density`, with the constant added once.
        return -0.5 * (self.numbers(z).square().sum(1) + flat_size(self.shape) * LOG_2_PI)

    def draw(self, size: TensorShape) -> Tensor:
        return torch.randn(size, dtype=self.origin.dtype, device=self.origin.device)


@register_prior("logistic")
class Logistic(_Standard):
    """Independent standard logistic numbers: ``log p(z) = -sum(|z| + 2 log(1 + exp(-|z|)))``.

    Use it for tails that are a little heavier, as in NICE.

    Their tails are those of a sigmoid's logits, heavier than normal ones. The temperature multiplies the samples.

    Reference: Dinh, Krueger, Bengio: NICE, 2014, https://arxiv.org/abs/1410.8516

    Args:
        shape: the shape of the state, without the batch.

    Examples:
        >>> Logistic(shape=(2,)).log_prob(torch.zeros(1, 2))  # log(1/4) for each
        tensor([-2.7726])
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)

    def log_density(self, x: Tensor) -> Tensor:
        return functional.logsigmoid(x) + functional.logsigmoid(-x)

    def draw(self, size: TensorShape) -> Tensor:
        return open_uniform(size, self.origin).logit()


@register_prior("uniform")
class Uniform(_Standard):
    """Independent numbers, uniform between two ends: ``log p(z) = -numbers log(high - low)``, -inf outside.

    Use it behind a `sigmoid`, for a copula or to test how even the states are.

    All states are equally likely, so that there is no temperature but 1.

    Args:
        low: the lower end.
        high: the upper end, which must be above it.
        shape: the shape of the state, without the batch.

    Raises:
        InvflowError: high is not above low.

    Examples:
        >>> Uniform(low=-1, high=1, shape=(2,)).log_prob(torch.tensor([[0.0, 0.5], [0.0, 1.5]]))
        tensor([-1.3863,    -inf])
    """

    def __init__(self, low: float = 0.0, high: float = 1.0, *, shape: Shape) -> None:
        super().__init__(shape)
        if not low < high:
            raise InvflowError(f"the uniform prior expects low below high, got {low} and {high}")
        self.low = low
        self.high = high

    def log_density(self, x: Tensor) -> Tensor:
        outside = (x < self.low) | (x > self.high)
        # `0 x`: the gradient is 0, and NaN stays NaN.
        return (0 * x - math.log(self.high - self.low)).masked_fill(outside, -math.inf)

    def draw(self, size: TensorShape) -> Tensor:
        return torch.lerp(self.origin + self.low, self.origin + self.high, open_uniform(size, self.origin))

    def sample(self, count: int, temperature: float = 1.0) -> State:
        if temperature != 1:
            raise InvflowError(f"the uniform prior expects a temperature of 1, got {temperature}: no state is likelier")
        return super().sample(count)


@register_prior("student_t")
class StudentT(_Standard):
    """Independent numbers with Student's t distribution: ``p(z) ~ prod (1 + z^2 / df)^(-(df + 1) / 2)``.

    Use it for data with outliers.

    Far out, log-densities and their gradients grow with log z, not z^2, so that outliers in the data pull less on the
    weights. The temperature multiplies the samples.

    Reference: Alexanderson, Henter: Robust Model Training and Generalisation with Studentising Flows, 2020,
    https://arxiv.org/abs/2006.06599

    Args:
        df: the degrees of freedom: 1 is the Cauchy distribution, infinitely many the normal one.
        shape: the shape of the state, without the batch.

    Examples:
        >>> StudentT(df=1, shape=(1,)).log_prob(torch.zeros(1, 1))  # log(1 / pi)
        tensor([-1.1447])
    """

    def __init__(self, df: PositiveFloat = 4.0, *, shape: Shape) -> None:
        super().__init__(shape)
        self.df = df
        self.log_factor = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2

    def log_density(self, x: Tensor) -> Tensor:
        return self.log_factor - (self.df + 1) / 2 * torch.log1p(x.square() / self.df)

    def draw(self, size: TensorShape) -> Tensor:
        # A normal number over the root of a chi-square one. Gammas have no half precision.
        wide = self.origin.to(torch.promote_types(self.origin.dtype, torch.float32))
        half = torch.full_like(wide, self.df / 2)
        squares: Tensor = Gamma(half, half, validate_args=False).sample(torch.Size(size))
        return (torch.randn_like(squares) * squares.rsqrt()).to(self.origin.dtype)


@register_prior("normal")
class Normal(Prior):
    """Independent normal numbers with trained means and scales, which begin as standard ones.

    Use it if the chain preserves volume, so that something has to learn the scales.

    ``log p(z) = -1/2 sum(((z - mean) / scale)^2 + log 2 pi) - sum(log scale)``. The temperature multiplies the scales.

    Args:
        shape: the shape of the state, without the batch.

    Examples:
        >>> Normal(shape=(2,)).log_prob(torch.zeros(1, 2))
        tensor([-1.8379], grad_fn=<SumBackward1>)
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.mean = nn.Parameter(torch.zeros(flat_size(shape)))
        self.log_scale = nn.Parameter(torch.zeros(flat_size(shape)))

    def log_prob(self, z: State) -> Tensor:
        return normal_log_prob(self.numbers(z), self.mean, self.log_scale)

    def sample(self, count: int, temperature: float = 1.0) -> State:
        noise = torch.randn((count, len(self.mean)), dtype=self.mean.dtype, device=self.mean.device)
        return unflatten(self.mean + temperature * self.log_scale.exp() * noise, self.shape)


def normal_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """The log-density of independent normal numbers, summed over the last dimension."""
    standard = (x - mean) * torch.exp(-log_scale)
    return (-0.5 * (standard.square() + LOG_2_PI) - log_scale).sum(-1)


def open_uniform(size: TensorShape, like: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), so that both ends have a logit; half a step of `torch.rand` stands for 0."""
    drawn = torch.rand(size, dtype=like.dtype, device=like.device)
    return drawn.clamp(min=torch.finfo(like.dtype).eps / 4)
