"""Classifiers, chains of bijections with a head on top, and flows, chains with a prior."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from ..arguments import one_line
from ..bijection import Bijection, Handled
from ..bijections.inverse import given_to
from ..context import Context, ContextShape, each_entry, rows_of, seen, spread
from ..errors import InvflowError, ShapeError
from ..registry import priors
from ..sequential import Sequential
from ..state import Shape, State, leaves, map_state, shape_of, zeros
from .context_net import ContextNet
from .dequantization import Dequantizer
from .distribution import FlowDistribution
from .heads import BayesHead
from .levels import levels_of, others, tells_the_prior
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
    found, reasons = [], []
    if head is not None and not getattr(head, "linear_in_features", False):
        reasons.append("the head has layers of its own")
    if not chain.invertible:
        reasons.append("a joint has no inverse")
    if reasons:
        tags = _tags(layer for layer in chain if layer.invertible)
        parts = f"{tags} {'are' if ',' in tags else 'is'}" if tags else "the empty chain is"
        found.append(f"not invertible: only {parts}, because {' and '.join(reasons)}")
    wider = _that_widen(chain)
    if wider:
        found.append(f"inverse on its image only, because it adds dimensions: {wider}")
    return "; ".join(found)


def _that_widen(chain: Sequential) -> str:
    """The layers that add dimensions."""
    return _tags(layer for layer in chain if layer.invertible and not layer.surjective)


def _tags(layers: Iterable[Bijection]) -> str:
    return ", ".join(dict.fromkeys(layer.tag for layer in layers))


class _Model(Handled):
    """A trunk with one module on top, and perhaps a net for its context."""

    gathered_calls: ClassVar[tuple[str, ...]] = ("inverse", "for_layers")

    def __init__(self, bijection: Sequential, context_net: ContextNet | None) -> None:
        super().__init__()
        self.bijection = bijection
        self.context_net = context_net

    def inverse(self, features: Any, context: Context = None) -> Any:
        """The input that the trunk maps to these features."""
        return self.bijection.inverse(features, self.for_layers(context))

    @property
    def context_shape(self) -> ContextShape:
        """The shape of the model's context, without the batch; None if it takes none, or if it is not known."""
        return self.bijection.declared_context_shape if self.context_net is None else self.context_net.context_shape

    def for_layers(self, context: Context) -> Any:
        """What the trunk is given of the model's context: what the context_net makes of it, if there is one."""
        return context if self.context_net is None else self.context_net(context)

    def require_context(self, context: Context) -> int:
        """The number of rows of a context, which must be one that the model was built for.

        Raises:
            ShapeError: a context that is missing, not wanted, or of other names, shapes or dtypes.
        """
        return (self.bijection.require_context if self.context_net is None else self.context_net.require)(context)

    @property
    def caveat(self) -> str:
        """What must precede any statement about the model's inverse; empty if it is invertible."""
        return caveat(self.bijection, getattr(self, "head", None))

    def __repr__(self) -> str:
        beside = (self.context_net, getattr(self, "dequantizer", None))
        trunk, *top = (part for part in self.children() if part not in beside)
        lines = [*repr(trunk).splitlines(), *map(one_line, top)]
        return "\n".join([f"{type(self).__name__}(", *("  " + line for line in lines), ")"])


