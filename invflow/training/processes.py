"""The processes that train a model together, on one machine or several."""

from __future__ import annotations

import contextlib
import os
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import Fabric
from lightning.fabric.utilities import rank_zero
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._torch import is_shard
from ..errors import InvflowError, LocalStatisticsWarning, RunError
from ..models import Classifier, Flow
from ..spec.training import Hardware, Training
from .data import Sharing, smallest_batch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .tasks import Task


class LostProcess(RunError):
    """Another process of the training has ended."""


_LOST = (torch.distributed.DistBackendError, torch.distributed.DistNetworkError)
_LOST_WORDS = r"Connection (closed|reset)|Broken pipe|Connect timeout|Timed out"
"""In what gloo says of a process that has ended."""


_LATER = 5.0
"""The seconds after which a process ends, so that the one that leads has told: launchers end all with the first."""


def _rank() -> int:
    return int(vars(rank_zero.rank_zero_only)["rank"])


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in model.modules())


def leads() -> bool:
    """Whether this process writes the run and tells of it: the only one, or the first of several."""
    return _rank() == 0


@contextlib.contextmanager
def one_tells() -> Iterator[None]:
    """Inside, only the process that leads raises an InvflowError; the others end, unless that one has ended."""
    parent = os.getppid()  # the process that leads, if it has started the others
    try:
        yield
    except InvflowError:
        if leads() or (_rank() == 1 and os.getppid() != parent):
            raise
        time.sleep(_LATER)
        raise SystemExit(1) from None


@dataclass(frozen=True)
class Processes:
    """The processes of a training, of which this is one.

    Attributes:
        rank: the number of this process.
        count: how many there are.
        hardware: where they train.
    """

    rank: int
    count: int
    hardware: Hardware

    @property
    def leads(self) -> bool:
        """Whether this process writes the run and tells of it."""
        return self.rank == 0

    @property
    def shards(self) -> bool:
        """Whether each process has only a part of the weights."""
        return self.count > 1 and self.hardware.strategy == "fsdp"

    def sharing(self, parts: int) -> Sharing:
        """How they share batches, each of whose shares is taken in so many parts."""
        return Sharing(self.rank, self.count, parts)

    def arguments(self, model: nn.Module) -> dict[str, Any]:
        """Lightning's arguments for them to train a model.

        Warns of a model whose batch norm cannot take the statistics of a whole batch.
        """
        return {**accelerator(self.hardware.accelerator, self.hardware.devices), **self._several(model)}

    @contextlib.contextmanager
    def guarded(self, folder: Path) -> Iterator[None]:
        """Inside, the end of another process is one sentence, an InvflowError."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if self.count == 1 or (not isinstance(error, _LOST) and not re.search(_LOST_WORDS, str(error))):
                raise
            raise LostProcess(
                f"{folder}: another of the {self.count} processes of this training ended, which goes on no longer; "
                f"resume it with --resume"
            ) from None

    @contextlib.contextmanager
    def in_turn(self, folder: Path) -> Iterator[Path]:
        """The folder of the process that leads; the others go on when it has left the context."""
        if self.count == 1:
            yield folder
            return
        names: list[Any] = [folder]
        with self.guarded(folder):
            torch.distributed.broadcast_object_list(names, src=0)
            yield names[0]
            torch.distributed.barrier()

    def require_statistics(self, task: Task[Any], options: Training) -> None:
        """Raise InvflowError if batch norm would get a share of one sample, of which there are no statistics."""
        shares = self.count * options.accumulate
        if shares == 1 or not _has_batch_norm(task.model):
            return
        size = smallest_batch(task.data.train, options.batch_size)
        if size is not None and size < 2 * shares:
            raise InvflowError(
                f"a batch of {size} samples leaves less than 2 for each of {shares} shares, and batch norm has no "
                f"statistics of one; take another batch_size, or fewer shares"
            )

    def _several(self, model: nn.Module) -> dict[str, Any]:
        if self.count == 1:
            return {}
        on_cuda = torch.cuda.is_available() and self.hardware.accelerator not in ("cpu", "mps")
        if self.leads and not on_cuda and _has_batch_norm(model):
            warnings.warn(
                f"batch norm takes the statistics of each process's own share: PyTorch puts those of {self.count} "
                f"processes together on CUDA alone",
                LocalStatisticsWarning,
                stacklevel=2,
            )
        strategy: Strategy = DDPStrategy()
        if self.shards:
            strategy = ModelParallelStrategy(data_parallel_size=self.count, tensor_parallel_size=1)
        shared = {"num_nodes": self.hardware.nodes, "sync_batchnorm": on_cuda, "use_distributed_sampler": False}
        return {"strategy": strategy, **shared}


def processes_of(hardware: Hardware) -> Processes:
    """The processes for which this one is started, or that Lightning will start.

    Raises:
        InvflowError: this machine does not have the devices, or the launcher started another number of processes.
    """
    known = accelerator(hardware.accelerator, hardware.devices)
    count = hardware.devices * hardware.nodes
    if count == 1:
        _require_number(_started(), hardware)
        return Processes(0, 1, hardware)
    if Console().is_jupyter:
        raise InvflowError(
            "several processes need a program to start again, which a notebook is not; use invflow train"
        )
    fabric = Fabric(**known, num_nodes=hardware.nodes, strategy="ddp")
    _require_number(fabric.world_size, hardware)
    return Processes(fabric.global_rank, count, hardware)


def _started() -> int:
    """The number of processes that a launcher has started, of which this is one."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")))


