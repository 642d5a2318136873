"""What training keeps of a chain's activations, layer by layer, under each policy: predicted and measured."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._torch import storage_of
from ..errors import InvflowError
from ..reversible.chain import POLICIES, Kept, plan, run_group
from ..sequential import Sequential
from ..state import leaves, make_state, map_state, shape_of
from ..wires import Step
from .check import inputs
from .reconstruction import reconstruction_errors
from .roundtrip import MODES


@dataclass(frozen=True)
class LayerMemory:
    """What one layer of a chain keeps for backward.

    Attributes:
        layer: what it is.
        kept: bytes by policy. Under "reversible" the last layer of a run is charged with the state that the run keeps.
    """

    layer: str
    kept: dict[str, int]


@dataclass(frozen=True)
class ActivationMemory:
    """The result of `activation_memory`.

    Attributes:
        batch: how many samples.
        layers: one entry per step of the chain: what its layers come to, those inside of others included.
        kept: by policy, the bytes that lie between forward and backward.
        peak: by policy, the most at once, with what backward computes again at its largest layer.
        measured: by policy, the bytes that a real forward kept.
        measured_peak: by policy, the peak of a train step on the accelerator above what lay there before, the gradients
            of the weights included; None on a machine without.
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
    """The activation memory of a training step of a chain; weights and head are not in it.

    Args:
        chain: one that knows its input shape, as every chain built from a spec does. Copies of it run: those that
            predict on the meta device, which holds no numbers.
        batch: samples in a batch.
        log_det: whether training asks for the log-determinant, as a flow's does.
        measure: whether to train a step under each policy as well.

    Examples:
        >>> import invflow
        >>> layers = [{"type": "split"}] + 4 * [{"type": "additive_coupling", "net": {"type": "mlp", "hidden": [8]}}]
        >>> found = activation_memory(invflow.build({"input": {"shape": [16]}, "layers": layers}), batch=1000)
        >>> found.kept["stored"] > 2 * found.kept["reversible"]
        True
    """
    if chain.declared_shape is None:
        raise InvflowError("activation_memory expects a chain built from a spec, which knows the shape of its input")
    steps = chain.steps(chain.declared_shape)
    layers = {step.name: LayerMemory(step.title, dict.fromkeys(POLICIES, 0)) for step in steps}
    kept, peak = {}, {}
    for policy in POLICIES:
        one = _Chain(chain, policy, batch, log_det, torch.device("meta"))
        groups = one.groups()
        sizes = one.kept(groups)
        for (_, group), size in zip(groups, sizes, strict=True):
            layers[group[-1].name].kept[policy] += size
        again = one.kept([("activations", [step]) for _, group in groups for step in group])
        gone = [keeps != "activations" for keeps, group in groups for _ in group]
        largest = max((size for size, lost in zip(again, gone, strict=True) if lost), default=0)
        kept[policy] = sum(sizes)
        # The layers at the end that keep their activations have given them back before any are computed again.
        last = max((i for i, (keeps, _) in enumerate(groups, start=1) if keeps != "activations"), default=0)
        peak[policy] = max(kept[policy], sum(sizes[:last]) + largest)
    if not measure:
        return ActivationMemory(batch, list(layers.values()), kept, peak)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found, peaks = {}, {}
    for policy in POLICIES:
        one = _Chain(chain, policy, batch, log_det, device or torch.device("cpu"))
        found[policy] = sum(one.kept(one.groups()))
        if device is not None:
            peaks[policy] = one.peak()
    return ActivationMemory(batch, list(layers.values()), kept, peak, found, peaks or None)


def reconstructions(chain: Sequential) -> dict[str, dict[str, float]]:
    """`reconstruction_errors` by dtype and mode, ``"float32 train"``, on numbers like pixels."""
    x, context = inputs(chain)
    found = {}
    for dtype in (torch.float32, torch.float64):
        one = copy.deepcopy(chain).to(dtype)
        state = map_state(lambda leaf, dtype=dtype: leaf.to(dtype), x)  # type: ignore[misc]
        given = None if context is None else context.to(dtype)
        for mode in MODES:
            key = f"{str(dtype).removeprefix('torch.')} {mode}"
            found[key] = reconstruction_errors(one.train(mode == "train"), state, given)
    return found


class _Chain:
    """A copy of a chain under a policy, in train mode, with a batch for it."""

    def __init__(self, chain: Sequential, policy: Any, batch: int, log_det: bool, device: torch.device) -> None:
        self.chain = copy.deepcopy(chain).to(device).train()
        self.chain.backprop = policy
        self.log_det = log_det
        like: Any = next(self.chain.parameters(), torch.empty(0))
        make: Any = lambda leaf: torch.randn((batch, *leaf), dtype=like.dtype, device=device)  # noqa: E731
        self.x = make_state(make, chain.declared_shape or ())
        self.context = None if chain.declared_context_shape is None else make(chain.declared_context_shape)

    def groups(self) -> list[tuple[Kept, list[Step]]]:
        steps = self.chain.steps(shape_of(self.x))
        if self.chain.backprop == "stored":
            return [("activations", [step]) for step in steps]
        return plan(steps, self.x, self.context)

    def kept(self, groups: Sequence[tuple[Kept, list[Step]]]) -> list[int]:
        """The bytes that each group keeps and none before it did; weights and buffers are none of them."""
        x = self.x
        sizes: list[int] = []
        alive: list[Any] = []
        known = {storage_of(tensor) for tensor in (*self.chain.parameters(), *self.chain.buffers())}

        def pack(tensor: Tensor) -> Tensor:
            if storage_of(tensor) not in known:
                known.add(storage_of(tensor))
                sizes[-1] += tensor.untyped_storage().nbytes()
            alive.append(tensor)  # so that no later storage takes its place
            return tensor

        for keeps, group in groups:
            sizes.append(0)
            for leaf in leaves(x) if keeps == "input" else ():  # which a checkpoint holds by itself
                pack(leaf)
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                x, log_det = run_group(keeps, group, x, self.context, self.log_det, None)
            alive.append((x, log_det))
        return sizes

    def peak(self) -> int:
        """The most bytes at once in a second train step: the first sets libraries up."""
        before = most = 0
        for _ in range(2):
            self.chain.zero_grad()
            before = torch.accelerator.memory_allocated()
            torch.accelerator.reset_peak_memory_stats()
            y = (
                self.chain.forward_and_log_det(self.x, self.context)
                if self.log_det
                else self.chain(self.x, self.context)
            )
            loss: Any = sum(leaf.square().mean() for leaf in leaves(y) if leaf.is_floating_point())
            loss.backward()
            torch.accelerator.synchronize()
            most = torch.accelerator.max_memory_allocated()
        return int(most) - int(before)
