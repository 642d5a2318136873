"""The cost of exactness: forward, inverse and training step of one chain in grid and exact numerics, relative to float.

The chain is the i-RevNet of specs/irevnet_mnist.json, and the augmented one with its batch norm. All contenders come
from the same weights and are checked to compute the same function up to the resolution of their numerics. They are
timed in turn, round after round, and the table shows the median over the rounds of each round's ratio to float.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import invflow
from invflow.models.freezing import freeze
from invflow.numerics import Exact, Grid

SPECS = Path(__file__).parent.parent / "specs"
CHAINS = ("irevnet_mnist.json", "irevnet_mnist_augmented.json")
BATCHES = (1, 64, 500)
SECONDS_PER_TURN = 0.05
RESOLUTION = 0.05
"""Activations of 10 bits change features of order 1 by a few thousandths per coupling."""


def contenders(spec: str, x: Tensor) -> dict[str, invflow.Sequential]:
    """The chain in each numerics, from the same weights."""
    torch.manual_seed(0)
    real = invflow.build(SPECS / spec).eval()
    with torch.no_grad():
        return {
            "float": real,
            "grid": freeze(real, x, Grid(mode="grid")),
            "exact": freeze(real, x, Exact(mode="exact")),
        }


def train_step(chain: invflow.Sequential, x: Tensor) -> None:
    """Forward and backward."""
    chain(x).square().mean().backward()


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """The seconds of ``repeats`` calls."""
    start = time.process_time()  # one thread computes: other processes do not count
    for _ in range(repeats):
        work()
    return time.process_time() - start


def measure(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median over the rounds of each contender's time, as a ratio to the first one's in the same round."""
    names = list(works)
    for work in works.values():
        seconds(work, 3)
    repeats = max(1, int(SECONDS_PER_TURN / (seconds(works[names[0]], 5) / 5)))
    ratios: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]  # none always follows the same one
        times = {name: seconds(works[name], repeats) for name in order}
        for name in names:
            ratios[name].append(times[name] / times[names[0]])
    return {name: statistics.median(values) for name, values in ratios.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--specs", nargs="+", default=CHAINS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("chain", "batch", "what", "float", "grid", "exact")
    for spec in options.specs:
        x = torch.randint(256, (max(BATCHES), 1, 28, 28), generator=torch.Generator().manual_seed(0)) / 256
        made = contenders(spec, x)
        with torch.no_grad():
            expected = made["float"](x)
            for chain in made.values():
                torch.testing.assert_close(chain(x), expected, atol=RESOLUTION, rtol=0.0)
                assert chain.exactness == "float" or torch.equal(chain.inverse(chain(x)), x)
            for batch in options.batches:
                part = x[:batch]
                z = {name: chain(part) for name, chain in made.items()}
                found = {
                    "forward": measure({n: partial(c, part) for n, c in made.items()}, options.rounds),
                    "inverse": measure({n: partial(c.inverse, z[n]) for n, c in made.items()}, options.rounds),
                }
                for what, ratios in found.items():
                    table.add_row(spec, str(batch), what, *(f"{ratio:.3f}" for ratio in ratios.values()))
        trained = {name: chain.train() for name, chain in made.items() if name != "exact"}
        steps = {name: partial(train_step, chain, x[:64]) for name, chain in trained.items()}
        ratios = measure(steps, options.rounds)
        table.add_row(spec, "64", "train step", *(f"{ratio:.3f}" for ratio in ratios.values()), "")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
