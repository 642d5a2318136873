"""Every private name of PyTorch that invflow uses, and why: only this module can break with a new version."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import operator
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeVar

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


def is_shard(weight: Any) -> bool:
    """Whether this process holds only a part of the weight: it is a DTensor."""
    loaded = sys.modules.get("torch.distributed.tensor")  # to import it would take a second
    return loaded is not None and isinstance(weight, loaded.DTensor)


def in_shards(module: nn.Module) -> bool:
    """Whether `fully_shard` manages the module's own weights, gathered at present or not. No public call tells."""
    return getattr(module, "_is_fsdp_managed_module", False)


def any_sharded(modules: Iterable[nn.Module]) -> bool:
    """Whether `fully_shard` was called on one of the modules."""
    loaded = _sharding()
    return loaded is not None and any(isinstance(module, loaded.FSDPModule) for module in modules)


def made_by_sharding(cls: type) -> bool:
    """Whether `fully_shard` made the class: FSDP's is the first of its bases, that of the module the second."""
    loaded = _sharding()
    return loaded is not None and issubclass(cls.__bases__[0], loaded.FSDPModule)


def _sharding() -> Any:
    """The module with `fully_shard`, if it is loaded: to import it takes a second."""
    return sys.modules.get("torch.distributed.fsdp")


class Gathered(nn.Module):
    """A module whose weights `fully_shard` gathers for each of its `gathered_calls`, not only for a call of itself.

    `fully_shard` replaces the class of a module by one that it derives from it: there the calls become others.
    """

    gathered_calls: ClassVar[tuple[str, ...]] = ()
    """The methods that need weights and are called from outside, those of the base classes left out."""
    _is_gathered: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if made_by_sharding(cls):
            for name in ("__call__", *(name for base in cls.__mro__ for name in vars(base).get("gathered_calls", ()))):
                setattr(cls, name, _gathering(cls, name))


def _gathering(cls: Any, name: str) -> Callable[..., Any]:
    """A call of a sharded module, between the hooks that gather its weights and take them away again.

    A call that this one makes of the same module runs without them, or the weights would be taken away in its middle.
    """
    plain = cls.forward if name == "__call__" else getattr(cls, name)

    @functools.wraps(plain)
    def called(self: Any, *args: Any, **options: Any) -> Any:
        if self._is_gathered:
            return plain(self, *args, **options)
        self._is_gathered = True
        try:
            if name == "__call__":
                return nn.Module.__call__(self, *args, **options)
            self._hooked = functools.partial(plain, self)
            torch.distributed.fsdp.register_fsdp_forward_method(self, "_hooked")
            return self._hooked(*args, **options)
        finally:
            self._is_gathered = False

    return called


class Converted(nn.Module):
    """A module that is told whenever its tensors are converted or moved. There is no public hook for that."""

    @abstractmethod
    def converted(self) -> None:
        """Called after each conversion."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.converted()
        return self


class Filled(nn.Module):
    """A module whose weights are NaN after `to_empty` from the meta device, and not what the memory held."""

    # There is no public hook for a conversion.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        without_values = {name for name, tensor in weights(self) if tensor.is_meta}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in weights(self) if without_values else ():
            if name in without_values and not tensor.is_meta:
                tensor.detach().fill_(math.nan if tensor.is_floating_point() else 0)
        return self


class Constants(nn.Module):
    """A module with tensors that are no weights, such as an order: attributes named in `constants`.

    They are in the state_dict and move with the module, but they are no buffers: what averages, shards or synchronises
    weights does not see them. So every process must construct the same ones. They keep their values in `to_empty`, and
    integers their dtype in a cast; a state_dict holds copies of them.
    """

    constants: tuple[str, ...]
    """Their names: the class says them, or an instance whose fields decide it."""
    saved: ClassVar[bool] = True
    """Whether they are in the state_dict; if not, they follow the weights that are loaded with them."""

    def made(self, name: str) -> Tensor | None:
        """A constant as the constructor made it; None if that cannot be made again."""
        return None

    def prove(self) -> None:
        """Raises an error if the constants are not what they must be: called after they were loaded or converted."""

    def settle(self, like: Tensor) -> None:
        """Gives constants that a load has left out the device and the dtype of a weight that was loaded."""
        for name in self.constants:
            if not self.saved or (getattr(self, name).is_meta and self.made(name) is not None):
                self._place(name, like)

    def _place(self, name: str, like: Tensor) -> None:
        """Moves a constant to the device of a tensor, and a float to its dtype; one without values is made again."""
        constant = getattr(self, name)
        if constant.is_meta and not like.is_meta:
            made = self.made(name)
            constant = torch.full_like(like, math.nan if like.is_floating_point() else 0) if made is None else made
        floats = constant.is_floating_point() and like.is_floating_point()
        setattr(self, name, constant.to(like.device, like.dtype if floats else constant.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        have_values = not any(getattr(self, name).is_meta for name in self.constants)
        for name in self.constants:
            self._place(name, fn(getattr(self, name)))
        if have_values:
            self.prove()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.saved:
            destination.update({prefix + name: getattr(self, name).clone() for name in self.constants})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = self.constants if self.saved else ()
        given = {name: state_dict.pop(prefix + name) for name in names if prefix + name in state_dict}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys += [prefix + name for name in names if name not in given]
        before = {name: getattr(self, name) for name in given}
        for name, constant in before.items():
            loaded = given[name].detach()
            if loaded.shape != constant.shape:
                shapes = f"{tuple(loaded.shape)} in the state_dict, {tuple(constant.shape)} in the module"
                error_msgs.append(f"size mismatch for {prefix + name}: {shapes}")
                continue
            if loaded.is_floating_point() and not constant.is_floating_point():
                loaded = loaded.round()  # an average of integers
            assign = local_metadata.get("assign_to_params_buffers", False)
            place = loaded.device if assign else constant.device
            dtype = loaded.dtype if assign and constant.is_floating_point() else constant.dtype
            setattr(self, name, loaded.to(place, dtype, copy=True))
        try:
            self.prove()
        except ValueError:
            for name, constant in before.items():
                setattr(self, name, constant)
            raise


def constants(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The constants of a module and of those inside it, by name."""
    for prefix, part in module.named_modules():
        for name in part.constants if isinstance(part, Constants) else ():
            yield f"{prefix}.{name}".lstrip("."), getattr(part, name)


def weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module and of those inside it, by name."""
    return itertools.chain(module.named_parameters(), module.named_buffers())
