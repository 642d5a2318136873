"""The cost of training without kept activations: a training step of invflow and others, relative to plain PyTorch.

All contenders hold the same weights, and their gradients are compared before they are timed, in turn, round after
round; the table shows the median over the rounds of each round's ratio to hand-written PyTorch, which keeps everything.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chains import PEERS, HandWritten, equal_nets, exchanged, measure, ours, present
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

DEPTH = 8
SHAPES = [(1, 16, 7), (64, 16, 7), (16, 16, 32), (32, 16, 64)]
"""Batch, channels and side: the sizes of the overhead table and that of the memory table."""
GRADIENTS = 1e-4
"""The relative error allowed for eight couplings and their reconstruction in float32; wrong gradients are far worse."""


def step(forward: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """Forward, backward and a step of SGD."""
    optimizer.zero_grad(set_to_none=True)
    forward(x).square().mean().backward()
    optimizer.step()


class Contender(nn.Module):
    """A chain with its conditioners in data order, and with the preparation that a peer requires of its users."""

    def __init__(self, nets: list[nn.Module], chain: nn.Module, peer: bool) -> None:
        super().__init__()
        self.chain = chain
        self.nets = nn.ModuleList(nets)
        self.peer = peer

    def forward(self, x: Tensor) -> Tensor:
        if self.peer:  # otherwise they give no gradients, or empty the caller's tensor
            x = x.detach().clone().requires_grad_()
        y: Tensor = self.chain(x)
        return y

    def gradients(self, x: Tensor) -> Tensor:
        """The gradients of the weights, flat."""
        self.zero_grad()
        self(exchanged(x) if self.peer else x).square().mean().backward()
        return torch.cat([weight.grad.flatten() for weight in self.nets.parameters() if weight.grad is not None])


def contenders(channels: int, side: int, depth: int, peers: list[str], device: str) -> dict[str, Contender]:
    """Name -> chain, all with equal weights; the first is the reference."""
    make_nets = equal_nets(channels // 2, depth)
    chains: dict[str, Callable[[list[nn.Module]], nn.Module]] = {
        "plain": HandWritten,
        "invflow": partial(ours, backprop="reversible"),
        "invflow, no monitor": partial(ours, backprop="reversible", monitor="off"),
        "invflow, checkpoint": partial(ours, backprop="checkpoint"),
        "invflow, stored": ours,
        **{name: partial(PEERS[name][1], side=side) for name in peers},
    }
    made = {}
    for name, chain in chains.items():
        nets = make_nets()
        made[name] = Contender(nets, chain(nets), name in PEERS).to(device)
    return made


def check_gradients(made: dict[str, Contender], x: Tensor) -> None:
    """Checks that all contenders compute the same gradients."""
    found = {name: contender.gradients(x) for name, contender in made.items()}
    for name, gradient in found.items():
        error = float((gradient - found["plain"]).norm() / found["plain"].norm())
        if not error < GRADIENTS:
            raise SystemExit(f"{name}: gradients differ from plain training's by {error:.1e}")


def main() -> None:
    """Prints the table, and writes it if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--depth", type=int, default=DEPTH)
    parser.add_argument("--only", type=int, nargs="*", help="positions in the list of shapes")
    parser.add_argument("--json", type=Path, help="where to write the ratios")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peers, absent = present()
    rows: list[dict[str, Any]] = []
    for position, (batch, channels, side) in enumerate(SHAPES):
        if options.only is not None and position not in options.only:
            continue
        made = contenders(channels, side, options.depth, peers, device)
        x = torch.randn(batch, channels, side, side, device=device)
        check_gradients(made, x)
        works = {n: partial(step, m, torch.optim.SGD(m.parameters(), lr=1e-6), x) for n, m in made.items()}
        ratios = measure(works, options.rounds)
        fastest = min(ratio for name, ratio in ratios.items() if name in PEERS and name != "FrEIA")
        rows.append({"batch": batch, "state": f"{channels}x{side}x{side}", **ratios})
        rows[-1]["invflow / fastest peer"] = ratios["invflow"] / fastest
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.3g}" for value in row.values()))
    Console(width=200).print(table)
    for name in absent:
        print(f"{name} is not installed: left out")
    if options.json:
        options.json.write_text(json.dumps({"device": device, "depth": options.depth, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
