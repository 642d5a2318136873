"""What a forward depends on besides its input, so that it can be replayed: random numbers, buffers, modes, autocast."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .._torch import Slots, any_sharded, buffers, constant_to_compiler, has_hooks, is_shard, parameters, submodules

Generators: TypeAlias = list[Tensor]
Values: TypeAlias = list[tuple[Slots, str, Tensor | None]]
_NOTHING = contextlib.nullcontext()


def generators(device: torch.device) -> Generators:
    """The states of the generators that a computation on a device may draw from: the CPU's, and the device's own."""
    if device.type in ("cpu", "meta"):
        return [torch.get_rng_state()]
    return [torch.get_rng_state(), torch.get_device_module(device.type).get_rng_state(device)]


def same(before: Generators, after: Generators) -> bool:
    """Whether nothing was drawn between two states of the generators."""
    return all(map(torch.equal, before, after))


class Surroundings:
    """What an evaluation of a module depends on besides its input, recorded so that it can be replayed.

    These are the weights themselves, which modules are in train mode, and copies of the buffers, made by `begin` right
    before the evaluation: no other trace is left of what batch norm does to its own. The caller sets `drawn`. In a
    compiled graph there are only the weights, because the compiler takes care of the rest.

    Args:
        module: what is evaluated.
        device: where.

    Attributes:
        weights: the parameters that are trained, each once.
        holds_sharded: whether the module, or one inside it, is sharded by itself.
        drawn: the generators' states before the evaluation; None if it drew no numbers.
        stand_ins: the tensors that a replay finds in place of weights, by the weights' ids.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.drawn: Generators | None = None
        self.stand_ins: dict[int, Tensor] = {}
        self.weights: list[Tensor] = []
        self._device = device
        self._copies: list[tuple[Slots, str, Tensor]] = []
        self._weights: list[tuple[Slots, list[nn.Parameter | None]]] = []
        compiling = torch.compiler.is_compiling()
        if compiling:
            self.weights += [weight for weight in module.parameters() if weight.requires_grad]
        # A loop of its own, not `modules()` and `parameters()`, because this runs for every layer of every forward.
        parts, seen = [] if compiling else [module], {id(module)}
        for part in parts:
            for child in submodules(part).values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    parts.append(child)
            if slots := parameters(part):
                weights = list(slots.values())
                if not any(map(is_shard, weights)):  # or the hooks of `fully_shard` fill the slots
                    self._weights.append((slots, weights))
                for weight in weights:
                    if weight is not None and weight.requires_grad and id(weight) not in seen:
                        seen.add(id(weight))
                        self.weights.append(weight)
        self.holds_sharded = any_sharded(module.modules() if compiling else parts)
        self._parts = parts
        self._modes = [part.training for part in parts]

    def begin(self) -> None:
        """Copies the buffers."""
        for part in self._parts:
            if slots := buffers(part):
                kept = [(name, buffer) for name, buffer in slots.items() if buffer is not None]
                self._copies += [(slots, name, buffer.clone()) for name, buffer in kept]

    def differentiable(self) -> list[Tensor]:
        """The weights to differentiate a replay by; those with hooks, which must fire once only, have stand-ins."""
        for weight in self.weights:
            if has_hooks(weight):
                self.stand_ins[id(weight)] = weight.detach().requires_grad_()
        return [self.stand_ins.get(id(weight), weight) for weight in self.weights] if self.stand_ins else self.weights

    def replay(self) -> contextlib.AbstractContextManager[object]:
        """Inside, the module finds what it found then; afterwards, nothing seems to have been evaluated."""
        if self._copies or self.stand_ins or self.drawn is not None:
            return self._replay()
        if [part.training for part in self._parts] != self._modes:
            return self._replay()
        for slots, weights in self._weights:
            if not all(map(operator.is_, slots.values(), weights)):
                return self._replay()
        return _NOTHING

    @contextlib.contextmanager
    def _replay(self) -> Iterator[None]:
        then: Values = [(slots, name, copy.clone()) for slots, name, copy in self._copies]
        for slots, weights in self._weights:
            used = (self.stand_ins.get(id(weight), weight) for weight in weights)
            then += [(slots, name, weight) for name, weight in zip(slots, used, strict=True)]
        now = [(slots, name, slots[name]) for slots, name, _ in then]
        modes = [part.training for part in self._parts]
        try:
            self._set(then, self._modes)
            with _NOTHING if self.drawn is None else self._same_numbers(*self.drawn):
                yield
        finally:
            self._set(now, modes)

    def _set(self, tensors: Values, modes: list[bool]) -> None:
        for slots, name, tensor in tensors:
            slots[name] = tensor
        for part, mode in zip(self._parts, modes, strict=True):
            if part.training is not mode:
                part.training = mode

    @contextlib.contextmanager
    def _same_numbers(self, cpu: Tensor, *accelerator: Tensor) -> Iterator[None]:
        """Draws the same numbers inside; afterwards the generators are as before."""
        devices = [self._device] if accelerator else []
        with torch.random.fork_rng(devices=devices, device_type=self._device.type if devices else "cuda"):
            torch.set_rng_state(cpu)
            for state in accelerator:
                torch.get_device_module(self._device.type).set_rng_state(state, self._device)
            yield


@constant_to_compiler
def _knows_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on a device; None if it is off."""
    enabled = _knows_autocast(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def under_autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    """Autocast to this dtype; None switches it off. Its cache of converted weights is separate from the caller's."""
    if dtype is None and autocast_dtype(device) is None:
        return _NOTHING
    return torch.autocast(device.type, enabled=dtype is not None, dtype=dtype, cache_enabled=False)
