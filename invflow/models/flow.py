"""A chain of bijections with a prior: a density."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..arguments import one_line
from ..errors import ShapeError
from ..sequential import Sequential
from ..state import State, leaves, shape_of
from .priors import Prior


class Flow(nn.Module):
    """The density of x where the chain turns x into a sample of the prior.

    ``log p(x) = log prior(f(x)) + log |det df/dx|``. Calling the module is `log_prob`.

    Reference: Rezende, Mohamed: Variational Inference with Normalizing Flows, 2015, https://arxiv.org/abs/1505.05770

    Args:
        bijection: f, a chain from data to the prior's states.
        prior: the distribution of f(x).

    Raises:
        ShapeError: the chain adds dimensions, so that images have no density; a call raises it if the chain does so
            without saying so.

    Examples:
        >>> import torch
        >>> from invflow.models import StandardNormal
        >>> flow = Flow(Sequential(), StandardNormal(shape=(2,)))
        >>> flow.log_prob(torch.zeros(3, 2)).shape, flow.sample(5).shape
        (torch.Size([3]), torch.Size([5, 2]))
    """

    def __init__(self, bijection: Sequential, prior: Prior) -> None:
        super().__init__()
        if not bijection.surjective:
            names = ", ".join(layer.tag for layer in bijection if not layer.surjective)
            raise ShapeError(f"a flow expects a chain that adds no dimensions, got one with {names}; put a head on it")
        self.bijection = bijection
        self.prior = prior

    def log_prob(self, x: Any, context: Tensor | None = None) -> Tensor:
        """The log-density of each sample, in nats, ``(batch,)``."""
        z, log_det = self.bijection.forward_and_log_det(x, context)
        _require_equal_sizes(x, z)
        if log_det.dim() != 1:
            raise ShapeError(f"a flow expects log-determinants of shape (batch,), got {tuple(log_det.shape)}")
        return self.prior.log_prob(z) + log_det

    def sample(self, count: int, context: Tensor | None = None, *, temperature: float = 1.0) -> Any:
        """``count`` samples, differentiable with respect to the weights.

        Args:
            count: how many.
            context: one row per sample.
            temperature: below 1 the prior's samples lie closer to what is most likely, and so, roughly, do these.
        """
        z = self.bijection.numerics.nearest(self.prior.sample(count, temperature))
        x = self.bijection.inverse(z, context)
        _require_equal_sizes(x, z)
        return x

    def inverse(self, features: Any, context: Tensor | None = None) -> Any:
        """The x that the chain turns into these features, a state of the prior."""
        return self.bijection.inverse(features, context)

    def forward(self, x: Any, context: Tensor | None = None) -> Tensor:
        return self.log_prob(x, context)

    def __repr__(self) -> str:
        lines = [*repr(self.bijection).splitlines(), one_line(self.prior)]
        return "\n".join(["Flow(", *("  " + line for line in lines), ")"])


def _require_equal_sizes(x: State, z: State) -> None:
    """Refuses a change of size, for which there is no density: any number would be wrong."""
    if sum(leaf.numel() for leaf in leaves(x)) != sum(leaf.numel() for leaf in leaves(z)):
        raise ShapeError(
            f"a flow expects its chain to keep the number of numbers, got the shapes {shape_of(x)} and {shape_of(z)}; "
            "a layer that adds dimensions is an invflow.Injection, which belongs below a head"
        )
