"""A chain of bijections with a prior: a density."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..bijection import one_line
from ..numerics.grid import onto_grid
from ..sequential import Sequential
from .priors import Prior


class Flow(nn.Module):
    """The density of x where the chain turns x into a sample of the prior.

    ``log p(x) = log prior(f(x)) + log |det df/dx|``. Calling the module is `log_prob`.

    Reference: Rezende, Mohamed: Variational Inference with Normalizing Flows, 2015, https://arxiv.org/abs/1505.05770

    Args:
        bijection: f, a chain from data to the prior's states.
        prior: the distribution of f(x).

    >>> import torch
    >>> from invflow.models import StandardNormal
    >>> flow = Flow(Sequential(), StandardNormal(shape=(2,)))
    >>> flow.log_prob(torch.zeros(3, 2)).shape, flow.sample(5).shape
    (torch.Size([3]), torch.Size([5, 2]))
    """

    def __init__(self, bijection: Sequential, prior: Prior) -> None:
        super().__init__()
        self.bijection = bijection
        self.prior = prior

    def log_prob(self, x: Any, context: Tensor | None = None) -> Tensor:
        """The log-density of each sample, in nats, ``(batch,)``."""
        z, log_det = self.bijection.forward_and_log_det(x, context)
        return self.prior.log_prob(z) + log_det

    def sample(self, count: int, context: Tensor | None = None, *, temperature: float = 1.0) -> Any:
        """``count`` samples, differentiable with respect to the weights.

        Args:
            count: how many.
            context: one row per sample.
            temperature: below 1 the prior's samples lie closer to what is most likely, and so, roughly, do these.
        """
        return self.bijection.inverse(
            onto_grid(self.prior.sample(count, temperature), self.bijection.numerics), context
        )

    def forward(self, x: Any, context: Tensor | None = None) -> Tensor:
        return self.log_prob(x, context)

    def __repr__(self) -> str:
        lines = [*repr(self.bijection).splitlines(), one_line(self.prior)]
        return "\n".join(["Flow(", *("  " + line for line in lines), ")"])
