"""Every private name of PyTorch that invflow uses, and why: only this module can break with a new version."""

from __future__ import annotations

import contextlib
import logging
import operator
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode

C = TypeVar("C", bound=Callable[..., Any])
Slots = dict[str, Any]

# The public classes are separate for each number of dimensions, and for lazy and synchronised ones.
BatchNorm = _BatchNorm
Dropout = _DropoutNd
SpectralNorm = _SpectralNorm

# Sees every operator that runs, after autograd; nothing public does.
DispatchMode = TorchDispatchMode

_ENGINE: Any = torch.autograd.Variable._execution_engine


def transforms_active() -> bool:
    """Whether a transform of torch.func, such as vmap, is active. There is no public call for this."""
    return torch._C._are_functorch_transforms_active()


def forward_mode_active() -> bool:
    """Whether forward-mode differentiation is active. There is no public call for this."""
    return forward_ad._current_level >= 0


def float32_precisions(backend: str) -> tuple[str, str]:
    """What matrix products and convolutions in float32 may compute in: "ieee", "tf32", "bf16", or "none" of these.

    `torch.get_float32_matmul_precision` raises once a newer setting was used; the public attributes take ten times as
    long, in every layer.

    Args:
        backend: "cuda", or "mkldnn" for all others.
    """
    read = torch._C._get_fp32_precision_getter
    return read(backend, "matmul"), read(backend, "conv")


def run_backward(outputs: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """`torch.autograd.grad` without its checks, which cost as much as a small layer."""
    # The flags: keep the graph, make one of the gradients; allow None, add to .grad.
    return list(_ENGINE.run_backward(tuple(outputs), tuple(grads), False, False, tuple(inputs), True, False))


def collectives() -> dict[Any, int]:
    """How many collectives each process group of this process has begun. There is no public count."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return {}
    groups: Mapping[Any, Any] = torch.distributed.distributed_c10d._world.pg_map
    return {group: group._get_sequence_number_for_group() for group in groups}


def reparametrized(module: nn.Module, tensors: Mapping[str, Tensor]) -> AbstractContextManager[object]:
    """Other weights and buffers inside: `torch.func.functional_call` can only call a module's forward."""
    return _reparametrize_module(module, tensors)  # type: ignore[arg-type]


def constant_to_compiler(function: C) -> C:
    """`torch.compiler.assume_constant_result`, which sets this mark, and loads the compiler to do so."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def never_compiled(function: C, reason: str) -> Callable[[], C]:
    """Returns the function if there is no compiler, else the function as `torch.compiler.disable` returns it.

    To make that at once would load the compiler. The reason is shown to whoever asks for one graph.
    """
    disabled: Any = _disable_dynamo(function)
    disabled._torchdynamo_disable, disabled._torchdynamo_disable_msg = True, reason

    def chosen() -> C:
        # While a frame that the compiler gave up runs, it may still compile the functions called from there.
        loaded = torch.compiler.is_dynamo_compiling() or "torch._dynamo" in sys.modules
        return disabled if loaded else function

    return chosen


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Inside, the compiler's trace is not logged: test runners collect it and show it instead of a failure."""
    logger = logging.getLogger("torch.__trace")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


# A module's own dicts: nn.Module's public iterators build a name for everything, which costs as much as a small layer,
# and tensors are replaced in these dicts and put back.

submodules: Callable[[nn.Module], Slots] = operator.attrgetter("_modules")
"""The modules directly inside a module, by name."""

parameters: Callable[[nn.Module], Slots] = operator.attrgetter("_parameters")
"""The parameters of a module itself, by name."""

buffers: Callable[[nn.Module], Slots] = operator.attrgetter("_buffers")
"""The buffers of a module itself, by name."""

version: Callable[[Tensor], int] = operator.attrgetter("_version")
"""The number of in-place writes to a tensor."""


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside a wrapper that compiles it or runs it on several devices."""
    while isinstance(inner := getattr(module, "_orig_mod", getattr(module, "module", None)), nn.Module):
        module = inner
    return module


def is_hooked(module: nn.Module) -> bool:
    """Whether the module has hooks, so that it must be called as a whole."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_hooks(tensor: Tensor) -> bool:
    """Whether hooks wait for the tensor's gradient."""
    return bool(tensor._backward_hooks)


def storage_of(tensor: Tensor) -> int:
    """An identity of the tensor's storage; meta tensors have no public address."""
    return int(tensor.untyped_storage()._cdata)


class Converted(nn.Module):
    """A module that is told whenever its tensors are converted or moved. There is no public hook for that."""

    @abstractmethod
    def converted(self) -> None:
        """Called after each conversion."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.converted()
        return self


class Proved(Converted):
    """A module whose tensors must satisfy a condition, which is proved again whenever they are loaded or converted."""

    @abstractmethod
    def prove(self) -> None:
        """Raises an error if the tensors do not satisfy it."""

    def converted(self) -> None:
        self.prove()

    # For symmetry, loading uses no public hook either.
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.prove()
