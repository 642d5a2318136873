"""The cost of wrappers in constant-memory training: a step of couplings in `each`, `parallel`, `on` and `inverse`.

Each contender has the same number of couplings of the same size, trained with ``backprop="reversible"``. They are timed
in turn, round after round; the table shows the median over the rounds of each round's ratio to one flat chain.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from chains import make_net, measure, ours
from rich.console import Console
from rich.table import Table
from torch import Tensor

import invflow
from invflow.bijections import Each, On, Parallel
from invflow.state import leaves

CHANNELS = 16
SHAPES = [(1, 7), (64, 7), (16, 32)]
"""Batch and side."""


def inner(couplings: int) -> invflow.Sequential:
    """A chain of n couplings on halves of the channels."""
    return ours([make_net(CHANNELS // 2) for _ in range(couplings)])


def contenders(couplings: int) -> dict[str, tuple[invflow.Sequential, int]]:
    """Name -> a chain with n couplings, and the number of tensors that it takes."""
    half = couplings // 2
    made: dict[str, tuple[list[invflow.Bijection], int]] = {
        "flat": (list(inner(couplings)), 1),
        "sequential": ([inner(couplings)], 1),
        "inverse": ([invflow.Inverse(inner(couplings))], 1),
        "each": ([Each(inner(half))], 2),
        "parallel": ([Parallel(inner(half), inner(half))], 2),
        "on": ([On(inner(couplings), index=1)], 2),
    }
    return {name: (invflow.Sequential(*layers, backprop="reversible"), parts) for name, (layers, parts) in made.items()}


def step(chain: invflow.Sequential, x: Any) -> None:
    """Forward and backward."""
    chain.zero_grad(set_to_none=True)
    loss: Tensor = sum(leaf.square().mean() for leaf in leaves(chain(x)))  # type: ignore[assignment]
    loss.backward()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--couplings", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    table = Table("batch", "state", *contenders(2))
    for batch, side in SHAPES:
        x = torch.randn(batch, CHANNELS, side, side)
        works: dict[str, Callable[[], Any]] = {
            name: partial(step, chain, x if parts == 1 else (x,) * parts)
            for name, (chain, parts) in contenders(options.couplings).items()
        }
        ratios = measure(works, options.rounds)
        table.add_row(str(batch), f"{CHANNELS}x{side}x{side}", *(f"{ratio:.3f}" for ratio in ratios.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
