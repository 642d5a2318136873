"""One chain of additive couplings in several libraries, and the timing of contenders in turn.

The chain: couplings on halves of the channels, each conditioner a 3x3 convolution, ReLU and another 3x3 convolution.
All contenders hold the same weights and compute the same function, up to the order of the halves.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import invflow
from invflow.bijections import AdditiveCoupling, Merge, Split

SECONDS_PER_TURN = 0.03


@dataclass(frozen=True)
class Contender:
    """A density, called as users of its library call it."""

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]


def make_net(channels: int) -> nn.Sequential:
    """The conditioner of every contender."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
    )


class HandWritten(nn.Module):
    """The chain written for this purpose only."""

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


def ours(nets: list[nn.Module], **options: Any) -> invflow.Sequential:
    """Ours, with the options of `Sequential`."""
    return invflow.Sequential(Split(), *(AdditiveCoupling(net) for net in nets), Merge(), **options)


def freia(nets: list[nn.Module], side: int) -> nn.Module:
    """FrEIA: each of its blocks changes both halves, so that half as many blocks do the same."""
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import NICECouplingBlock

    channels = nets[0][0].in_channels  # type: ignore[index, union-attr]

    class Freia(nn.Module):
        """Without its lists and log-determinants."""

        def __init__(self) -> None:
            super().__init__()
            self.chain = SequenceINN(2 * channels, side, side)
            for position in range(0, len(nets), 2):
                self.chain.append(NICECouplingBlock, subnet_constructor=lambda n, _: make_net(n))
                # y1 = x1 + F(x2), y2 = x2 + G(y1): with the halves exchanged, two couplings of the others.
                self.chain[-1].F, self.chain[-1].G = nets[position], nets[position + 1]

        def forward(self, x: Tensor) -> Tensor:
            return self.chain(x)[0]  # type: ignore[no-any-return]

        def inverse(self, y: Tensor) -> Tensor:
            return self.chain(y, rev=True)[0]  # type: ignore[no-any-return]

    return Freia()


def memcnn(nets: list[nn.Module], side: int) -> nn.Module:
    """MemCNN: a wrapper around each pair of couplings; without it the inputs would not be freed."""
    library = importlib.import_module("memcnn")
    blocks = (library.AdditiveCoupling(*nets[position : position + 2]) for position in range(0, len(nets), 2))
    return nn.Sequential(*(library.InvertibleModuleWrapper(block) for block in blocks))


def revtorch(nets: list[nn.Module], side: int) -> nn.Module:
    """revtorch: one autograd function over all blocks, like ours."""
    library = importlib.import_module("revtorch.revtorch")
    pairs = [nets[position : position + 2] for position in range(0, len(nets), 2)]
    return library.ReversibleSequence(nn.ModuleList(library.ReversibleBlock(*pair) for pair in pairs))  # type: ignore[no-any-return]


def revlib(nets: list[nn.Module], side: int) -> nn.Module:
    """RevLib in its default mode."""
    return importlib.import_module("revlib").ReversibleSequential(*nets)  # type: ignore[no-any-return]


PEERS: dict[str, tuple[str, Callable[[list[nn.Module], int], nn.Module]]] = {
    "FrEIA": ("FrEIA", freia),
    "MemCNN": ("memcnn", memcnn),
    "revtorch": ("revtorch", revtorch),
    "RevLib": ("revlib", revlib),
}
"""Name -> the module to import, and the chain. All but FrEIA train without keeping activations."""


def present(names: list[str] | None = None) -> tuple[list[str], list[str]]:
    """The peers that are installed, and those that are missing."""
    here, absent = [], []
    for name in names or list(PEERS):
        with contextlib.suppress(ImportError):
            importlib.import_module(PEERS[name][0])
            here.append(name)
            continue
        absent.append(name)
    return here, absent


def exchanged(x: Tensor) -> Tensor:
    """The halves in the other order: the peers change the first half by a function of the second."""
    return torch.cat(torch.chunk(x, 2, dim=1)[::-1], dim=1)


def equal_nets(channels: int, depth: int) -> Callable[[], list[nn.Module]]:
    """A function that returns new conditioners with the same weights."""
    torch.manual_seed(0)
    state = nn.ModuleList(make_net(channels) for _ in range(depth)).state_dict()

    def make() -> list[nn.Module]:
        fresh = nn.ModuleList(make_net(channels) for _ in range(depth))
        fresh.load_state_dict(state)
        return list(fresh)

    return make


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """The seconds of ``repeats`` calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
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
        order = names[turn % len(names) :] + names[: turn % len(names)]  # none always follows the same one
        times = {name: seconds(works[name], repeats) for name in order}
        for name in names:
            ratios[name].append(times[name] / times[first])
    return {name: statistics.median(values) for name, values in ratios.items()}
