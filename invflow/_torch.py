"""Every private name of PyTorch that invflow uses, and why: what a new version may break is here and nowhere else."""

from __future__ import annotations

import contextlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.stateless import _reparametrize_module

C = TypeVar("C", bound=Callable[..., Any])
Slots = dict[str, Any]

# The public names are one class for each number of dimensions, lazy and synchronised ones apart.
BatchNorm = _BatchNorm
BatchOrInstanceNorm = _NormBase
Dropout = _DropoutNd
SpectralNorm = _SpectralNorm

_ENGINE: Any = torch.autograd.Variable._execution_engine


def transforms_active() -> bool:
    """Whether a transform of torch.func, such as vmap, is at work. No public call tells."""
    return torch._C._are_functorch_transforms_active()


def forward_mode_active() -> bool:
    """Whether forward-mode differentiation is at work. No public call tells."""
    return forward_ad._current_level >= 0


def run_backward(outputs: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """`torch.autograd.grad` without its checks of what is known to fit: they cost as much as a small layer."""
    # In order: keep the graph, make one of the gradients, whose gradients, whether some may be None, whether to add to
    # .grad.
    return list(_ENGINE.run_backward(tuple(outputs), tuple(grads), False, False, tuple(inputs), True, False))


def reparametrized(module: nn.Module, tensors: Mapping[str, Tensor]) -> AbstractContextManager[object]:
    """Other weights and buffers inside: `torch.func.functional_call` calls a module's forward only."""
    return _reparametrize_module(module, tensors)  # type: ignore[arg-type]


def constant_to_compiler(function: C) -> C:
    """`torch.compiler.assume_constant_result`, which sets this mark, and loads the compiler to do so."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """No records of the compiler's own trace, which test runners collect, and show in place of a failure."""
    logger = logging.getLogger("torch.__trace")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


# The dicts themselves: nn.Module's public iterators build a name for everything, which costs as much as a small layer,
# and tensors are replaced in them and put back.


def submodules(module: nn.Module) -> Slots:
    """The modules right inside a module, by name."""
    return module._modules


def parameters(module: nn.Module) -> Slots:
    """The parameters right inside a module, by name."""
    return module._parameters


def buffers(module: nn.Module) -> Slots:
    """The buffers right inside a module, by name."""
    return module._buffers


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of what compiles it or runs it on several devices."""
    while isinstance(inner := getattr(module, "_orig_mod", getattr(module, "module", None)), nn.Module):
        module = inner
    return module


def is_hooked(module: nn.Module) -> bool:
    """Whether it matters that the module is called, and not its parts."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_hooks(tensor: Tensor) -> bool:
    """Whether somebody wants to see the tensor's gradient."""
    return bool(tensor._backward_hooks)


def version(tensor: Tensor) -> int:
    """How often the tensor was written to in place."""
    return tensor._version


def storage_of(tensor: Tensor) -> int:
    """What tells storages apart; meta tensors have no public address."""
    return int(tensor.untyped_storage()._cdata)


class Proved(nn.Module):
    """A module whose tensors have to satisfy something, which is proved anew when they are loaded or converted."""

    @abstractmethod
    def prove(self) -> None:
        """Raises where the tensors do not satisfy it."""

    # There is no public hook for a conversion; so that both read alike, neither is one.
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.prove()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.prove()
        return self
