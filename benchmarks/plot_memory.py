"""Draws docs/memory.png from the results of memory.py and train_step.py.

Run: python benchmarks/plot_memory.py memory.json train_step.json docs/memory.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

OURS = {"invflow reversible", "invflow"}


def main(memory: str, steps: str, picture: str) -> None:
    """Memory over depth, next to the time of a step."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    lines = json.loads(Path(memory).read_text())["MiB"]
    for name, figures in lines.items():
        style = {"linewidth": 2.5, "zorder": 3} if name in OURS else {"linewidth": 1.2, "alpha": 0.8}
        left.plot([int(depth) for depth in figures], list(figures.values()), marker="o", label=name, **style)
    left.set_xscale("log", base=2)
    left.set_yscale("log", base=2)
    depths = sorted({int(depth) for figures in lines.values() for depth in figures})
    left.set_xticks(depths, [str(depth) for depth in depths])
    left.yaxis.set_major_formatter("{x:,.0f}")
    left.set_xlabel("couplings")
    left.set_ylabel("peak memory of a train step, MiB")
    left.set_title("32 x 64 x 64, batch 32", fontsize=10)
    left.legend(fontsize=7)
    rows = json.loads(Path(steps).read_text())["rows"]
    names = [name for name in rows[0] if name not in ("batch", "state", "plain") and "/" not in name]
    width = 0.8 / len(names)
    for which, name in enumerate(names):
        places = [position + (which - (len(names) - 1) / 2) * width for position in range(len(rows))]
        edge = {"edgecolor": "black", "linewidth": 1.2} if name in OURS else {}
        right.bar(places, [row[name] for row in rows], width, label=name, **edge)
    right.axhline(1, color="black", linewidth=0.8)
    right.set_xticks(range(len(rows)), [f"{row['state'].replace('x', ' x ')}\nbatch {row['batch']}" for row in rows])
    right.set_ylabel("time of a train step / plain PyTorch's")
    right.set_title("8 couplings", fontsize=10)
    right.legend(fontsize=7, ncols=2)
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
