"""How well neural spline flows fit densities of the plane, in several libraries.

The model: autoregressive layers of rational-quadratic splines with 8 bins on [-5, 5], the order of the features
reversed between them, each net masked, 2 -> 64 -> 64 -> outputs with ReLU, and a standard normal prior. That is zuko's
NSF with its default settings. nflows' layers have its residual blocks, at the width that gives them as many weights to
within 0.1 %. All get the same points in the same batches, as many steps, and Adam with the same schedule.

For each data set the table shows the mean log-likelihood of test points in nats, over the seeds of weights and batches,
with its standard deviation, and the likelihood that no model can exceed, if it is known.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import invflow
from invflow.data.plane import Checkerboard, Moons

BINS, BOUND = 8, 5.0
HIDDEN = (64, 64)
WIDTH = 49  # of a residual block that has as many weights
TRANSFORMS = 3
POINTS = 100_000
DATA = {"moons": (Moons(), None), "checkerboard": (Checkerboard(), -math.log(8))}
LogProb = Callable[[Tensor], Tensor]


def ours() -> tuple[nn.Module, LogProb]:
    """Ours."""
    net = {"type": "masked_mlp", "hidden": list(HIDDEN), "zero_last": True}  # starts as the identity
    layers = [
        {"type": "spline_autoregressive", "bins": BINS, "bound": BOUND, "net": net},
        {"type": "permute", "order": "reverse"},
    ]
    flow = invflow.build_model(
        {
            "input": {"shape": [2]},
            "layers": [{"type": "repeat", "times": TRANSFORMS, "layers": layers}],
            "prior": {"type": "standard_normal"},
        }
    )
    return flow, flow.log_prob


def zuko() -> tuple[nn.Module, LogProb]:
    """The NSF of zuko."""
    from zuko.flows import NSF

    flow = NSF(2, bins=BINS, transforms=TRANSFORMS, hidden_features=HIDDEN)
    return flow, lambda x: flow().log_prob(x)


def nflows() -> tuple[nn.Module, LogProb]:
    """The rational-quadratic splines of nflows."""
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, ReversePermutation
    from nflows.transforms import MaskedPiecewiseRationalQuadraticAutoregressiveTransform as Spline

    options: dict[str, Any] = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    options |= {"hidden_features": WIDTH, "num_blocks": 1}
    chain = [part for _ in range(TRANSFORMS) for part in (Spline(2, **options), ReversePermutation(2))]
    flow = Flow(CompositeTransform(chain), StandardNormal([2]))
    return flow, flow.log_prob


LIBRARIES = {"invflow": ours, "zuko": zuko, "nflows": nflows}


def trained(log_prob: LogProb, module: nn.Module, points: Tensor, seed: int, options: argparse.Namespace) -> None:
    """Trains by Adam: the learning rate rises over the first 5 % of the steps, and falls along half a cosine."""
    optimizer = torch.optim.Adam(module.parameters(), lr=options.lr)
    rising = max(1, options.steps // 20)
    generator = torch.Generator().manual_seed(seed)
    for step in range(options.steps):
        done = (step - rising) / (options.steps - rising)
        factor = (step + 1) / rising if step < rising else (1 + math.cos(math.pi * done)) / 2
        optimizer.param_groups[0]["lr"] = options.lr * factor
        optimizer.zero_grad()
        (-log_prob(points[torch.randint(len(points), (options.batch,), generator=generator)]).mean()).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimizer.step()


def main() -> None:
    """Prints the table, and writes it if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=list(DATA), nargs="+", default=list(DATA))
    parser.add_argument("--libraries", choices=list(LIBRARIES), nargs="+", default=list(LIBRARIES))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the likelihoods")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    table = Table("data", "library", "weights", "log-likelihood", "deviation", "of each seed", "seconds", "at most")
    rows: list[dict[str, Any]] = []
    for data in options.data:
        source, most = DATA[data]
        points, test = (source.draw(POINTS, seed)[0] for seed in (0, 1))
        for name in options.libraries:
            found, start = [], time.perf_counter()
            for seed in track(range(options.seeds), f"{data}, {name}", transient=True):
                torch.manual_seed(seed)
                module, log_prob = LIBRARIES[name]()
                trained(log_prob, module, points, seed, options)
                with torch.no_grad():
                    found.append(float(torch.cat([log_prob(part) for part in test.split(5000)]).double().mean()))
            weights = sum(weight.numel() for weight in module.parameters())
            seconds = (time.perf_counter() - start) / options.seeds
            rows.append({"data": data, "library": name, "weights": weights, "found": found})
            deviation = statistics.stdev(found) if len(found) > 1 else math.nan
            each = " ".join(f"{one:.4f}" for one in found)
            cells = (data, name, f"{weights:,}", f"{statistics.mean(found):.4f}", f"{deviation:.4f}", each)
            table.add_row(*cells, f"{seconds:.0f}", "" if most is None else f"{most:.4f}")
    sizes = {row["weights"] for row in rows}
    assert max(sizes) < 1.02 * min(sizes), sizes
    Console(width=120).print(table)
    means = {(row["data"], row["library"]): statistics.mean(row["found"]) for row in rows}
    for (data, name), mean in means.items():
        if (lead := mean - means.get((data, "invflow"), math.inf)) > 0:
            print(f"{data}: {name} is better, by {lead:.4f} nats")
    if options.json:
        recipe = {name: getattr(options, name) for name in ("seeds", "steps", "batch", "lr")}
        options.json.write_text(json.dumps({**recipe, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
