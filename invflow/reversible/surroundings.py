"""What a forward ran in, so that it can be run again in the same: random numbers, autocast, buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Randomness:
    """The state of the generators before a forward that drew random numbers.

    Args:
        device: the device that the forward runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu: Tensor | None = torch.get_rng_state()
        self._accelerator: Tensor | None = _accelerator_state(device)

    def forget_if_unused(self) -> None:
        """Drops a state that the forward did not change: most layers draw nothing."""
        if self._cpu is not None and torch.equal(self._cpu, torch.get_rng_state()):
            self._cpu = None
        now = _accelerator_state(self._device)
        if self._accelerator is not None and now is not None and torch.equal(self._accelerator, now):
            self._accelerator = None

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Draws the same numbers inside; afterwards the generators go on as if nothing had been drawn."""
        cpu, accelerator = self._cpu, self._accelerator
        if cpu is None and accelerator is None:
            yield
            return
        devices = [] if accelerator is None else [self._device]
        with torch.random.fork_rng(devices=devices, device_type=self._device.type if devices else "cuda"):
            if cpu is not None:
                torch.set_rng_state(cpu)
            if accelerator is not None:
                torch.get_device_module(self._device.type).set_rng_state(accelerator, self._device)
            yield


class Autocast:
    """Whether autocast was on, and to what."""

    def __init__(self, device: torch.device) -> None:
        self._type = device.type if torch.amp.is_autocast_available(device.type) else None
        if self._type is not None:
            self._enabled = torch.is_autocast_enabled(self._type)
            self._dtype = torch.get_autocast_dtype(self._type)

    def again(self) -> contextlib.AbstractContextManager[object]:
        """The same autocast; its cache of converted weights stays apart from the caller's."""
        if self._type is None:
            return contextlib.nullcontext()
        return torch.autocast(self._type, enabled=self._enabled, dtype=self._dtype, cache_enabled=False)


class buffers_kept:  # noqa: N801 -- used like a function; a class, because a checkpoint enters it several times
    """Leaves buffers afterwards as they were: running statistics count a batch once, however often it runs."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._kept: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> None:
        self._kept = [(buffer, buffer.clone()) for buffer in self._module.buffers()]

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for buffer, before in self._kept:
                buffer.copy_(before)
        self._kept = []


def _accelerator_state(device: torch.device) -> Tensor | None:
    if device.type in ("cpu", "meta"):
        return None
    state: Tensor = torch.get_device_module(device.type).get_rng_state(device)
    return state
