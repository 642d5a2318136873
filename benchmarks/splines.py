"""How accurate the inverses of splines are, in several libraries, for splines with random logits.

The splines have 8 bins on [-3, 3], their logits are normal numbers times a scale. For a number x of the interval and
y = f(x) the table shows the largest |f(f^-1(y)) - y| and |f^-1(y) - x| f'(x), in units of eps times the bound, and how
many results are no number. nflows and normflows share their code; zuko clips the logits in a softer way, so that its
slopes are not as small.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from invflow.bijections.rational_quadratic import RationalQuadratic

BINS, BOUND, LEAST = 8, 3.0, 1e-3
Map: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]


def ours(logits: Tensor) -> tuple[Map, Map]:
    """The map with log f', and its inverse likewise, of each row of logits."""
    spline, made = RationalQuadratic(BINS, BOUND, LEAST, LEAST), logits.T
    return lambda x: spline.apply(x, made), lambda y: spline.undo(y, made)


def nflows(logits: Tensor) -> tuple[Map, Map]:
    """Likewise; it writes into what it is given."""
    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline as spline

    def call(x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        parts = logits.clone().split([BINS, BINS, BINS - 1], dim=1)
        y, log_slope = spline(x, *parts, inverse=inverse, tail_bound=BOUND)
        return y, -log_slope if inverse else log_slope

    return lambda x: call(x, False), lambda y: call(y, True)


def zuko(logits: Tensor) -> tuple[Map, Map]:
    """Likewise."""
    from zuko.transforms import MonotonicRQSTransform

    spline = MonotonicRQSTransform(*logits.split([BINS, BINS, BINS - 1], dim=1), bound=BOUND, slope=LEAST)

    def undo(y: Tensor) -> tuple[Tensor, Tensor]:
        x = spline.inv(y)
        return x, spline.call_and_ladj(x)[1]

    return spline.call_and_ladj, undo


def measure(maps: tuple[Map, Map], x: Tensor) -> list[str]:
    """The two errors, and how many results are no number."""
    forward, inverse = maps
    y, log_slope = forward(x)
    try:
        back, log_slope_there = inverse(y)
    except AssertionError:
        return ["AssertionError", "", ""]
    again, _ = forward(back)
    unit = torch.finfo(x.dtype).eps * BOUND
    errors = ((again - y).abs(), (back - x).abs() * log_slope.exp())
    lost = sum(int((~found.isfinite()).sum()) for found in (y, log_slope, back, log_slope_there))
    return [*(f"{float(error.nan_to_num(nan=0.0).max()) / unit:,.1f}" for error in errors), str(lost)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 5, 10, 100])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    table = Table("dtype", "scale", "library", "|f(f^-1(y)) - y|", "|dx| f'(x)", "NaN")
    for dtype in (torch.float32, torch.float64):
        for scale in options.scales:
            generator = torch.Generator().manual_seed(options.seed)
            shape = (options.count, 3 * BINS - 1)
            logits = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            x = BOUND * (2 * torch.rand(options.count, generator=generator, dtype=torch.float64) - 1).to(dtype)
            for name, make in {"invflow": ours, "nflows": nflows, "zuko": zuko}.items():
                table.add_row(str(dtype).removeprefix("torch."), f"{scale:g}", name, *measure(make(logits), x))
    Console(width=120).print(table)


if __name__ == "__main__":
    with torch.no_grad():
        main()
