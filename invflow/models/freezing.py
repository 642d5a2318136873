"""Converts a trained model to one that inverts to the bit."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..bijection import Bijection
from ..context import Context, each_entry
from ..errors import NumericsError
from ..nets.orderfree import Ranges, activations, context_features, is_order_free, make_order_free, obstacle
from ..numerics.modes import FLOAT, Exact, Mode, Numerics
from ..sequential import Sequential
from ..state import State, batch_size, map_state
from .model import Classifier, Flow

M = TypeVar("M", Sequential, Classifier, Flow)
_BATCH = 500


def freeze(model: M, data: State, numerics: Mode, context: Context = None) -> M:
    """A copy of a trained model in other numerics, in eval mode; the model itself is unchanged.

    For `exact`, batch norm is folded into the weights, the weights are rounded, with a power of two for each output
    channel, and activations are rounded and clamped to the range that the data reach. The weights of order-free nets
    are constants, so the copy's conditioners cannot be trained.

    Args:
        model: a chain, a classifier or a flow, in float, snap or grid numerics.
        data: typical inputs, for example some hundred training images, from which the ranges are measured.
        numerics: the numerics of the copy.
        context: the context of the data, if the chain takes one.

    Raises:
        NumericsError: a layer cannot reach the level, or the model is exact already.

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
    if isinstance(frozen, Classifier | Flow):
        if frozen.context_net is not None and numerics.integer_nets:
            raise NumericsError("exact expects no context_net, whose floating-point output depends on the batch")
        context = frozen.for_layers(context)
    context = chain.admit(data, context)
    if numerics.integer_nets:
        for net, ranges in _reached(chain, data, context).items():
            make_order_free(net, cast(Exact, numerics), ranges)
    for layer in chain:
        layer.set_numerics(FLOAT)
    again = Sequential(*chain, backprop=chain.backprop, numerics=cast(Numerics, numerics)).eval()
    again.declared_shape, again.declared_output_shape = chain.declared_shape, chain.declared_output_shape
    again.declared_context_shape = chain.declared_context_shape
    if isinstance(frozen, Classifier | Flow):
        frozen.bijection = again
        return frozen
    return again


def _refuse_inner_numerics(chain: Sequential) -> None:
    for part in chain.modules():
        if is_order_free(part):
            raise NumericsError("freeze expects a model that is not exact yet: order-free nets have no float weights")
        own = part.__dict__.get("_arguments", {}).get("numerics")
        if isinstance(part, Sequential) and part is not chain and own not in (None, FLOAT):
            raise NumericsError(f"freeze expects numerics on the outermost chain only, got {own.model_dump()} inside")


@torch.no_grad()
def _reached(chain: Sequential, data: State, context: Context) -> dict[nn.Module, Ranges]:
    """Every net that can be made order-free, with the ranges that the data reach in it."""
    children = [child for part in chain.modules() if isinstance(part, Bijection) for child in part.children()]
    found: dict[nn.Module, Ranges] = {
        child: {} for child in children if not isinstance(child, Bijection | nn.ModuleList) and obstacle(child) is None
    }
    with contextlib.ExitStack() as hooks:
        for net, ranges in found.items():
            for hook in _observe(net, ranges):
                hooks.enter_context(hook)
        for start in range(0, batch_size(data), _BATCH):
            cut = slice(start, start + _BATCH)
            x = map_state(lambda leaf, cut=cut: leaf[cut], data)  # type: ignore[misc]
            chain(x, each_entry(lambda entry, cut=cut: entry[cut], context))  # type: ignore[misc]
    return found


def _observe(net: Any, ranges: Ranges) -> Iterator[RemovableHandle]:
    """Hooks that record the largest magnitudes in a float net."""

    def see(where: str, x: Tensor) -> None:
        ranges[where] = max(ranges.get(where, 0.0), float(x.abs().amax()) if x.numel() else 0.0)

    def see_input(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        state, beside = given[0].tensor_split([given[0].shape[1] - context_features(net)], dim=1)
        see("state", state)
        see("context", beside)

    def see_activation(position: int, _: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        see(f"before {position}", given[0])
        see(f"after {position}", made)

    yield net[0].register_forward_pre_hook(see_input)
    for position, activation in enumerate(activations(net)):
        if activation is not None:
            yield activation.register_forward_hook(functools.partial(see_activation, position))
