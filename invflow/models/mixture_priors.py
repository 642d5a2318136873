"""Priors that are mixtures: of normal distributions, and of logistic ones on a grid."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional

from ..context import Context, ContextShape, shape_of_context
from ..errors import InvflowError, ShapeError
from ..registry import register_prior
from ..state import Shape, State, flat_size, unflatten
from .priors import Prior, normal_log_prob, open_uniform

COMPONENTS = 8
"""Of a Gaussian mixture, if nothing else is said."""

EXTREME = 60.0
"""The bound of log-scales of logistic distributions, within which they and their inverses are numbers of float32."""


@register_prior("gaussian_mixture")
class GaussianMixture(Prior):
    """A mixture of normal distributions with independent numbers: ``p(z) = sum_k weight_k N(z; mean_k, scale_k)``.

    Use it for data in clusters, or in classes.

    Means, scales and weights are trained; at first the weights are equal, the scales 1 and the means random. With
    ``"by": "context"``, there is one component for each number of the context, and no weights: a one-hot context of
    classes chooses the component of its class, so that ``p(z | c) = N(z; mean_c, scale_c)``. Any other context gets the
    means and log-scales that are linear in it. With scales of 1, Bayes' rule for the class is then linear in z.

    The temperature multiplies the scales.

    Reference: Izmailov, Kirichenko, Finzi, Wilson: Semi-Supervised Learning with Normalizing Flows, 2019,
    https://arxiv.org/abs/1912.13025

    Args:
        components: the number of components; by default 8, or as many as the context has numbers.
        by: "context" if the context chooses the component; null if it is drawn.
        spread: the standard deviation of the means at first; equal components of one mixture would stay equal.
        learn_scales: whether the scales are trained; otherwise they are 1.
        shape: the shape of the state, without the batch.
        context_shape: the shape of the context, without the batch; required only with ``"by": "context"``.

    Raises:
        ShapeError: the context is no vector, or has another size than there are components.

    Examples:
        >>> prior = GaussianMixture(by="context", spread=0, shape=(2,), context_shape=(10,))
        >>> prior.log_prob(torch.zeros(1, 2), torch.eye(10)[:1])
        tensor([-1.8379], grad_fn=<SumBackward1>)
    """

    def __init__(
        self,
        components: PositiveInt | None = None,
        by: Literal["context"] | None = None,
        spread: NonNegativeFloat = 1.0,
        learn_scales: bool = True,
        *,
        shape: Shape,
        context_shape: ContextShape = None,
    ) -> None:
        super().__init__(shape)
        self.takes_context = self.reparametrized = by is not None
        if self.takes_context:
            sizes = context_shape if isinstance(context_shape, tuple) else ()
            if len(sizes) != 1 or components not in (None, sizes[0]):
                features = "features" if components is None else components
                raise ShapeError(
                    f"the gaussian_mixture prior by context expects one ({features},), got {context_shape}"
                )
            (number,) = sizes
        else:
            number = COMPONENTS if components is None else components
            self.logits = nn.Parameter(torch.zeros(number))
        self.means = nn.Parameter(spread * torch.randn(number, flat_size(shape)))
        self.log_scales = nn.Parameter(torch.zeros(number, flat_size(shape))) if learn_scales else None

    def component_log_prob(self, z: State) -> Tensor:
        """The log-density of each component, without its weight, ``(batch, components)``."""
        return normal_log_prob(self.numbers(z)[:, None], self.means, self._log_scales())

    def joint_log_prob(self, z: State) -> Tensor:
        """``log(weight_k N(z; mean_k, scale_k))`` for each component k, ``(batch, components)``."""
        return self.component_log_prob(z) + self.logits.log_softmax(0)

    def log_prob(self, z: State, context: Context = None) -> Tensor:
        if self.takes_context:
            return normal_log_prob(self.numbers(z), *self._chosen(context))
        return self.joint_log_prob(z).logsumexp(1)

    def sample(self, count: int, temperature: float = 1.0, context: Context = None) -> State:
        if self.takes_context:
            mean, log_scale = self._chosen(context)
        else:
            chosen = _choose(self.logits, count)
            mean, log_scale = self.means[chosen], self._log_scales()[chosen]
        noise = torch.randn((count, self.means.shape[1]), dtype=mean.dtype, device=mean.device)
        return unflatten(mean + temperature * log_scale.exp() * noise, self.shape)

    def _chosen(self, context: Context) -> tuple[Tensor, Tensor]:
        """The mean and the log-scale for each row of the context."""
        if not isinstance(context, Tensor) or context.shape[1:] != self.means.shape[:1]:
            came = "none" if context is None else shape_of_context(context)
            raise ShapeError(f"the gaussian_mixture prior expects a context ({len(self.means)},), got {came}")
        weights = context.to(self.means.dtype)
        return weights @ self.means, weights @ self._log_scales()

    def _log_scales(self) -> Tensor:
        return torch.zeros_like(self.means) if self.log_scales is None else self.log_scales


@register_prior("discretized_logistic")
class DiscretizedLogistic(Prior):
    """Mixtures of logistic distributions on a grid: the probability of each number's cell, not a density.

    Use it for pixels as integers, with numerics on a grid: what lossless coding needs.

    A number of the grid, a multiple of ``1 / levels``, has the probability that the mixture gives to the interval of
    width ``1 / levels`` around it; with bounds, the cells at the ends reach to infinity. Numbers off the grid or out of
    the bounds have the probability 0. Each number of the state has a mixture of its own; weights, means and scales are
    trained. With one component and no bounds, it is the standard logistic distribution at first; else the components
    are spread over the bounds, or over the quantiles of that distribution.

    A model of integers, whose chain is on the grid too: "numerics" on the grid and additive couplings. What a
    `factor_out` with a net has taken out there has one logistic distribution for each number, of the log-scale and the
    mean that the net gives; the trained parameters are then those of the other numbers. The temperature
    multiplies the scales; whatever it is, samples are on the grid.

    Reference: Salimans, Karpathy, Chen, Kingma: PixelCNN++, 2017, https://arxiv.org/abs/1701.05517

    Args:
        levels: the inverse of the distance between neighbouring numbers; 2^b for b bits behind the point.
        components: the number of logistic distributions in each mixture.
        bounds: the least and the largest number, both on the grid; null if there are none.
        shape: the shape of the state, without the batch.

    Raises:
        InvflowError: the bounds are off the grid, or the first is above the second.

    Examples:
        >>> prior = DiscretizedLogistic(levels=2, bounds=(0, 0.5), shape=(1,))
        >>> prior.log_prob(torch.tensor([[0.0], [0.5], [0.25], [1.0]])).exp()
        tensor([0.5000, 0.5000, 0.0000, 0.0000], grad_fn=<ExpBackward0>)
    """

    reparametrized = False
    discrete = True
    takes_parameters = True

    def __init__(
        self,
        levels: PositiveInt = 256,
        components: PositiveInt = 5,
        bounds: tuple[float, float] | None = None,
        *,
        shape: Shape,
    ) -> None:
        super().__init__(shape)
        self.levels = levels
        self.ends = None if bounds is None else (round(bounds[0] * levels), round(bounds[1] * levels))
        places = (torch.arange(components) + 0.5) / components
        if bounds is None or self.ends is None:
            means, scale = places.logit(), 1.0
        else:
            low, high = self.ends
            # A bound that was written as a decimal fraction is on the grid up to its last digit.
            if low > high or max(abs(bounds[0] * levels - low), abs(bounds[1] * levels - high)) > 1e-6:
                raise InvflowError(
                    f"the discretized_logistic prior expects bounds that are multiples of 1/{levels}, the first not "
                    f"above the second, got {bounds[0]} and {bounds[1]}"
                )
            cells = high - low + 1
            means, scale = (low - 0.5 + cells * places) / levels, cells / (2 * components * levels)
        size = components, flat_size(shape)
        self.logits = nn.Parameter(torch.zeros(size))
        self.means = nn.Parameter(means[:, None].expand(size).clone())
        self.log_scales = nn.Parameter(torch.full(size, scale).log())

    def log_prob(self, z: State) -> Tensor:
        return self._log_prob(self.numbers(z), self.logits, self.log_scales, self.means)

    def log_prob_given(self, x: Tensor, log_scale: Tensor, mean: Tensor) -> Tensor:
        log_scale, mean = log_scale.flatten(1)[:, None], mean.flatten(1)[:, None]
        return self._log_prob(x.flatten(1), torch.zeros_like(mean), log_scale, mean)

    def _log_prob(self, given: Tensor, logits: Tensor, log_scales: Tensor, means: Tensor) -> Tensor:
        """The log-probability of numbers under mixtures, whose parameters are ``(..., components, numbers)``."""
        x = given.to(torch.promote_types(given.dtype, torch.float32))
        index = torch.round(x.detach() * self.levels)
        impossible = given != (index / self.levels).to(given.dtype)
        log_scales = log_scales.clamp(-EXTREME, EXTREME)
        inverse_scales, half = torch.exp(-log_scales), 0.5 / self.levels
        from_means = x[:, None] - means
        upper, lower = (from_means + half) * inverse_scales, (from_means - half) * inverse_scales
        # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)): a product, so that nothing is cancelled.
        below_upper, above_lower = functional.logsigmoid(upper), functional.logsigmoid(-lower)
        inside = torch.log(-torch.expm1(-inverse_scales / self.levels))
        if self.ends is not None:
            first, last = ((index == end)[:, None] for end in self.ends)
            below_upper = below_upper.masked_fill(last, 0)
            above_lower = above_lower.masked_fill(first, 0)
            inside = inside.expand_as(upper).masked_fill(first | last, 0)
            impossible = impossible | (index < self.ends[0]) | (index > self.ends[1])
        log_masses = (logits.log_softmax(-2) + below_upper + above_lower + inside).logsumexp(1)
        return log_masses.masked_fill(impossible, float("-inf")).sum(1)

    def sample(self, count: int, temperature: float = 1.0) -> State:
        chosen = _choose(self.logits.T, count)
        log_scale, mean = (one.gather(0, chosen) for one in (self.log_scales, self.means))
        return unflatten(self.sample_given(log_scale, mean, temperature), self.shape)

    def sample_given(self, log_scale: Tensor, mean: Tensor, temperature: float = 1.0) -> Tensor:
        wide = torch.promote_types(mean.dtype, torch.float32)
        scale, center = log_scale.detach().to(wide).clamp(-EXTREME, EXTREME).exp(), mean.detach().to(wide)
        noise = open_uniform(tuple(center.shape), center).logit()
        index = torch.round((center + temperature * scale * noise) * self.levels)
        if self.ends is not None:
            index = index.clamp(*self.ends)
        return (index / self.levels).to(mean.dtype)


def _choose(logits: Tensor, count: int) -> Tensor:
    """Components, ``(count, ...)`` for logits ``(..., components)``."""
    if not count:  # of which PyTorch draws none
        return torch.zeros((0, *logits.shape[:-1]), dtype=torch.long, device=logits.device)
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    drawn: Tensor = Categorical(logits=wide, validate_args=False).sample(torch.Size((count,)))  # type: ignore[no-untyped-call]
    return drawn
