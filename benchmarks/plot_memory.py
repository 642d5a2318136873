"""Draws docs/memory.png from the results of memory.py and train_step.py.

Run: python benchmarks/plot_memory.py memory.json train_step.json docs/memory.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

PLAIN = "plain PyTorch"
OURS = "invflow, reversible"
NAMES = {
    "plain": PLAIN,
    "invflow": OURS,
    "invflow reversible": OURS,
    "invflow stored": "invflow, stored",
    "invflow checkpoint": "invflow, checkpoint",
    "invflow, no monitor": "invflow, reversible, no monitor",
}
"""Of rows of the two benchmarks, which name them differently; the others keep their own."""
STYLES = {
    PLAIN: ("black", "x"),
    OURS: ("tab:red", "o"),
    "invflow, reversible, no monitor": ("tab:pink", "o"),
    "invflow, stored": ("tab:blue", "s"),
    "invflow, checkpoint": ("tab:green", "D"),
    "FrEIA": ("tab:purple", "^"),
    "MemCNN": ("tab:brown", "v"),
    "revtorch": ("tab:orange", "P"),
    "RevLib": ("tab:gray", "*"),
}
"""The colour of each in both panels, and its marker."""


def main(memory: str, steps: str, picture: str) -> None:
    """Memory over depth, next to the time of a step."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    lines = json.loads(Path(memory).read_text())["MiB"]
    for key, figures in lines.items():
        name = NAMES.get(key, key)
        colour, marker = STYLES[name]
        style = {"linewidth": 2.5, "zorder": 3} if name == OURS else {"linewidth": 1.2, "alpha": 0.8}
        couplings, sizes = [int(depth) for depth in figures], list(figures.values())
        left.plot(couplings, sizes, color=colour, marker=marker, label=name, **style)
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
    for which, key in enumerate(names):
        name = NAMES.get(key, key)
        places = [position + (which - (len(names) - 1) / 2) * width for position in range(len(rows))]
        edge = {"edgecolor": "black", "linewidth": 1.2} if name == OURS else {}
        right.bar(places, [row[key] for row in rows], width, label=name, color=STYLES[name][0], **edge)
    right.axhline(1, color=STYLES[PLAIN][0], linewidth=0.8, label=PLAIN)
    right.set_xticks(range(len(rows)), [f"{row['state'].replace('x', ' x ')}\nbatch {row['batch']}" for row in rows])
    right.set_ylabel("time of a train step / plain PyTorch's")
    right.set_title("8 couplings", fontsize=10)
    right.legend(fontsize=7, ncols=2)
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
