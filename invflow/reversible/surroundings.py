"""What a forward ran in, so that it can be run again in the same: random numbers, buffers, modes, autocast."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .._torch import Slots, buffers, has_hooks, parameters, submodules

Generators: TypeAlias = tuple[Tensor, Tensor | None]
_NOTHING = contextlib.nullcontext()


def generators(device: torch.device) -> Generators:
    """The states of the generators that a computation on a device may draw from: the CPU's, and the device's own."""
    if device.type in ("cpu", "meta"):
        return torch.get_rng_state(), None
    return torch.get_rng_state(), torch.get_device_module(device.type).get_rng_state(device)


def same(before: Generators, after: Generators) -> bool:
    """Whether nothing was drawn between two states of the generators."""
    return torch.equal(before[0], after[0]) and (
        before[1] is None or after[1] is None or torch.equal(before[1], after[1])
    )


class Surroundings:
    """What an evaluation of a module finds around it, recorded so that it can be replayed.

    Kept are the weights themselves, which modules were in train mode, and, by `begin` right before the evaluation,
    copies of the buffers: nothing else tells that batch norm moves its own. Whoever evaluates sets `drawn`.

    Args:
        module: what is evaluated.
        device: where.

    Attributes:
        weights: the parameters that are trained, each once.
        drawn: the generators' states before the evaluation; None where it drew no numbers.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.drawn: Generators | None = None
        self._device = device
        self._copies: list[tuple[Slots, str, Tensor]] = []
        self._stand_ins: dict[int, Tensor] = {}
        # By hand, because this runs for every layer of every forward.
        parts, seen = [module], {id(module)}
        self._weights: list[tuple[Slots, list[nn.Parameter | None]]] = []
        self.weights: list[Tensor] = []
        for part in parts:
            for child in submodules(part).values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    parts.append(child)
            if slots := parameters(part):
                weights = list(slots.values())
                self._weights.append((slots, weights))
                for weight in weights:
                    if weight is not None and weight.requires_grad and id(weight) not in seen:
                        seen.add(id(weight))
                        self.weights.append(weight)
        self._parts = parts
        self._modes = [part.training for part in parts]

    def begin(self) -> None:
        """Copies the buffers."""
        for part in self._parts:
            if slots := buffers(part):
                kept = [(name, buffer) for name, buffer in slots.items() if buffer is not None]
                self._copies += [(slots, name, buffer.clone()) for name, buffer in kept]

    def differentiable(self) -> list[Tensor]:
        """The weights to differentiate a replay by: in place of those with hooks, which fire once, another tensor."""
        for weight in self.weights:
            if has_hooks(weight):
                self._stand_ins[id(weight)] = weight.detach().requires_grad_()
        return [self._stand_ins.get(id(weight), weight) for weight in self.weights] if self._stand_ins else self.weights

    def replay(self) -> contextlib.AbstractContextManager[object]:
        """Inside, the module finds what it found then; afterwards all is as if nothing had been evaluated."""
        if self._copies or self._stand_ins or self.drawn is not None:
            return self._replay()
        if [part.training for part in self._parts] != self._modes:
            return self._replay()
        for slots, weights in self._weights:
            if not all(map(operator.is_, slots.values(), weights)):
                return self._replay()
        return _NOTHING

    @contextlib.contextmanager
    def _replay(self) -> Iterator[None]:
        then: list[tuple[Slots, str, Tensor | None]] = [
            (slots, name, copy.clone()) for slots, name, copy in self._copies
        ]
        for slots, weights in self._weights:
            used = (self._stand_ins.get(id(weight), weight) for weight in weights)
            then += [(slots, name, weight) for name, weight in zip(slots, used, strict=True)]
        now = [(slots, name, slots[name]) for slots, name, _ in then]
        modes = [part.training for part in self._parts]
        try:
            self._set(then, self._modes)
            with self._same_numbers():
                yield
        finally:
            self._set(now, modes)

    def _set(self, tensors: Iterable[tuple[Slots, str, Tensor | None]], modes: list[bool]) -> None:
        for slots, name, tensor in tensors:
            slots[name] = tensor
        for part, mode in zip(self._parts, modes, strict=True):
            if part.training is not mode:
                part.training = mode

    @contextlib.contextmanager
    def _same_numbers(self) -> Iterator[None]:
        """Draws the same numbers inside; afterwards the generators go on as if nothing had been drawn."""
        if self.drawn is None:
            yield
            return
        cpu, accelerator = self.drawn
        devices = [] if accelerator is None else [self._device]
        with torch.random.fork_rng(devices=devices, device_type=self._device.type if devices else "cuda"):
            torch.set_rng_state(cpu)
            if accelerator is not None:
                torch.get_device_module(self._device.type).set_rng_state(accelerator, self._device)
            yield


class Autocast:
    """Whether autocast was on, and to what.

    Attributes:
        dtype: what it computes in where it can; None where it is off.
    """

    def __init__(self, device: torch.device) -> None:
        self._type = device.type if torch.amp.is_autocast_available(device.type) else None
        enabled = self._type is not None and torch.is_autocast_enabled(self._type)
        self.dtype = torch.get_autocast_dtype(device.type) if enabled else None

    def again(self) -> contextlib.AbstractContextManager[object]:
        """The same autocast; its cache of converted weights stays apart from the caller's."""
        if self._type is None or (self.dtype is None and not torch.is_autocast_enabled(self._type)):
            return _NOTHING
        enabled = self.dtype is not None
        return torch.autocast(self._type, enabled=enabled, dtype=self.dtype, cache_enabled=False)
