"""The cost of the spec language: validating and expanding many layers, and building against construction in Python.

Building and constructing the same modules in Python are timed in turn, in rounds; the result is the median ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import invflow
from invflow.bijections import AdditiveCoupling, Merge, Split
from invflow.nets import Conv

COUPLING = {"type": "additive_coupling", "net": {"type": "conv", "hidden": [16], "kernel_size": 3}}


def document(couplings: list[dict[str, Any]]) -> dict[str, Any]:
    """A spec with these couplings between a split and a merge."""
    layers = [{"type": "split"}, *couplings, {"type": "merge"}]
    return {"spec_version": 1, "input": {"shape": [16, 8, 8]}, "layers": layers}


def by_hand(count: int) -> invflow.Sequential:
    """The chain of such a spec."""
    half = (8, 8, 8)
    couplings = [AdditiveCoupling(Conv(half, half, hidden=[16], kernel_size=3)) for _ in range(count)]
    return invflow.Sequential(Split(), *couplings, Merge())


def seconds(work: Callable[[], object]) -> float:
    """The seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Prints the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    forms = {
        "a repeat": document([{"type": "repeat", "times": 9998, "layers": [COUPLING]}]),
        "written out, equal": document([COUPLING] * 9998),
        "written out, all different": document(
            [{"type": "additive_coupling", "net": {"type": "conv", "hidden": [1 + i]}} for i in range(9998)]
        ),
    }
    for name, spec in forms.items():
        load = statistics.median(seconds(lambda spec=spec: invflow.load_spec(spec)) for _ in range(5))
        print(f"10,000 layers as {name}: {load:.3f} s to parse, expand and validate")
    for name, spec in {
        "a repeat": document([{"type": "repeat", "times": 1000, "layers": [COUPLING]}]),
        "written out": document([COUPLING] * 1000),
    }.items():
        ratios = []
        for turn in range(rounds):
            works = [lambda spec=spec: invflow.build(spec), lambda: by_hand(1000)]
            first, second = (seconds(work) for work in (works if turn % 2 else works[::-1]))
            ratios.append(first / second if turn % 2 else second / first)
        print(f"building 1,000 equal couplings from {name}: {statistics.median(ratios):.2f} of constructing by hand")


if __name__ == "__main__":
    main()
