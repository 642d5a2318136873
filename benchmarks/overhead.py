"""What invflow costs over hand-written PyTorch, beside FrEIA: forward, inverse and train step of one chain.

The chain: eight additive couplings on halves of 8 channels, each a 3x3 convolution, ReLU and another 3x3 convolution.
All contenders hold the same weights and are checked to compute the same function. They are timed in turn, round after
round, and the table shows the median over the rounds of each round's ratio to hand-written PyTorch: absolute times mean
little on a shared machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import NICECouplingBlock
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import invflow
from invflow.bijections import AdditiveCoupling, Merge, Split

COUPLINGS = 8
CHANNELS = 16
HALF = CHANNELS // 2
SIZES = [(1, 7), (64, 7), (16, 32)]
SECONDS_PER_TURN = 0.03


def make_net(channels_in: int = HALF, channels_out: int = HALF) -> nn.Sequential:
    """The conditioner of every contender."""
    return nn.Sequential(
        nn.Conv2d(channels_in, HALF, 3, padding=1), nn.ReLU(), nn.Conv2d(HALF, channels_out, 3, padding=1)
    )


class HandWritten(nn.Module):
    """The same chain as one would write it for one purpose."""

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.chunk(x, 2, dim=1)
        for net in self.nets:
            a, b = net(a) + b, a
        return torch.cat([a, b], dim=1)

    def inverse(self, y: Tensor) -> Tensor:
        a, b = torch.chunk(y, 2, dim=1)
        for net in reversed(self.nets):
            a, b = b, a - net(b)
        return torch.cat([a, b], dim=1)


class Freia(nn.Module):
    """FrEIA's chain: each of its blocks changes both halves, so that half as many do the same."""

    def __init__(self, nets: list[nn.Module], side: int) -> None:
        super().__init__()
        self.chain = SequenceINN(CHANNELS, side, side)
        for position in range(0, COUPLINGS, 2):
            self.chain.append(NICECouplingBlock, subnet_constructor=make_net)
            # y1 = x1 + F(x2), y2 = x2 + G(y1): with the halves exchanged these are two of the others' couplings.
            self.chain[-1].F, self.chain[-1].G = nets[position], nets[position + 1]

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x)[0]  # type: ignore[no-any-return]

    def inverse(self, y: Tensor) -> Tensor:
        return self.chain(y, rev=True)[0]  # type: ignore[no-any-return]


def exchanged(x: Tensor) -> Tensor:
    """The halves in the other order, as FrEIA has them."""
    return torch.cat(torch.chunk(x, 2, dim=1)[::-1], dim=1)


def contenders(side: int) -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], nn.Module]]:
    """Name -> forward, inverse, module, all with equal weights."""
    torch.manual_seed(0)
    nets: list[nn.Module] = [make_net() for _ in range(COUPLINGS)]
    state = nn.ModuleList(nets).state_dict()

    def copies() -> list[nn.Module]:
        fresh = nn.ModuleList(make_net() for _ in range(COUPLINGS))
        fresh.load_state_dict(state)
        return list(fresh)

    hand = HandWritten(copies())
    ours = invflow.Sequential(Split(), *(AdditiveCoupling(net) for net in copies()), Merge())
    freia = Freia(copies(), side)
    also = invflow.Sequential(Split(), *(AdditiveCoupling(net) for net in copies()), Merge())
    compiled = torch.compile(also, fullgraph=True, dynamic=False)
    compiled_inverse = torch.compile(also.inverse, fullgraph=True, dynamic=False)
    return {
        "hand-written": (hand, hand.inverse, hand),
        "invflow": (ours, ours.inverse, ours),
        "FrEIA": (freia, freia.inverse, freia),
        "invflow compiled": (compiled, compiled_inverse, also),
    }


def train_step(forward: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> None:
    """Forward, backward and a step of SGD."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
    optimizer.zero_grad(set_to_none=True)
    forward(x).square().mean().backward()
    optimizer.step()


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """How long ``repeats`` calls take."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return time.perf_counter() - start


def measure(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median over the rounds of each contender's time, as a ratio to the first one's in the same round."""
    first = next(iter(works))
    for work in works.values():
        seconds(work, 3)
    repeats = max(1, int(SECONDS_PER_TURN / (seconds(works[first], 5) / 5)))
    ratios: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in range(rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]  # nobody always follows the same one
        times = {name: seconds(works[name], repeats) for name in order}
        for name in names:
            ratios[name].append(times[name] / times[first])
    return {name: statistics.median(values) for name, values in ratios.items()}


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
