"""Models of both the class and the density."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..context import Context
from ..errors import InvflowError
from ..sequential import Sequential
from .context_net import ContextNet
from .dequantization import Dequantizer
from .heads import BayesHead
from .mixture_priors import GaussianMixture
from .model import Classifier, Flow
from .priors import Prior


class Hybrid(Classifier, Flow):
    """A class and a density of x from one chain: ``logits = head(f(x))``, ``log p(x) = log prior(f(x)) + log |df/dx|``.

    It is a `Classifier` and a `Flow`, with all that they can do. Calling it returns both, ``(logits, log_prob)``, from
    one pass.

    Reference: Nalisnick, Matsukawa, Teh, Gorur, Lakshminarayanan: Hybrid Models with Deep and Invertible Features,
    2019, https://arxiv.org/abs/1902.02767

    Args:
        bijection: f, a chain from data to the prior's states.
        head: maps f(x) to logits of shape ``(batch, classes)``; a `BayesHead` does so by the components of the prior.
        prior: the distribution of f(x).
        context_net: turns the context into what f is given.
        dequantizer: as of a `Flow`.

    Raises:
        InvflowError: a `BayesHead` beside a prior that is no mixture, or one whose component is given by the context.
        ShapeError: as for a `Flow`.

    Examples:
        >>> import torch
        >>> from invflow.models import GaussianMixture
        >>> model = Hybrid(Sequential(), BayesHead(), GaussianMixture(components=3, shape=(2,)))
        >>> logits, log_prob = model(torch.zeros(5, 2))
        >>> logits.shape, log_prob.shape, torch.allclose(logits.logsumexp(1), log_prob)
        (torch.Size([5, 3]), torch.Size([5]), True)
    """

    def __init__(
        self,
        bijection: Sequential,
        head: nn.Module,
        prior: Prior,
        context_net: ContextNet | None = None,
        dequantizer: Dequantizer | None = None,
    ) -> None:
        Flow.__init__(self, bijection, prior, context_net, dequantizer)
        if isinstance(head, BayesHead) and not (isinstance(prior, GaussianMixture) and not prior.takes_context):
            raise InvflowError(
                'a bayes head expects a gaussian_mixture prior with a component for each class, and without "by"'
            )
        self.head = head

    def scores(self, features: Any) -> Tensor:
        return self.head(features, self.prior) if isinstance(self.head, BayesHead) else super().scores(features)

    def forward(self, x: Any, context: Context = None) -> Any:
        """``(logits, log_prob)``, of shapes ``(batch, classes)`` and ``(batch,)``."""
        z, log_prob = self.features_and_log_prob(x, context)
        return self.scores(z), log_prob
