"""The memory of a training step over depth: plain PyTorch, the three policies of invflow, and other libraries.

Each measurement is its own process: three training steps of couplings on 32 channels of 64x64, batch 32. On a CPU the
figure is the peak of the resident memory above that before the first step, which includes input and weights;
with CUDA it is `torch.cuda.max_memory_allocated` above the same.
"""

from __future__ import annotations

import argparse
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

import torch
from chains import PEERS, HandWritten, equal_nets, ours, present
from rich.console import Console
from rich.table import Table
from torch import nn

BATCH, CHANNELS, SIDE = 32, 32, 64
DEPTHS = [4, 16, 64, 256]
STEPS = 3
MIB = 2**20
LARGEST = 6000
"""MiB: depths that would take more, extrapolated from smaller depths, are skipped."""
EVERY = 0.0005
"""Seconds between two samples of the resident memory."""

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


def measure(name: str, depth: int) -> float:
    """`train` in its own process."""
    # glibc keeps freed blocks of up to 32 MiB; only live tensors are to be measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--one", name, str(depth)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Prints the table, and writes it if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "DEPTH"), help="measure this alone, in this process")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--only", nargs="+", choices=list(CHAINS), help="these alone")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
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
                figures[depth] = measure(name, depth)
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
