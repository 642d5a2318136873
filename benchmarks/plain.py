"""A reversible vision transformer trained by invflow, and the same network written and trained in plain PyTorch.

Both are trained on the 8x8 digits by the recipe of https://arxiv.org/abs/2302.04869 in small, which is AdamW, a warm-up
and a cosine; ours from its document, in constant memory. Each has its own random numbers. The table shows the accuracy
on the test digits for several seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import invflow
from invflow.training.data import load_data

WIDTH, DEPTH, HEADS, PATCH, CLASSES = 32, 4, 4, 2, 10
EPOCHS, BATCH, RATE, DECAY, WARMUP = 20, 64, 2e-3, 0.05, 0.1

DOCUMENT = {
    "spec_version": 2,
    "input": {"shape": [1, 8, 8]},
    "backprop": "reversible",
    "stem": {
        "type": "stack",
        "parts": [
            {"type": "psi", "block_size": PATCH, "layout": "channel"},
            {"type": "linear", "channels": WIDTH},
            {"type": "positions"},
        ],
    },
    "layers": [
        {"type": "duplicate"},
        {
            "type": "repeat",
            "times": DEPTH,
            "layers": [
                {
                    "type": "additive_coupling",
                    "net": {"type": "stack", "parts": [{"type": "layer_norm"}, {"type": "attention", "heads": HEADS}]},
                },
                {
                    "type": "additive_coupling",
                    "net": {"type": "stack", "parts": [{"type": "layer_norm"}, {"type": "token_mlp"}]},
                },
            ],
        },
        {"type": "exchange", "order": [1, 0]},
        {"type": "merge"},
    ],
    "head": {
        "type": "stack",
        "classes": CLASSES,
        "parts": [{"type": "mean"}, {"type": "layer_norm"}, {"type": "linear"}],
    },
    "training": {
        "data": {"name": "digits"},
        "batch_size": BATCH,
        "epochs": EPOCHS,
        "optimizer": {"type": "adamw", "lr": RATE, "weight_decay": DECAY},
        "warmup": WARMUP,
        "schedule": {"type": "cosine"},
        "evaluate_every": EPOCHS,
    },
}


class Attention(nn.Module):
    """Self-attention of normalised tokens, ``(batch, tokens, WIDTH)``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.in_map = nn.Linear(WIDTH, 3 * WIDTH)
        self.out_map = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        parts = self.in_map(self.norm(x)).reshape(batch, tokens, 3, HEADS, WIDTH // HEADS)
        mixed = functional.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4))
        return self.out_map(mixed.transpose(1, 2).reshape(x.shape))


class Plain(nn.Module):
    """The network of `DOCUMENT`."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn((8 // PATCH) ** 2, WIDTH))
        self.attention = nn.ModuleList(Attention() for _ in range(DEPTH))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(DEPTH)
        )
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        a = b = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            a = a + attention(b)
            b = b + mlp(a)
        return self.head(self.norm(torch.cat([a, b], dim=-1).mean(1)))


def train_plain(seed: int) -> tuple[float, int]:
    """The accuracy on the test digits, and the number of parameters."""
    data = load_data(invflow.load_spec(DOCUMENT).training.data)
    train, test = data.train.all(), data.test.all()
    torch.manual_seed(seed)
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    steps = EPOCHS * -(-len(train.values) // BATCH)
    warm = int(WARMUP * steps)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warm),
        ],
        [warm],
    )
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train.values)).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(model(train.values[rows]), train.labels[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = (model.eval()(test.values).argmax(1) == test.labels).float().mean()
    return float(right), sum(weight.numel() for weight in model.parameters())


def train_ours(seed: int) -> tuple[float, int]:
    """Likewise for the document."""
    document = {**DOCUMENT, "training": {**DOCUMENT["training"], "seed": seed}}
    with tempfile.TemporaryDirectory() as folder:
        found = invflow.evaluate(invflow.train(document, Path(folder) / "run", device="cpu", progress=False))
    return found.test_accuracy, found.parameters


def main() -> None:
    """Prints the accuracies, and writes them if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("", "parameters", "test accuracy, mean", "standard deviation", "each")
    figures = {}
    for name, train in (("plain PyTorch", train_plain), ("invflow, reversible", train_ours)):
        results = []
        for seed in range(options.seeds):
            results.append(train(seed))
            print(name, *results[-1], file=sys.stderr)
        accuracies, parameters = zip(*results, strict=True)
        figures[name] = accuracies
        each = " ".join(f"{accuracy:.2%}" for accuracy in accuracies)
        mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
        table.add_row(name, f"{parameters[0]:,}", f"{mean:.2%}", f"{spread:.2%}", each)
    Console(width=160).print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
