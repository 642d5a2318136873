"""The memory of a training step over depth: plain PyTorch, the three policies of invflow, and other libraries.

Each measurement is its own process: three training steps of couplings on 32 channels of 64x64, batch 32. On a CPU the
figure is the peak of the resident memory above that before the first step, which includes input and weights;
with CUDA it is `torch.cuda.max_memory_allocated` above the same.

With --spec, instead: each of twelve training steps of a spec's classifier under the three policies; and, at the weights
of each of them, how far the gradients of reversible and of plain float32 are from those of float64.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chains import PEERS, HandWritten, equal_nets, ours, present
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import invflow

BATCH, CHANNELS, SIDE = 32, 32, 64
DEPTHS = [4, 16, 64, 256]
STEPS = 3
MIB = 2**20
LARGEST = 6000
"""MiB: depths that would take more, extrapolated from smaller depths, are skipped."""
EVERY = 0.0005
"""Seconds between two samples of the resident memory."""

SPEC_STEPS, SPEC_BATCH = 12, 16
WARM = 3
"""Steps of a spec after which nothing is allocated for the first time, and the monitor has found what it will find."""

CHAINS: dict[str, Callable[[list[nn.Module]], nn.Module]] = {
    "plain": HandWritten,
    "invflow stored": ours,
    "invflow checkpoint": partial(ours, backprop="checkpoint"),
    "invflow reversible": partial(ours, backprop="reversible"),
    **{name: partial(peer, side=SIDE) for name, (_, peer) in PEERS.items()},
}


class Peak:
    """The largest resident memory while it runs; the peak of the kernel would include memory freed before."""

    def __init__(self) -> None:
        self.before = self.largest = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _now(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.largest = max(self.largest, self._now())
            time.sleep(EVERY)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def train(name: str, depth: int) -> float:
    """The peak of three training steps, in MiB."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chain = CHAINS[name](equal_nets(CHANNELS // 2, depth)()).to(device)
    small = torch.randn(2, CHANNELS, SIDE, SIDE, device=device)
    optimizer = torch.optim.SGD(chain.parameters(), lr=1e-6)

    def step(x: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        if name in PEERS:  # otherwise they give no gradients, or empty the caller's tensor
            x = x.clone().requires_grad_()
        chain(x).square().mean().backward()
        optimizer.step()

    step(small)  # memory that libraries allocate once is not an activation
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(STEPS):
            step(x)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with Peak() as peak:
        for _ in range(STEPS):
            step(x)
    return (peak.largest - peak.before) / MIB


class Training:
    """Training steps of a spec's classifier on one batch of noise, with the optimizer of the papers on CIFAR-10."""

    def __init__(self, spec: str, policy: str) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model: Any = invflow.build_model(spec)
        self.model.bijection.backprop = policy
        self.x = torch.rand(SPEC_BATCH, *self.model.bijection.declared_shape)
        with torch.no_grad():
            classes = self.model.eval()(self.x).shape[1]
        self.model.train()
        self.labels = torch.randint(classes, (SPEC_BATCH,))
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def backward(self, number: int, model: Any = None) -> float:
        """Computes the gradients of a step, whose number decides what dropout drops, and returns the loss."""
        model = model or self.model
        torch.manual_seed(number)
        model.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(self.x.to(next(model.parameters()).dtype)), self.labels)
        loss.backward()
        return float(loss.detach())

    def step(self) -> None:
        """Changes the weights."""
        self._optimizer.step()


def train_spec(spec: str, policy: str) -> dict[str, list[Any]]:
    """For each step of a training: its loss, its peak in MiB above what it begins with, and what it repaired."""
    training = Training(spec, policy)
    found: dict[str, list[Any]] = {"loss": [], "MiB": [], "repaired": []}
    anchors: set[str] = set()
    for number in range(SPEC_STEPS):
        training.model.zero_grad(set_to_none=True)
        with Peak() as peak:
            found["loss"].append(training.backward(number))
            training.step()
        found["MiB"].append((peak.largest - peak.before) / MIB)
        now = set(training.model.bijection.reconstruction.anchors)
        found["repaired"].append(sorted(now - anchors))
        anchors = now
    return found


