"""What a forward ran in, so that it can be run again in the same: random numbers, buffers, modes, autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

Generators: TypeAlias = tuple[Tensor, Tensor | None]
_Slots: TypeAlias = dict[str, Tensor | None]
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

    Kept are the weights themselves, which modules were in train mode, and, by `begin` right before the evaluation, copies
    of the buffers: nothing else tells that batch norm moves its own. Whoever evaluates sets `drawn`.

    Args:
        module: what is evaluated.
        device: where.

    Attributes:
        weights: the parameters that are trained, each once.
        drawn: the generators' states before the evaluation; None where it drew no numbers.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.weights: list[Tensor] = []
        self.drawn: Generators | None = None
        self._device = device
        self._modes: list[tuple[nn.Module, bool]] = []
        self._held: list[tuple[_Slots, str, Tensor]] = []
        self._buffers: list[tuple[_Slots, str]] = []
        self._copies: list[tuple[_Slots, str, Tensor]] = []
        # By hand: nn.Module's iterators build a name for everything, and this runs for every layer of every forward.
        waiting, seen = [module], {0}
        while waiting:
            part = waiting.pop()
            if id(part) in seen:
                continue
            seen.add(id(part))
            self._modes.append((part, part.training))
            if part._modules:
                waiting += [child for child in part._modules.values() if child is not None]
            for name, weight in part._parameters.items():
                if weight is not None:
                    self._held.append((part._parameters, name, weight))
                    if weight.requires_grad and id(weight) not in seen:
                        seen.add(id(weight))
                        self.weights.append(weight)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    self._buffers.append((part._buffers, name))

    def begin(self) -> None:
        """Copies the buffers."""
        for slots, name in self._buffers:
            buffer = slots[name]
            if buffer is not None:
                self._copies.append((slots, name, buffer.clone()))

    def replay(self) -> contextlib.AbstractContextManager[object]:
        """Inside, the module finds what it found then; afterwards all is as if nothing had been evaluated."""
        if self._copies or self.drawn is not None:
            return self._replay()
        for part, mode in self._modes:
            if part.training is not mode:
                return self._replay()
        for slots, name, tensor in self._held:
            if slots[name] is not tensor:
                return self._replay()
        return _NOTHING

    @contextlib.contextmanager
    def _replay(self) -> Iterator[None]:
        modes = [(part, mode) for part, mode in self._modes if part.training is not mode]
        then = [*self._held, *((slots, name, copy.clone()) for slots, name, copy in self._copies)]
        now = [(slots, name, slots[name]) for slots, name, _ in then]
        try:
            for part, mode in modes:
                part.training = mode
            for slots, name, tensor in then:
                slots[name] = tensor
            with self._same_numbers():
                yield
        finally:
            for slots, name, before in now:
                slots[name] = before
            for part, mode in modes:
                part.training = not mode

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
