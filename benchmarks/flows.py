"""The cost of a density: one RealNVP in several libraries, relative to hand-written PyTorch.

The model: eight affine couplings on halves of 16 numbers, each conditioner an MLP 8 -> 64 -> 64 -> 16 with ReLU, and a
standard normal prior. invflow and FrEIA hold the weights of the hand-written one and are checked to compute the same
densities and samples. The others bound the scale differently, so that only the number and the size of the
conditioners are equal: nflows by a sigmoid, zuko by a soft clip, normflows not at all.

All are timed in turn, round after round; the table shows the median over the rounds of each round's ratio to
hand-written PyTorch. Densities and samples are timed without gradients.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chains import exchanged, measure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import invflow
from invflow.bijections import AffineCoupling, Merge, Split
from invflow.models import StandardNormal

FEATURES = 16
HALF = FEATURES // 2
HIDDEN = (64, 64)
COUPLINGS = 8
LOG_NORMALIZER = FEATURES / 2 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Contender:
    """A density, called as users of the library call it."""

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]


def make_net(inputs: int = HALF, outputs: int = FEATURES) -> nn.Sequential:
    """A conditioner: half of its outputs are raw log-scales, half are shifts."""
    a, b = HIDDEN
    return nn.Sequential(nn.Linear(inputs, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, outputs))


class HandWritten(nn.Module):
    """The density written for this purpose only."""

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def log_prob(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        log_det = x.new_zeros(len(x))
        for net in self.nets:
            r, t = net(a).chunk(2, 1)
            s = torch.tanh(r)
            a, b = torch.exp(s) * b + t, a
            log_det = log_det + s.sum(1)
        z = torch.cat([a, b], 1)
        return -0.5 * z.square().sum(1) - LOG_NORMALIZER + log_det

    def inverse(self, z: Tensor) -> Tensor:
        a, b = z.chunk(2, 1)
        for net in reversed(self.nets):
            r, t = net(b).chunk(2, 1)
            a, b = b, torch.exp(-torch.tanh(r)) * (a - t)
        return torch.cat([a, b], 1)

    def sample(self, count: int) -> Tensor:
        return self.inverse(torch.randn(count, FEATURES))


def hand_written(nets: list[nn.Module]) -> Contender:
    """The reference for the others."""
    density = HandWritten(nets)
    return Contender(density, density.log_prob, density.sample)


def ours(nets: list[nn.Module]) -> Contender:
    """Ours."""
    chain = invflow.Sequential(Split(), *(AffineCoupling(net, clamp=1.0) for net in nets), Merge())
    flow = invflow.Flow(chain, StandardNormal(shape=(FEATURES,)))
    return Contender(flow, flow.log_prob, flow.sample)


def freia(nets: list[nn.Module]) -> Contender:
    """FrEIA: each block changes both halves, so that half as many blocks do the same; it has no prior."""
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import GLOWCouplingBlock

    chain = SequenceINN(FEATURES)
    for position in range(0, len(nets), 2):
        chain.append(GLOWCouplingBlock, subnet_constructor=make_net, clamp=1.0, clamp_activation="TANH")
        # x1 is changed by subnet2(x2), then x2 by subnet1(y1): with the halves exchanged, two couplings of the others.
        chain[-1].subnet2, chain[-1].subnet1 = nets[position], nets[position + 1]

    def log_prob(x: Tensor) -> Tensor:
        z, log_det = chain(x)
        return -0.5 * z.square().sum(1) - LOG_NORMALIZER + log_det

    return Contender(chain, log_prob, lambda count: chain(torch.randn(count, FEATURES), rev=True)[0])


def nflows(nets: list[nn.Module]) -> Contender:
    """nflows: the couplings of its SimpleRealNVP, which itself has residual conditioners."""
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import AffineCouplingTransform, CompositeTransform

    class Net(nn.Sequential):
        """Called with the context too, which its own MLP refuses."""

        def forward(self, x: Tensor, context: None = None) -> Tensor:
            return super().forward(x)

    masks = [(torch.arange(FEATURES) + position) % 2 for position in range(len(nets))]
    couplings = [AffineCouplingTransform(mask, lambda *sizes: Net(*make_net(*sizes))) for mask in masks]
    flow = Flow(CompositeTransform(couplings), StandardNormal([FEATURES]))
    return Contender(flow, flow.log_prob, flow.sample)


def normflows(nets: list[nn.Module]) -> Contender:
    """The chain of normflows' README, with a prior that is not trained; its samples come with their densities."""
    import normflows as nf

    chain: list[nn.Module] = []
    for _ in nets:
        net = nf.nets.MLP([HALF, *HIDDEN, FEATURES])
        chain += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(FEATURES, mode="swap")]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(FEATURES, trainable=False), chain)
    return Contender(flow, flow.log_prob, lambda count: flow.sample(count)[0])


