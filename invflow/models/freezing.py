"""From a trained model to one that inverts without a wrong bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..bijection import Bijection
from ..errors import NumericsError
from ..nets.orderfree import Ranges, activations, context_features, is_order_free, make_order_free, obstacle
from ..numerics.modes import FLOAT, Exact, Mode, Numerics
from ..sequential import Sequential
from ..state import State, leaves, map_state
from .classifier import Classifier
from .flow import Flow

M = TypeVar("M", Sequential, Classifier, Flow)
_BATCH = 500


def freeze(model: M, data: State, numerics: Mode, context: Tensor | None = None) -> M:
    """A copy of a trained model in other numerics, in eval mode; the model stays as it is.

    For `exact`, batch norm is folded into the weights, the weights are rounded, each output channel with a power of two
    of its own, and activations are rounded and clamped to the range that the data reach. Weights of order-free nets are
    constants: the copy's conditioners are not trained further.

    Args:
        model: a chain, or a classifier or a flow with one, in float, snap or grid numerics.
        data: inputs that the ranges are read off, as many as are typical: some hundred training images.
        numerics: those of the copy.
        context: of the data, where the chain takes one.

    Raises:
        NumericsError: a layer cannot be as exact; or the model is exact already.

    Examples:
        >>> import torch, invflow
        >>> from invflow.bijections import AdditiveCoupling
        >>> chain = Sequential(AdditiveCoupling(invflow.nets.MLP((2,), (2,), hidden=[4])))
        >>> x = (torch.rand(8, 2).round(decimals=0), torch.zeros(8, 2))
        >>> frozen = freeze(chain, x, invflow.numerics.Exact(mode="exact"))
        >>> frozen.exactness, torch.equal(frozen.inverse(frozen(x))[1], x[1])
        ('exact', True)
    """
    frozen = copy.deepcopy(model).eval()
    chain = frozen.bijection if isinstance(frozen, Classifier | Flow) else frozen
    _refuse_inner_numerics(chain)
    if numerics.integer_nets:
        for net, ranges in _reached(chain, data, context):
            make_order_free(net, cast(Exact, numerics), ranges)
    for layer in chain:
        layer.set_numerics(FLOAT)
    again = Sequential(*chain, backprop=chain.backprop, numerics=cast(Numerics, numerics)).eval()
    again.declared_shape, again.declared_context_shape = chain.declared_shape, chain.declared_context_shape
    if isinstance(frozen, Classifier | Flow):
        frozen.bijection = again
        return frozen
    return again


def _refuse_inner_numerics(chain: Sequential) -> None:
    if any(is_order_free(part) for part in chain.modules()):
        raise NumericsError(
            "freeze expects a model that is not exact yet: an order-free net has lost its float weights"
        )
    for part in chain.modules():
        own = part.__dict__.get("_arguments", {}).get("numerics")
        if isinstance(part, Sequential) and part is not chain and own not in (None, FLOAT):
            raise NumericsError(f"freeze expects numerics at the outermost chain alone, got {own.model_dump()} inside")


@torch.no_grad()
def _reached(chain: Sequential, data: State, context: Tensor | None) -> Iterator[tuple[nn.Module, Ranges]]:
    """Every net that can be made order-free, with the ranges that the data reach in it."""
    nets = [net for part in chain.modules() if isinstance(part, Bijection) for net in _nets_of(part)]
    found = [(net, _Observer(net)) for net in dict.fromkeys(nets)]
    count = next(leaves(data)).shape[0]
    for start in range(0, count, _BATCH):
        cut = slice(start, start + _BATCH)
        x = map_state(lambda leaf, cut=cut: leaf[cut], data)  # type: ignore[misc]
        chain(x, None if context is None else context[cut])
    for net, observer in found:
        observer.remove()
        yield net, observer.ranges


def _nets_of(bijection: Bijection) -> Iterator[nn.Module]:
    for child in bijection.children():
        if not isinstance(child, Bijection | nn.ModuleList) and obstacle(child) is None:
            yield child


class _Observer:
    """Watches a float net at work and keeps the largest magnitudes.

    Args:
        net: one that can be made order-free.
    """

    def __init__(self, net: Any) -> None:
        self.ranges = Ranges(state=0.0, context=0.0)
        self._context = context_features(net)
        self._handles: list[RemovableHandle] = [net[0].register_forward_pre_hook(self._see_input)]
        for position, activation in enumerate(activations(net)):
            if activation is not None:
                self._handles.append(activation.register_forward_hook(_Activation(self.ranges, position)))

    def remove(self) -> None:
        """Watches no longer."""
        for handle in self._handles:
            handle.remove()

    def _see_input(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        channels = given[0].shape[1]
        state, context = torch.split(given[0], [channels - self._context, self._context], dim=1)
        self.ranges.state = max(self.ranges.state, _largest(state))
        self.ranges.context = max(self.ranges.context, _largest(context))


class _Activation:
    def __init__(self, ranges: Ranges, position: int) -> None:
        self.ranges = ranges
        self.position = position

    def __call__(self, _: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        before, after = self.ranges.before, self.ranges.after
        before[self.position] = max(before.get(self.position, 0.0), _largest(given[0]))
        after[self.position] = max(after.get(self.position, 0.0), _largest(made))


def _largest(x: Tensor) -> float:
    return float(x.abs().amax()) if x.numel() else 0.0
