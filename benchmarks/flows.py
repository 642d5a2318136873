"""The cost of a density: one flow in several libraries, relative to the first of them.

The model: eight couplings on halves of 16 numbers, each conditioner an MLP 8 -> 64 -> 64 -> outputs with ReLU, and a
standard normal prior.

affine: a RealNVP, relative to hand-written PyTorch. invflow and FrEIA hold the weights of the hand-written one and are
checked to compute the same densities and samples. The others bound the scale differently, so that only the number and
the size of the conditioners are equal: nflows by a sigmoid, zuko by a soft clip, normflows not at all.

spline: a neural spline flow with 8 bins, relative to invflow. The number and the size of the conditioners are equal;
nflows and normflows have the same splines, zuko clips their logits. FrEIA has none.

maf: eight affine autoregressive layers, the order of the features reversed between them, each net masked,
16 -> 64 -> 64 -> 32, relative to invflow. The number and the size of the nets are equal; normflows has no activation
after the first map, the scales are bounded in different ways. FrEIA has no such layer. The others' samples take 16
evaluations of each net. invflow's take as many as its solver needs, which the weights decide: these are random.

glow: 3 levels of 8 steps on images of 3x32x32, relative to invflow; see glow_models.py. FrEIA is compared
with the second column, which has fixed rotations in place of learned 1x1 convolutions, as FrEIA does. zuko has none.

All are timed in turn, round after round; the table shows the median over the rounds of each round's ratio to the first
one. Densities and samples are timed without gradients.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import glow_models as glow
import torch
from chains import Contender, exchanged, measure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import invflow
from invflow.bijections import AffineCoupling, Autoregressive, Merge, Permute, SplineCoupling, Split
from invflow.models import StandardNormal
from invflow.nets import MaskedMLP

FEATURES = 16
HALF = FEATURES // 2
BINS = 8
BOUND = 3.0
NUMBERS = 3 * BINS - 1  # that give a spline
HIDDEN = (64, 64)
COUPLINGS = 8
FEEDFORWARD = {"hidden_features": HIDDEN[0], "num_blocks": 1, "use_residual_blocks": False}  # of masked nets
LOG_NORMALIZER = FEATURES / 2 * math.log(2 * math.pi)


def make_net(inputs: int = HALF, outputs: int = FEATURES) -> nn.Sequential:
    """A conditioner; of an affine coupling, half of its outputs are raw log-scales, half are shifts."""
    a, b = HIDDEN
    return nn.Sequential(nn.Linear(inputs, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, outputs))


class Net(nn.Sequential):
    """A conditioner that is called with a context too, which the peers' own MLPs refuse."""

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return super().forward(x)


def called_with_context(inputs: int, outputs: int) -> nn.Module:
    """`make_net`, for the peers that call it so."""
    return Net(*make_net(inputs, outputs))


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

    couplings = [AffineCouplingTransform(mask, called_with_context) for mask in masks(len(nets))]
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


def masks(count: int) -> list[Tensor]:
    """Which numbers are changed, 1, and which are not, in turn."""
    return [(torch.arange(FEATURES) + position) % 2 for position in range(count)]


def spline_ours(nets: list[nn.Module]) -> Contender:
    """Ours."""
    chain = invflow.Sequential(Split(), *(SplineCoupling(net, BINS, BOUND) for net in nets), Merge())
    flow = invflow.Flow(chain, StandardNormal(shape=(FEATURES,)))
    return Contender(flow, flow.log_prob, flow.sample)


def spline_nflows(nets: list[nn.Module]) -> Contender:
    """Nflows."""
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform
    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform as Spline

    options: dict[str, Any] = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    couplings = [Spline(mask, called_with_context, **options) for mask in masks(len(nets))]
    flow = Flow(CompositeTransform(couplings), StandardNormal([FEATURES]))
    return Contender(flow, flow.log_prob, flow.sample)