def gradient_errors(spec: str) -> dict[str, list[float]]:
    """For each step of a training: the relative errors of the gradients of the whole network, against float64's."""
    training = Training(spec, "reversible")
    found: dict[str, list[float]] = {"reversible": [], "stored": []}
    for number in range(SPEC_STEPS):
        gradients: list[Tensor] = []
        stored = copy.deepcopy(training.model)
        stored.bijection.backprop = "stored"
        for model in (copy.deepcopy(stored).double(), stored, training.model):
            training.backward(number, model)
            gradients.append(torch.cat([weight.grad.flatten().double() for weight in model.parameters()]))
        for name, gradient in zip(("stored", "reversible"), gradients[1:], strict=True):
            found[name].append(float((gradient - gradients[0]).norm() / gradients[0].norm()))
        training.step()
    return found


def report_spec(spec: str) -> dict[str, Any]:
    """Prints what the two functions above find, and returns it."""
    policies = "stored", "checkpoint", "reversible"
    found: dict[str, Any] = {policy: alone("--one-spec", spec, policy) for policy in policies}
    found["gradient error"] = alone("--one-spec", spec, "gradients")
    table = Table("step", "stored, MiB", "checkpoint", "reversible", "repaired", "stored, gradient error", "reversible")
    for step in range(SPEC_STEPS):
        memory = (f"{found[policy]['MiB'][step]:.0f}" for policy in policies)
        errors = (f"{found['gradient error'][name][step]:.1e}" for name in ("stored", "reversible"))
        table.add_row(str(step + 1), *memory, " ".join(found["reversible"]["repaired"][step]), *errors)
    Console(width=160).print(table)
    largest = {policy: max(found[policy]["MiB"][WARM:]) for policy in ("stored", "reversible")}
    print(f"reversible / stored, largest after step {WARM}: {largest['reversible'] / largest['stored']:.2f}")
    return found


def alone(*arguments: str) -> Any:
    """What this script finds with these arguments in its own process."""
    # glibc keeps freed blocks of up to 32 MiB; only live tensors are to be measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints the table, and writes it if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "DEPTH"), help="measure this alone, in this process")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--only", nargs="+", choices=list(CHAINS), help="these alone")
    parser.add_argument("--spec", help="measure the training steps of this spec instead")
    parser.add_argument("--one-spec", nargs=2, metavar=("SPEC", "POLICY"), help="this alone, or its gradients")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    if options.one_spec:
        spec, policy = options.one_spec
        print(json.dumps(gradient_errors(spec) if policy == "gradients" else train_spec(spec, policy)))
        return
    if options.spec:
        measured = report_spec(options.spec)
        if options.json:
            options.json.write_text(json.dumps(measured, indent=2) + "\n")
        return
    if options.one:
        print(train(options.one[0], int(options.one[1])))
        return
    warnings.filterwarnings("ignore")
    _, absent = present()
    table = Table("MiB at depth", *map(str, options.depths))
    found: dict[str, dict[str, float]] = {}
    for name in options.only or [name for name in CHAINS if name not in absent]:
        figures: dict[int, float] = {}
        for depth in options.depths:
            last = max(figures, default=0)
            if not last or figures[last] * depth / last < LARGEST or figures[last] < 1.5 * figures[min(figures)]:
                figures[depth] = alone("--one", name, str(depth))
        found[name] = {str(depth): round(figure, 1) for depth, figure in figures.items()}
        table.add_row(name, *(f"{figures[depth]:.0f}" if depth in figures else "" for depth in options.depths))
        print(name, found[name], file=sys.stderr)
    Console().print(table)
    for name in absent:
        print(f"{name} is not installed: left out")
    if options.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        options.json.write_text(json.dumps({"device": device, "MiB": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