class Classifier(_Model):
    """Class scores from the last state of a chain: ``logits = head(bijection(x))``, which calling it returns.

    Args:
        bijection: the invertible trunk, a chain.
        head: maps the trunk's last state to logits of shape ``(batch, classes)``.
        context_net: turns the context into what the trunk is given.

    Attributes:
        linear_head: whether the logits are a linear function of the features, so that the whole model is invertible
            up to its last linear layer.

    Examples:
        >>> import torch, invflow
        >>> model = Classifier(invflow.Sequential(), invflow.models.LinearHead(classes=3, shape=(4,)))
        >>> model(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    gathered_calls: ClassVar[tuple[str, ...]] = ("features", "scores", "logits")

    def __init__(self, bijection: Sequential, head: nn.Module, context_net: ContextNet | None = None) -> None:
        super().__init__(bijection, context_net)
        if isinstance(head, BayesHead):
            raise InvflowError("a bayes head expects a gaussian_mixture prior beside it, got none; take another head")
        self.head = head

    @property
    def linear_head(self) -> bool:
        return bool(getattr(self.head, "linear_in_features", False))

    def features(self, x: Any, context: Context = None) -> Any:
        """The state after the last invertible layer, which ``bijection.inverse`` maps back to ``x``."""
        return self.bijection(x, self.for_layers(context))

    def scores(self, features: Any) -> Tensor:
        """The logits of features."""
        return self.head(features)  # type: ignore[no-any-return]

    def logits(self, x: Any, context: Context = None) -> Tensor:
        """Logits, ``(batch, classes)``."""
        return self.scores(self.features(x, context))

    def forward(self, x: Any, context: Context = None) -> Any:
        return self.logits(x, context)


class Flow(_Model):
    """The density of x, for a chain that turns x into a sample of the prior.

    ``log p(x) = log prior(f(x)) + log |det df/dx|``. Calling the module is `log_prob`.

    Reference: Rezende, Mohamed: Variational Inference with Normalizing Flows, 2015, https://arxiv.org/abs/1505.05770

    A context conditions the chain, and the prior if it takes one: then this is the density of x given the context.

    On a grid, each `factor_out` with a net gives the distribution of what it takes out, given what goes on:
    ``log p(x) = log prior(z_L) + sum_k log p(z_k | net_k(h_k))``, as in integer discrete flows.

    Args:
        bijection: f, a chain from data to the prior's states.
        prior: the distribution of f(x); it is given the context itself.
        context_net: turns the context into what f is given.
        dequantizer: draws the noise of pixels in training and evaluation; None for uniform noise.

    Raises:
        ShapeError: the chain adds dimensions, so that there is no density; if it does so without declaring it, a call
            raises the error.

    Examples:
        >>> import torch
        >>> from invflow.models import StandardNormal
        >>> flow = Flow(Sequential(), StandardNormal(shape=(2,)))
        >>> flow.log_prob(torch.zeros(3, 2)).shape, flow.sample(5).shape
        (torch.Size([3]), torch.Size([5, 2]))
        >>> flow.sample(5, torch.eye(4)).shape  # for each of four rows of context
        torch.Size([5, 4, 2])
    """

    gathered_calls: ClassVar[tuple[str, ...]] = (
        "log_prob",
        "features_and_log_prob",
        "sample",
        "sample_with_log_prob",
        "latent",
    )

    def __init__(
        self,
        bijection: Sequential,
        prior: Prior,
        context_net: ContextNet | None = None,
        dequantizer: Dequantizer | None = None,
    ) -> None:
        super().__init__(bijection, context_net)
        if not isinstance(prior, Prior):
            raise InvflowError(
                f"a flow expects a prior that is an invflow.models.Prior, got {type(prior).__name__}; subclass it"
            )
        if not bijection.invertible:
            raise ShapeError("a flow expects a chain that has an inverse, got one with a joint; put a head on it")
        if not bijection.surjective:
            names = _that_widen(bijection)
            raise ShapeError(f"a flow expects a chain that adds no dimensions, got one with {names}; put a head on it")
        self.prior = prior
        self.dequantizer = dequantizer
        self.levels = levels_of(bijection)
        if self.levels and not prior.takes_parameters:
            raise InvflowError(
                f"on a grid, a factor_out with a net expects a prior that takes its numbers, discretized_logistic, got "
                f"{priors.name_of(type(prior))}; take that, or leave out the net"
            )

    @property
    def shape(self) -> Shape:
        """The shape of x, without the batch.

        Raises:
            ShapeError: the chain was not built from a spec, and its inverse does not run without a context.
        """
        declared = self.bijection.declared_shape
        return self.bijection.input_shape(self.prior.shape) if declared is None else declared

    def log_prob(self, x: Any, context: Context = None) -> Tensor:
        """The log-density of each sample, in nats, ``(batch,)``.

        Args:
            x: the samples, with the batch.
            context: one row, or one for each sample.
        """
        return self.features_and_log_prob(x, context)[1]

    def features_and_log_prob(self, x: Any, context: Context = None) -> tuple[Any, Tensor]:
        """f(x), and `log_prob`, from one pass."""
        if self.levels:
            return self._by_levels(x, context)
        z, log_det = self.bijection.forward_and_log_det(x, self.for_layers(context))
        _require_equal_sizes(x, z)
        _require_one_each(log_det)
        return z, self._prior_log_prob(z, context) + log_det

    def sample(self, count: int, context: Context = None, *, temperature: float = 1.0) -> Any:
        """Samples, ``(count, ...)``, or with a context ``(count, rows, ...)``: as many for each of its rows.

        They are differentiable with respect to the weights and the context, if the prior is `reparametrized`.

        Args:
            count: the number of samples.
            context: a batch of rows, for each of which samples are drawn.
            temperature: below 1, the prior's samples are nearer to the most likely states, and so, roughly, are these;
                each prior says what it multiplies.
        """
        x, _ = self._drawn(count, context, temperature)
        return _by_row(x, count, context)

    def sample_with_log_prob(
        self, count: int, context: Context = None, *, temperature: float = 1.0
    ) -> tuple[Any, Tensor]:
        """Samples as those of `sample`, and `log_prob` of each, ``(count,)`` or ``(count, rows)``, from one pass.

        The pass runs backwards: ``log p(x) = log prior(z) - log |det dx/dz|``. Gradients reach the weights through
        both, so that the mean of ``log_prob - log target(x)`` is trained by reverse Kullback-Leibler divergence. The
        density is that at temperature 1, whatever the samples' temperature.

        Args:
            count: as in `sample`.
            context: as in `sample`.
            temperature: as in `sample`.

        Examples:
            >>> import torch
            >>> from invflow.models import StandardNormal
            >>> x, log_prob = Flow(Sequential(), StandardNormal(shape=(2,))).sample_with_log_prob(5, torch.eye(4))
            >>> x.shape, log_prob.shape
            (torch.Size([5, 4, 2]), torch.Size([5, 4]))
        """
        if self.levels:
            x, rows = self._drawn(count, context, temperature)
            return _by_row(x, count, context), _by_row(self.log_prob(x, rows), count, context)
        z, rows = self.latent(count, context, temperature=temperature)
        x, log_det = self.bijection.inverse_and_log_det(z, self.for_layers(rows))
        _require_equal_sizes(x, z)
        _require_one_each(log_det)
        # -inf in either direction says that there is no density.
        change = (-log_det).masked_fill(log_det == -math.inf, -math.inf)
        log_prob = self._prior_log_prob(z, rows) + change
        return _by_row(x, count, context), _by_row(log_prob, count, context)

    def latent(self, count: int, context: Context = None, *, temperature: float = 1.0) -> tuple[State, Any]:
        """What `sample` turns into samples: ``count * rows`` states of the prior, and the context of each.

        The rows of the context take turns; if there is only one, it is returned as it is.
        """
        try:
            number = operator.index(count)
        except TypeError:
            number = -1
        if number < 0:
            raise ShapeError(f"a flow expects a whole number of samples, at least 0, got {count!r}")
        if not temperature >= 0:
            raise InvflowError(f"a flow expects a temperature of at least 0, got {temperature!r}")
        count = self.require_context(context)
        rows: Any = context
        if context is not None and count != 1:
            rows = each_entry(lambda entry: entry.repeat(number, *[1] * (entry.dim() - 1)), spread(context, count))
            number *= count
        given = self._for_prior(rows)
        drawn = self.bijection.numerics.nearest(self.prior.sample(number, temperature, *given))
        return (self._with_levels(drawn, rows, temperature) if self.levels else drawn), rows

    def distribution(self, context: Context = None, validate_args: bool | None = None) -> FlowDistribution:
        """The flow as a `torch.distributions.Distribution`, for pyro, sbi and whatever else takes one.

        Its batch_shape is the number of rows of the context, or () without one, its event_shape the shape of x. It
        reads the flow's weights when it is used, so that gradients of `log_prob` and `rsample` reach them.

        Args:
            context: a batch of rows.
            validate_args: as in torch: whether arguments are checked, which is its default.

        Raises:
            ShapeError: the flow is over tuples of tensors, or the context does not fit.

        Examples:
            >>> import torch
            >>> from invflow.models import StandardNormal
            >>> given = Flow(Sequential(), StandardNormal(shape=(2,))).distribution(torch.eye(4))
            >>> given.batch_shape, given.event_shape, given.sample((7, 5)).shape
            (torch.Size([4]), torch.Size([2]), torch.Size([7, 5, 4, 2]))
            >>> given.log_prob(torch.zeros(2)).shape
            torch.Size([4])
        """
        self.require_context(context)
        return FlowDistribution(self, context, validate_args)

    def forward(self, x: Any, context: Context = None) -> Any:
        return self.log_prob(x, context)

    def _drawn(self, count: int, context: Context, temperature: float) -> tuple[Any, Any]:
        """``count * rows`` samples, and the context of each."""
        z, rows = self.latent(count, context, temperature=temperature)
        x = self.bijection.inverse(z, self.for_layers(rows))
        _require_equal_sizes(x, z)
        return x, rows

    def _by_levels(self, x: Any, context: Context) -> tuple[Any, Tensor]:
        """f(x), and its log-probability, the levels as the nets say that made them."""
        given, found = self.bijection.admit(x, self.for_layers(context)), list[Tensor]()
        z: Any = x
        for step, z in self.bijection.states_after(x, given, tells_the_prior):
            if step is not None and tells_the_prior(step.layer):
                *_, done, goes_on = z
                told = step.layer.told(goes_on, given_to(step, given))
                found.append(self.prior.log_prob_given(done, *told))
        self._require_levels(len(found))
        return z, sum(found, self._prior_log_prob(others(z, self.levels), context))

    def _with_levels(self, drawn: Any, context: Context, temperature: float) -> State:
        """A last state whose levels are drawn, each given those that were done after it."""
        chain, rest = self.bijection, drawn if isinstance(drawn, tuple) else (drawn,)
        like = next(leaves(drawn))
        shape: Any = chain.declared_output_shape
        state: Any = (*zeros(shape[: self.levels], len(like), dtype=like.dtype, device=like.device), *rest)
        given = chain.admit(state, self.for_layers(context), backwards=True)
        found: list[Tensor] = []
        for step in reversed(chain.steps()):
            if tells_the_prior(step.layer):
                *before, _, goes_on = state
                told = step.layer.told(goes_on, given_to(step, given))
                done = chain.numerics.nearest(self.prior.sample_given(*told, temperature=temperature))
                found.insert(0, done)  # type: ignore[arg-type]
                state = (*before, done, goes_on)
            state = step.before(state, given)
        self._require_levels(len(found))
        return (*found, *rest)

    def _require_levels(self, found: int) -> None:
        """Refuses a chain in which hooks, such as those of sharding, hide a layer that the constructor found."""
        if found != self.levels:
            raise InvflowError(
                f"a flow on a grid expects {self.levels} factor_out with a net in its chain, and can reach {found}: "
                "put no hook on, and do not shard, a layer that holds one; do so with the factor_out itself"
            )

    def _prior_log_prob(self, z: State, context: Context) -> Tensor:
        return self.prior.log_prob(z, *self._for_prior(context))

    def _for_prior(self, context: Context) -> tuple[Any, ...]:
        return (seen(context, self.prior.sees),) if self.prior.takes_context else ()


def _by_row(drawn: Any, count: int, context: Context) -> Any:
    """``(count * rows, ...)`` as ``(count, rows, ...)``."""
    if context is None:
        return drawn
    return map_state(lambda leaf: leaf.reshape(count, rows_of(context), *leaf.shape[1:]), drawn)


def _require_one_each(log_det: Tensor) -> None:
    if log_det.dim() != 1:
        raise ShapeError(f"a flow expects log-determinants of shape (batch,), got {tuple(log_det.shape)}")


def _require_equal_sizes(x: State, z: State) -> None:
    """Refuses a change of size, for which there is no density: any number would be wrong."""
    if sum(leaf.numel() for leaf in leaves(x)) != sum(leaf.numel() for leaf in leaves(z)):
        raise ShapeError(
            f"a flow expects its chain to keep the size of the state, got the shapes {shape_of(x)} and {shape_of(z)}; "
            "a layer that adds dimensions is an invflow.Injection, which belongs below a head"
        )