def spline_normflows(nets: list[nn.Module]) -> Contender:
    """normflows, wrapped as in its CoupledRationalQuadraticSpline, which itself has residual conditioners."""
    import normflows as nf
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling as Spline

    class Coupling(nf.flows.Flow):
        """A coupling whose inverse is the map from data."""

        def __init__(self, spline: nn.Module) -> None:
            super().__init__()
            self.spline = spline

        def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = self.spline.inverse(z)
            return z, log_det.view(-1)

        def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = self.spline(z)
            return z, log_det.view(-1)

    options: dict[str, Any] = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    couplings = [Coupling(Spline(mask, called_with_context, **options)) for mask in masks(len(nets))]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(FEATURES, trainable=False), couplings)
    return Contender(flow, flow.log_prob, lambda count: flow.sample(count)[0])


def spline_zuko(nets: list[nn.Module]) -> Contender:
    """The couplings of zuko with the splines of its NSF, which itself is autoregressive."""
    from zuko.distributions import DiagNormal
    from zuko.flows import Flow, GeneralCouplingTransform, UnconditionalDistribution
    from zuko.transforms import MonotonicRQSTransform

    shapes = [(BINS,), (BINS,), (BINS - 1,)]
    options: dict[str, Any] = {"univariate": MonotonicRQSTransform, "shapes": shapes, "hidden_features": HIDDEN}
    couplings = [GeneralCouplingTransform(FEATURES, mask=mask == 0, **options) for mask in masks(len(nets))]
    base = UnconditionalDistribution(DiagNormal, torch.zeros(FEATURES), torch.ones(FEATURES), buffer=True)
    flow = Flow(couplings, base)
    return Contender(flow, lambda x: flow().log_prob(x), lambda count: flow().sample((count,)))


def maf_ours(nets: list[nn.Module]) -> Contender:
    """Ours."""
    chain: list[invflow.Bijection] = []
    for _ in range(COUPLINGS):
        net = MaskedMLP((FEATURES,), (2 * FEATURES,), hidden=HIDDEN)
        chain += [Autoregressive(net, shape=(FEATURES,), clamp=1.0), Permute("reverse", shape=(FEATURES,))]
    flow = invflow.Flow(invflow.Sequential(*chain), StandardNormal(shape=(FEATURES,)))
    return Contender(flow, flow.log_prob, flow.sample)


def maf_nflows(nets: list[nn.Module]) -> Contender:
    """The layers of nflows with feedforward blocks."""
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, ReversePermutation

    chain: list[nn.Module] = []
    for _ in range(COUPLINGS):
        chain += [MaskedAffineAutoregressiveTransform(FEATURES, **FEEDFORWARD), ReversePermutation(FEATURES)]
    flow = Flow(CompositeTransform(chain), StandardNormal([FEATURES]))
    return Contender(flow, flow.log_prob, flow.sample)


def maf_normflows(nets: list[nn.Module]) -> Contender:
    """The layers of normflows run backwards, because as they are, samples are fast and densities slow."""
    import normflows as nf

    class Inverted(nf.flows.MaskedAffineAutoregressive):
        """A layer whose fast direction is the map from data."""

        forward = nf.flows.MaskedAffineAutoregressive.inverse
        inverse = nf.flows.MaskedAffineAutoregressive.forward

    chain: list[nn.Module] = []
    for _ in range(COUPLINGS):
        reverse = nf.flows.Permute(FEATURES)
        reverse.perm = reverse.inv_perm = torch.arange(FEATURES).flip(0)
        chain += [Inverted(FEATURES, **FEEDFORWARD), reverse]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(FEATURES, trainable=False), chain)
    return Contender(flow, flow.log_prob, lambda count: flow.sample(count)[0])


def maf_zuko(nets: list[nn.Module]) -> Contender:
    """The MAF of zuko."""
    from zuko.flows import MAF

    flow = MAF(FEATURES, transforms=COUPLINGS, hidden_features=HIDDEN)
    return Contender(flow, lambda x: flow().log_prob(x), lambda count: flow().sample((count,)))


Builders = Mapping[str, Callable[[list[nn.Module]], Contender]]


@dataclass(frozen=True)
class Model:
    """What is built in every library.

    Attributes:
        shape: of a sample.
        outputs: of each conditioner that our contenders and some peers are given; none if they make their own.
        own: our contenders, the first of which the others are relative to.
        peers: the other libraries.
        rivals: the contender of ours that does the work of a peer, if that is not "invflow".
    """

    shape: tuple[int, ...]
    outputs: int | None
    own: Builders
    peers: Builders
    rivals: Mapping[str, str]


