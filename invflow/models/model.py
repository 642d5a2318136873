"""Classifiers, chains of bijections with a head on top, and flows, chains with a prior."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..arguments import one_line
from ..bijection import Handled
from ..errors import ShapeError
from ..sequential import Sequential
from ..state import State, leaves, shape_of
from .priors import Prior


def caveat(chain: Sequential, head: nn.Module | type[nn.Module] | None = None) -> str:
    """What must precede any statement about the inverse of a model; empty if the model is invertible.

    A head that is linear in the features counts as invertible; any other head hides what is below it.

    Args:
        chain: the trunk.
        head: the head or its class; None for a chain alone or under a prior.

    Examples:
        >>> from invflow.bijections import Psi
        >>> from invflow.models import ConvNetHead
        >>> caveat(Sequential(Psi(2)), ConvNetHead)
        'not invertible: only psi is, because the head has layers of its own'
    """
    found = []
    if head is not None and not getattr(head, "linear_in_features", False):
        tags = list(dict.fromkeys(layer.tag for layer in chain))
        parts = f"{', '.join(tags)} {'is' if len(tags) == 1 else 'are'}" if tags else "the empty chain is"
        found.append(f"not invertible: only {parts}, because the head has layers of its own")
    if not chain.surjective:
        found.append(f"inverse on its image only, because it adds dimensions: {_that_widen(chain)}")
    return "; ".join(found)


def _that_widen(chain: Sequential) -> str:
    """The layers that add dimensions."""
    return ", ".join(layer.tag for layer in chain if not layer.surjective)


class _Model(Handled):
    """A trunk with one module on top."""

    def __init__(self, bijection: Sequential) -> None:
        super().__init__()
        self.bijection = bijection

    def inverse(self, features: Any, context: Tensor | None = None) -> Any:
        """The input that the trunk maps to these features."""
        return self.bijection.inverse(features, context)

    @property
    def caveat(self) -> str:
        """What must precede any statement about the model's inverse; empty if it is invertible."""
        return caveat(self.bijection, getattr(self, "head", None))

    def __repr__(self) -> str:
        trunk, *top = self.children()
        lines = [*repr(trunk).splitlines(), *map(one_line, top)]
        return "\n".join([f"{type(self).__name__}(", *("  " + line for line in lines), ")"])


class Classifier(_Model):
    """Class scores from the last state of a chain: ``logits = head(bijection(x))``.

    Args:
        bijection: the invertible trunk, a chain.
        head: maps the trunk's last state to logits of shape ``(batch, classes)``.

    Attributes:
        linear_head: whether the logits are a linear function of the features, so that the whole model is invertible
            up to its last linear layer.

    Examples:
        >>> import torch, invflow
        >>> model = Classifier(invflow.Sequential(), invflow.models.LinearHead(classes=3, shape=(4,)))
        >>> model(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, bijection: Sequential, head: nn.Module) -> None:
        super().__init__(bijection)
        self.head = head

    @property
    def linear_head(self) -> bool:
        return bool(getattr(self.head, "linear_in_features", False))

    def features(self, x: Any, context: Tensor | None = None) -> Any:
        """The state after the last invertible layer, which ``bijection.inverse`` maps back to ``x``."""
        return self.bijection(x, context)

    def forward(self, x: Any, context: Tensor | None = None) -> Tensor:
        """Logits, ``(batch, classes)``."""
        return self.head(self.features(x, context))  # type: ignore[no-any-return]


class Flow(_Model):
    """The density of x, for a chain that turns x into a sample of the prior.

    ``log p(x) = log prior(f(x)) + log |det df/dx|``. Calling the module is `log_prob`.

    Reference: Rezende, Mohamed: Variational Inference with Normalizing Flows, 2015, https://arxiv.org/abs/1505.05770

    Args:
        bijection: f, a chain from data to the prior's states.
        prior: the distribution of f(x).

    Raises:
        ShapeError: the chain adds dimensions, so that there is no density; if it does so without declaring it, a call
            raises the error.

    Examples:
        >>> import torch
        >>> from invflow.models import StandardNormal
        >>> flow = Flow(Sequential(), StandardNormal(shape=(2,)))
        >>> flow.log_prob(torch.zeros(3, 2)).shape, flow.sample(5).shape
        (torch.Size([3]), torch.Size([5, 2]))
    """

    def __init__(self, bijection: Sequential, prior: Prior) -> None:
        super().__init__(bijection)
        if not bijection.surjective:
            names = _that_widen(bijection)
            raise ShapeError(f"a flow expects a chain that adds no dimensions, got one with {names}; put a head on it")
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
            count: the number of samples.
            context: one row, or one for each sample.
            temperature: below 1, the prior's samples are nearer to the most likely states, and so, roughly, are these.
        """
        try:
            z = self.prior.sample(count, temperature)
        except (TypeError, RuntimeError) as error:
            if isinstance(count, int) and count >= 0:
                raise
            raise ShapeError(f"a flow expects a whole number of samples, at least 0, got {count!r}") from error
        z = self.bijection.numerics.nearest(z)
        x = self.bijection.inverse(z, context)
        _require_equal_sizes(x, z)
        return x

    def forward(self, x: Any, context: Tensor | None = None) -> Tensor:
        return self.log_prob(x, context)


def _require_equal_sizes(x: State, z: State) -> None:
    """Refuses a change of size, for which there is no density: any number would be wrong."""
    if sum(leaf.numel() for leaf in leaves(x)) != sum(leaf.numel() for leaf in leaves(z)):
        raise ShapeError(
            f"a flow expects its chain to keep the size of the state, got the shapes {shape_of(x)} and {shape_of(z)}; "
            "a layer that adds dimensions is an invflow.Injection, which belongs below a head"
        )
