"""The activations of a chain that training keeps, layer by layer and under each policy: predicted and measured."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._torch import constants, storage_of
from ..context import make_context
from ..errors import InvflowError
from ..reversible.chain import POLICIES, Kept, plan, run_group
from ..sequential import Sequential
from ..state import leaves, make_state
from ..steps import Step
from .check import inputs
from .reconstruction import reconstruction_errors
from .roundtrip import in_each_mode


@dataclass(frozen=True)
class LayerMemory:
    """What one layer of a chain keeps for backward.

    Attributes:
        layer: a description of the layer.
        kept: bytes by policy. Under "reversible", the states that a segment keeps are counted at its last layer.
    """

    layer: str
    kept: dict[str, int]


@dataclass(frozen=True)
class ActivationMemory:
    """The result of `activation_memory`.

    Attributes:
        batch: the number of samples.
        layers: one entry per step of the chain; nested layers have their own entries.
        kept: by policy, the bytes kept between forward and backward.
        peak: by policy, the most bytes at once, with those that backward recomputes at its largest layer.
        measured: by policy, the bytes that a real forward kept; None if nothing was measured.
        measured_peak: by policy, the peak of a training step on the accelerator, above the memory allocated before the
            step; the gradients of the weights are included. None without an accelerator.
    """

    batch: int
    layers: list[LayerMemory]
    kept: dict[str, int]
    peak: dict[str, int]
    measured: dict[str, int] | None = None
    measured_peak: dict[str, int] | None = None


def activation_memory(
    chain: Sequential, batch: int, *, log_det: bool = False, measure: bool = False
) -> ActivationMemory:
    """The activation memory of a training step of a chain, without weights and head.

    Args:
        chain: must know its input shape, as every chain built from a spec does. Copies of it run, for the prediction on
            the meta device, which holds no numbers.
        batch: the number of samples in a batch.
        log_det: whether training computes the log-determinant, as that of a flow does.
        measure: whether to run a training step under each policy, too.

    Examples:
        >>> import invflow
        >>> layers = [{"type": "split"}] + 4 * [{"type": "additive_coupling", "net": {"type": "mlp", "hidden": [8]}}]
        >>> found = activation_memory(invflow.build({"input": {"shape": [16]}, "layers": layers}), batch=1000)
        >>> found.kept["stored"] > 2 * found.kept["reversible"]
        True
    """
    if chain.declared_shape is None:
        raise InvflowError("activation_memory expects a chain built from a spec, which knows the shape of its input")
    layers = {step.name: LayerMemory(step.title, dict.fromkeys(POLICIES, 0)) for step in chain.steps()}
    accelerator = torch.accelerator.current_accelerator(check_available=True) if measure else None
    kept, peak, measured, measured_peak = {}, {}, {}, {}
    for policy in POLICIES:
        predicted = _Chain(chain, policy, batch, log_det, torch.device("meta"))
        groups, sizes = predicted.groups, predicted.kept()
        for (_, steps), size in zip(groups, sizes, strict=True):
            layers[steps[-1].name].kept[policy] += size
        kept[policy] = sum(sizes)
        recomputed = [step.name for keeps, steps in groups if keeps != "activations" for step in steps]
        largest = max((layers[name].kept["stored"] for name in recomputed), default=0)
        # The layers at the end that keep their activations have released them before any are recomputed.
        last = max((i for i, (keeps, _) in enumerate(groups, start=1) if keeps != "activations"), default=0)
        peak[policy] = max(kept[policy], sum(sizes[:last]) + largest)
        if measure:
            real = _Chain(chain, policy, batch, log_det, accelerator or torch.device("cpu"))
            measured[policy] = sum(real.kept())
            if accelerator is not None:
                measured_peak[policy] = real.peak()
    return ActivationMemory(batch, list(layers.values()), kept, peak, measured or None, measured_peak or None)


def reconstructions(chain: Sequential) -> dict[str, dict[str, float]]:
    """`reconstruction_errors` by dtype and mode, such as ``"float32 train"``, on inputs that resemble pixels."""
    found = in_each_mode(reconstruction_errors, chain, *inputs(chain))
    return {" ".join(key): errors for key, errors in found.items()}


class _Chain:
    """A copy of a chain under a policy, in train mode, with a batch for it."""

    def __init__(self, chain: Sequential, policy: Any, batch: int, log_det: bool, device: torch.device) -> None:
        self.chain = copy.deepcopy(chain).to(device).train()
        self.chain.backprop = policy
        self.log_det = log_det
        like: Any = next(self.chain.parameters(), torch.empty(0))
        make: Any = lambda leaf: torch.randn((batch, *leaf), dtype=like.dtype, device=device)  # noqa: E731
        self.x = make_state(make, chain.declared_shape or ())
        self.context = make_context(make, chain.declared_context_shape)
        steps = self.chain.steps()
        stored: list[tuple[Kept, list[Step]]] = [("activations", [step]) for step in steps]
        self.groups = stored if policy == "stored" else plan(steps, self.x, self.context)

    def kept(self) -> list[int]:
        """The bytes that each group of steps keeps in addition to those before it, without weights and buffers."""
        x = self.x
        sizes: list[int] = []
        alive: list[Any] = []
        held = (*self.chain.parameters(), *self.chain.buffers(), *dict(constants(self.chain)).values())
        known = {storage_of(tensor) for tensor in held}

        def pack(tensor: Tensor) -> Tensor:
            if storage_of(tensor) not in known:
                known.add(storage_of(tensor))
                sizes[-1] += tensor.untyped_storage().nbytes()
            alive.append(tensor)  # so that no later storage reuses its memory
            return tensor

        for keeps, group in self.groups:
            sizes.append(0)
            for leaf in leaves(x) if keeps == "input" else ():  # which a checkpoint keeps itself
                pack(leaf)
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                x, log_det = run_group(keeps, group, x, self.context, self.log_det, None)
            alive.append((x, log_det))
        return sizes

    def peak(self) -> int:
        """The largest number of bytes at once in a second training step: in the first, libraries allocate."""
        run = self.chain.forward_and_log_det if self.log_det else self.chain
        for _ in range(2):
            self.chain.zero_grad()
            before = torch.accelerator.memory_allocated()
            torch.accelerator.reset_peak_memory_stats()
            y = run(self.x, self.context)
            loss: Any = sum(leaf.square().mean() for leaf in leaves(y) if leaf.is_floating_point())
            loss.backward()
            torch.accelerator.synchronize()
        return int(torch.accelerator.max_memory_allocated() - before)