def _require_number(started: int, hardware: Hardware) -> None:
    """Raise InvflowError if a launcher has started other processes than those that are to train together."""
    count = hardware.devices * hardware.nodes
    if started != count:
        raise InvflowError(
            f"a launcher has started {started} processes, but --devices {hardware.devices} times --nodes "
            f"{hardware.nodes} {'is' if count == 1 else 'are'} {count}"
        )


def accelerator(device: str, devices: int = 1, *, mine: bool = False) -> dict[str, Any]:
    """Lightning's arguments for a device, or for several alike.

    Args:
        device: auto, cpu, cuda, cuda:1 or mps.
        devices: their number.
        mine: whether to take, of several, the one of this process.

    Raises:
        InvflowError: this machine does not have it, or not as many.
    """
    cuda = torch.cuda.device_count()
    there = ["cpu", *(f"cuda:{index}" for index in range(cuda)), *["mps"] * torch.backends.mps.is_available()]
    if device not in ("auto", *there, *["cuda"] * bool(cuda)):
        raise InvflowError(f"device {device!r} is not available; expected auto or one of: {', '.join(there)}")
    kind, _, index = device.partition(":")
    if mine and cuda and kind in ("auto", "cuda") and not index:
        kind, index = "cuda", os.environ.get("LOCAL_RANK", "0")
    if devices > 1:
        if kind == "auto":  # of which Lightning would choose mps, where there is but one
            kind = "cuda" if cuda else "cpu"
        found = {"cuda": cuda, "mps": 1}.get(kind, devices)
        if index or devices > found:
            raise InvflowError(
                f"--devices {devices} expects as many of {device}, and there {_are(1 if index else found)}"
            )
    return {"accelerator": kind, "devices": [int(index)] if index else devices}


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"


def shard(model: Classifier | Flow, mesh: DeviceMesh) -> None:
    """Shard the weights of a model over processes: those of each layer of its chain together, and then the rest.

    A chain whose backward runs its layers backwards needs the weights of all of them there: it is sharded as a whole.
    """
    from torch.distributed.fsdp import fully_shard

    chain = model.bijection
    for part in [chain] if chain.backprop == "reversible" else dict.fromkeys(chain):
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(state: Any) -> Any:
    """A state dict with whole tensors on the CPU in place of their parts; every process must ask for it at once."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole(value) for value in state)
    if isinstance(state, Tensor):
        return (state.full_tensor() if is_shard(state) else state).cpu()  # type: ignore[attr-defined]
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `whole` made of an optimiser's state dict; of tensors like sharded weights, each takes its part."""
    from torch.distributed.tensor import distribute_tensor

    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def part(weight: Any, value: Any) -> Any:
        if is_shard(weight) and isinstance(value, Tensor) and value.shape == weight.shape:
            return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
        return value

    parts = {i: {name: part(weights[i], value) for name, value in one.items()} for i, one in state["state"].items()}
    # Which kernel updates them is a matter of where they are.
    groups = [
        {**group, "fused": here.get("fused")} if "fused" in group else group
        for group, here in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "state": parts, "param_groups": groups})
