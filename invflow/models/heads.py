"""Heads, which map the last state of a chain to logits."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from .._torch import made_by_sharding
from ..errors import InvflowError, ShapeError
from ..nets.activations import Activation
from ..nets.contract import awaiting
from ..nets.layers import Convolution
from ..nets.plain import plain_parts
from ..nets.sizes import OddInt, Probability, Widths
from ..nets.stack import make_all
from ..part import Part
from ..registry import register_head
from ..state import Shape, State, TensorShape, common_dtype, flat_size, flatten, is_tensor_shape, require_state

Classes = Annotated[int, Field(ge=2)]


class Head(nn.Module):
    """The base class of heads. Any module can be a head; a `Head` also declares whether it is linear.

    Attributes:
        linear_in_features: whether the logits are a linear function of the state, so that a whole classifier is
            invertible up to its last linear layer. Each class declares it for itself and does not inherit it, because
            a subclass may add layers.

    Examples:
        >>> class Sums(Head):
        ...     def forward(self, z):
        ...         return torch.stack([z.sum(1), -z.sum(1)], 1)
        >>> Sums()(torch.ones(1, 3))
        tensor([[ 3., -3.]])
    """

    linear_in_features: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not made_by_sharding(cls):
            cls.linear_in_features = vars(cls).get("linear_in_features", False)


@register_head("linear")
class LinearHead(Head):
    """One linear layer on the flattened state; a tuple state is flattened and concatenated.

    Use it to see what the invertible trunk has learned: all else is invertible.

    Args:
        classes: the number of logits.
        dropout: the probability with which each number of the state is set to 0 in training.
        shape: the shape of the state, without the batch.

    Examples:
        >>> LinearHead(classes=10, shape=((8, 7, 7), (8, 7, 7))).linear.weight.shape
        torch.Size([10, 784])
    """

    linear_in_features = True

    def __init__(self, classes: Classes, dropout: Probability = 0.0, *, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(flat_size(shape), classes)

    def forward(self, state: State) -> Tensor:
        require_state("the linear head", self.shape, common_dtype(self), state)
        return self.linear(self.dropout(flatten(state)))  # type: ignore[no-any-return]


@register_head("bayes")
class BayesHead(Head):
    """The classes' probabilities by Bayes' rule from a prior that is a mixture of one component for each class.

    Use it for a classifier that also has a density of its inputs.

    The logits are ``log weight_c + log p_c(z)``, so that their softmax is ``p(c | z)``. They are linear in z, up to
    what all have in common, if the components have equal scales: a `gaussian_mixture` with ``learn_scales`` off.

    It has no weights of its own, and stands only in a `Hybrid`, beside such a prior.

    Reference: Izmailov, Kirichenko, Finzi, Wilson: Semi-Supervised Learning with Normalizing Flows, 2019,
    https://arxiv.org/abs/1912.13025

    Examples:
        >>> from invflow.models import GaussianMixture
        >>> prior = GaussianMixture(components=3, shape=(2,))
        >>> BayesHead()(prior.means.detach(), prior).shape
        torch.Size([3, 3])
    """

    linear_in_features = True

    def forward(self, state: State, prior: Any) -> Tensor:
        return prior.joint_log_prob(state)  # type: ignore[no-any-return]


@register_head("stack")
class StackHead(Head):
    """Parts, one after another, of which the last that chooses its channels returns the logits; as in the net `stack`.

    Use it for heads as published networks have them, such as a norm and a mean over all positions.

    A tuple state is concatenated along its channels.

    Args:
        *parts: the parts, first applied first: mostly a norm, an activation, `mean` and `linear`.
        classes: the number of logits.
        shape: the shape of the state, without the batch.

    Raises:
        ShapeError: a part does not fit, or the last one does not return one number for each class.
        InvflowError: an actnorm among the parts.

    Examples:
        >>> from invflow.nets.layers import Linear
        >>> from invflow.nets.pooling import Mean
        >>> StackHead(Mean(), Linear(), classes=10, shape=((8, 7, 7), (8, 7, 7)))(2 * (torch.zeros(3, 8, 7, 7),)).shape
        torch.Size([3, 10])
    """

    def __init__(self, *parts: Part, classes: Classes, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        modules, made = make_all(parts, _joined("the stack head", shape), (classes,))
        if made != (classes,):
            raise ShapeError(f"the stack head must return ({classes},), one logit a class, but returns {made}")
        self.net = nn.Sequential(*modules)
        if awaiting(self.net):
            raise InvflowError("a stack head cannot hold an actnorm, which only a chain initialises; take a batch_norm")

    def forward(self, state: State) -> Tensor:
        require_state("the stack head", self.shape, common_dtype(self), state)
        return self.net(_concatenated(state))  # type: ignore[no-any-return]


@register_head("convnet")
class ConvNetHead(Head):
    """Convolutions with activation, then a linear layer; a tuple state is concatenated along its channels.

    Use it where the head, and not the trunk, has to be the classifier.

    On top of psi alone, it is the VGG-like baseline of the lab, which cannot be inverted.

    Args:
        classes: the number of logits.
        hidden: the output channels of each convolution.
        kernel_size: the side of every kernel, odd.
        activation: the function after each convolution.
        shape: the shape of the state, without the batch.

    Examples:
        >>> sum(p.numel() for p in ConvNetHead(10, [16] * 4, kernel_size=7, shape=(16, 7, 7)).parameters())
        58090
    """

    def __init__(
        self,
        classes: Classes,
        hidden: Annotated[Widths, Field(min_length=1)],
        kernel_size: OddInt = 3,
        activation: Activation = "relu",
        *,
        shape: Shape,
    ) -> None:
        super().__init__()
        self.shape = shape

        def layer(width: int | None) -> Convolution:
            return Convolution(width, kernel_size)

        parts = plain_parts(hidden, layer, activation, final=False, final_activation=True)
        joined = _joined("the convnet head", shape)
        if len(joined) != 3:
            raise ShapeError(f"the convnet head expects (channels, height, width), got {shape}")
        modules, reached = make_all(parts, joined, None)
        self.convs = nn.Sequential(*modules)
        self.linear = nn.Linear(flat_size(reached), classes)

    def forward(self, state: State) -> Tensor:
        require_state("the convnet head", self.shape, common_dtype(self), state)
        return self.linear(self.convs(_concatenated(state)).flatten(1))  # type: ignore[no-any-return]


def _concatenated(state: State) -> Tensor:
    """The tensors of a state, along their channels."""
    return torch.cat(state, dim=1) if isinstance(state, tuple) else state  # type: ignore[arg-type]


def _joined(who: str, shape: Shape) -> TensorShape:
    """The shape of `_concatenated` tensors."""
    parts = [shape] if is_tensor_shape(shape) else list(shape)
    if not all(is_tensor_shape(part) and part[1:] == parts[0][1:] for part in parts):  # type: ignore[index]
        raise ShapeError(f"{who} expects a tensor, or a tuple of tensors of equal positions, got {shape}; merge them")
    return sum(part[0] for part in parts), *parts[0][1:]  # type: ignore[index, misc]