MODELS = {
    "affine": Model(
        (FEATURES,),
        FEATURES,
        {"hand-written": hand_written, "invflow": ours},
        {"FrEIA": freia, "nflows": nflows, "normflows": normflows, "zuko": zuko},
        {},
    ),
    "spline": Model(
        (FEATURES,),
        HALF * NUMBERS,
        {"invflow": spline_ours},
        {"nflows": spline_nflows, "normflows": spline_normflows, "zuko": spline_zuko},
        {},
    ),
    "maf": Model(
        (FEATURES,),
        None,
        {"invflow": maf_ours},
        {"nflows": maf_nflows, "normflows": maf_normflows, "zuko": maf_zuko},
        {},
    ),
    "glow": Model(
        glow.SHAPE,
        None,
        {"invflow": lambda _: glow.ours(), "invflow, rotations": lambda _: glow.with_rotations()},
        {
            "FrEIA, rotations": lambda _: glow.freia(),
            "nflows": lambda _: glow.nflows(),
            "normflows": lambda _: glow.normflows(),
        },
        {"FrEIA, rotations": "invflow, rotations"},
    ),
}


def contenders(model: Model, with_peers: bool) -> tuple[dict[str, Contender], list[str]]:
    """Name -> density, the reference first; and the peers that are not installed."""
    torch.manual_seed(0)
    outputs = model.outputs
    nets: list[nn.Module] = [] if outputs is None else [make_net(outputs=outputs) for _ in range(COUPLINGS)]
    made, absent = {}, []
    for name, build in {**model.own, **(model.peers if with_peers else {})}.items():
        try:
            made[name] = build(copy.deepcopy(nets))
        except ImportError:
            absent.append(name)
    return made, absent


def check(made: dict[str, Contender]) -> None:
    """Checks that all have the same size, and that those with the weights of the hand-written one compute the same."""
    first = next(iter(made.values())).module
    for name, contender in made.items():
        size, expected = (sum(map(Tensor.numel, module.parameters())) for module in (contender.module, first))
        assert abs(size / expected - 1) < 0.08, f"{name} has {size} weights"
    if "hand-written" not in made:
        return
    hand = made["hand-written"].module
    x = torch.randn(64, FEATURES)
    orders: dict[str, Callable[[Tensor], Tensor]] = {"invflow": lambda state: state, "FrEIA": exchanged}
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


def ratios(made: dict[str, Contender], shape: tuple[int, ...], batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Operation -> contender -> ratio."""
    x = torch.randn(batch, *shape)
    with torch.no_grad():
        densities = measure({name: partial(contender.log_prob, x) for name, contender in made.items()}, rounds)
        samples = measure({name: partial(contender.sample, batch) for name, contender in made.items()}, rounds)
    optimizers = {name: torch.optim.SGD(contender.module.parameters(), lr=1e-6) for name, contender in made.items()}
    steps = {name: partial(step, contender, optimizers[name], x) for name, contender in made.items()}
    return {"log_prob": densities, "sample": samples, "step": measure(steps, rounds)}


def main() -> None:
    """Prints the table, and writes it if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="affine")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256, 4096])
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="other libraries too")
    parser.add_argument("--json", type=Path, help="where to write the ratios")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    model = MODELS[options.model]
    made, absent = contenders(model, options.peers)
    check(made)
    rows: list[dict[str, Any]] = []
    for batch in options.batches:
        found = ratios(made, model.shape, batch, options.rounds)
        rows += [{"batch": batch, "what": what, **cells} for what, cells in found.items()]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=120).print(table)
    for row in rows:
        for peer in made.keys() & model.peers.keys():
            if (ratio := row[model.rivals.get(peer, "invflow")] / row[peer]) > 1:
                print(f"batch {row['batch']}, {row['what']}: {peer} is faster, by {ratio:.3f}")
    for name in absent:
        print(f"{name} is not installed: left out")
    if options.json:
        options.json.write_text(
            json.dumps({"model": options.model, "threads": options.threads, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
