"""The overhead of invflow and FrEIA over hand-written PyTorch: forward, inverse and training step of one chain.

The chain: eight additive couplings on halves of 8 channels, see chains.py.
All contenders hold the same weights and are checked to compute the same function. They are timed in turn, round after
round, and the table shows the median over the rounds of each round's ratio to hand-written PyTorch: absolute times mean
little on a shared machine.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial

import torch
from chains import HandWritten, equal_nets, exchanged, freia, measure, ours
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

COUPLINGS = 8
CHANNELS = 16
HALF = CHANNELS // 2
SIZES = [(1, 7), (64, 7), (16, 32)]


def contenders(side: int) -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], nn.Module]]:
    """Name -> forward, inverse, module, all with equal weights."""
    nets = equal_nets(HALF, COUPLINGS)
    hand, chain, peer, also = HandWritten(nets()), ours(nets()), freia(nets(), side), ours(nets())
    compiled = torch.compile(also, fullgraph=True, dynamic=False)
    compiled_inverse = torch.compile(also.inverse, fullgraph=True, dynamic=False)
    return {
        "hand-written": (hand, hand.inverse, hand),
        "invflow": (chain, chain.inverse, chain),
        "FrEIA": (peer, peer.inverse, peer),
        "invflow compiled": (compiled, compiled_inverse, also),
    }


def train_step(forward: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> None:
    """Forward, backward and a step of SGD."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
    optimizer.zero_grad(set_to_none=True)
    forward(x).square().mean().backward()
    optimizer.step()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    table = Table("batch", "state", "what", "hand-written", "invflow", "FrEIA", "invflow compiled")
    for batch, side in SIZES:
        made = contenders(side)
        x = torch.randn(batch, CHANNELS, side, side)
        expected = made["hand-written"][0](x)
        for name, (forward, inverse, _) in made.items():
            there, here = (exchanged(x), exchanged(expected)) if name == "FrEIA" else (x, expected)
            torch.testing.assert_close(forward(there), here)
            torch.testing.assert_close(inverse(here), there, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            found = {
                "forward": measure({n: partial(m[0], x) for n, m in made.items()}, options.rounds),
                "inverse": measure({n: partial(m[1], x) for n, m in made.items()}, options.rounds),
            }
        steps = {n: partial(train_step, m[0], m[2], x) for n, m in made.items()}
        found["train step"] = measure(steps, options.rounds)
        for what, ratios in found.items():
            table.add_row(str(batch), f"{CHANNELS}x{side}x{side}", what, *(f"{ratio:.3f}" for ratio in ratios.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