def zuko(nets: list[nn.Module]) -> Contender:
    """The RealNVP of zuko with default settings."""
    from zuko.flows import RealNVP

    flow = RealNVP(FEATURES, transforms=len(nets), hidden_features=HIDDEN)
    return Contender(flow, lambda x: flow().log_prob(x), lambda count: flow().sample((count,)))


OURS = {"hand-written": hand_written, "invflow": ours}
PEERS = {"FrEIA": freia, "nflows": nflows, "normflows": normflows, "zuko": zuko}


def contenders(with_peers: bool) -> tuple[dict[str, Contender], list[str]]:
    """Name -> density, the reference first; and the peers that are not installed."""
    torch.manual_seed(0)
    nets: list[nn.Module] = [make_net() for _ in range(COUPLINGS)]
    made, absent = {}, []
    for name, build in (OURS | PEERS if with_peers else OURS).items():
        try:
            made[name] = build(copy.deepcopy(nets))
        except ImportError:
            absent.append(name)
    return made, absent


def check(made: dict[str, Contender]) -> None:
    """Checks that all have the same size, and that those with the weights of the hand-written one compute the same."""
    hand = made["hand-written"].module
    x = torch.randn(64, FEATURES)
    orders: dict[str, Callable[[Tensor], Tensor]] = {"invflow": lambda state: state, "FrEIA": exchanged}
    for name, contender in made.items():
        size, expected = (parameters_to_vector(module.parameters()).numel() for module in (contender.module, hand))
        assert abs(size / expected - 1) < 0.05, f"{name} has {size} weights"
    for name in orders.keys() & made.keys():
        order, contender = orders[name], made[name]
        torch.testing.assert_close(contender.log_prob(order(x)), hand.log_prob(x))
        torch.manual_seed(1)
        found = contender.sample(len(x))
        torch.manual_seed(1)
        torch.testing.assert_close(found, order(hand.inverse(order(torch.randn(x.shape)))), atol=1e-5, rtol=1e-5)


def step(contender: Contender, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """Forward, backward and a step of SGD."""
    optimizer.zero_grad()
    (-contender.log_prob(x).mean()).backward()
    optimizer.step()


def ratios(made: dict[str, Contender], batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Operation -> contender -> ratio."""
    x = torch.randn(batch, FEATURES)
    with torch.no_grad():
        densities = measure({name: partial(contender.log_prob, x) for name, contender in made.items()}, rounds)
        samples = measure({name: partial(contender.sample, batch) for name, contender in made.items()}, rounds)
    optimizers = {name: torch.optim.SGD(contender.module.parameters(), lr=1e-6) for name, contender in made.items()}
    steps = {name: partial(step, contender, optimizers[name], x) for name, contender in made.items()}
    return {"log_prob": densities, "sample": samples, "step": measure(steps, rounds)}


def main() -> None:
    """Prints the table, and writes it if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256, 4096])
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="other libraries too")
    parser.add_argument("--json", type=Path, help="where to write the ratios")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    made, absent = contenders(options.peers)
    check(made)
    rows: list[dict[str, Any]] = []
    for batch in options.batches:
        rows += [{"batch": batch, "what": what, **cells} for what, cells in ratios(made, batch, options.rounds).items()]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=120).print(table)
    for row in rows:
        fastest = min(list(made)[1:], key=row.__getitem__)
        if fastest != "invflow":
            print(f"batch {row['batch']}, {row['what']}: {fastest} is faster, by {row['invflow'] / row[fastest]:.3f}")
    for name in absent:
        print(f"{name} is not installed: left out")
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
