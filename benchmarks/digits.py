"""Whether the samples of a class-conditional flow of digits are what they are meant to be.

A support vector machine that is trained on the pixels of the same training digits, and knows nothing of the flow, reads
samples of each class, rounded to the 17 levels of the data. The table shows how many it reads as the class that was
asked for; its accuracy on the test digits is printed first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sklearn.svm import SVC
from torch import Tensor

import invflow
from invflow.spec.training import Data
from invflow.training.data import load_data

LEVELS = 17
CLASSES = 10


def levels(pixels: Tensor) -> Tensor:
    """The level of each pixel, from 0 to 16, in a vector: that of the cell in which a dequantised pixel lies."""
    return (pixels * (LEVELS - 1)).floor().clamp(0, LEVELS - 1).flatten(1)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run, such as that of specs/glow_digits.json")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    digits = load_data(Data(name="digits"))
    judge = SVC(gamma=0.001, C=10)  # of pixels from 0 to 16
    train, test = (part.first(len(part)) for part in (digits.train, digits.test))
    judge.fit(levels(train.values).numpy(), train.labels.numpy())
    accuracy = judge.score(levels(test.values).numpy(), test.labels.numpy())
    flow = invflow.open_run(options.run).model.eval()
    wanted = torch.arange(CLASSES).repeat(options.count // CLASSES)
    table = Table("temperature", "as intended", *map(str, range(CLASSES)))
    for temperature in options.temperatures:
        torch.manual_seed(options.seed)
        with torch.no_grad():
            samples = flow.sample(options.count // CLASSES, torch.eye(CLASSES), temperature=temperature).flatten(0, 1)
        right = torch.from_numpy(judge.predict(levels(samples).numpy())) == wanted
        shares = [right[wanted == digit].double().mean() for digit in range(CLASSES)]
        table.add_row(f"{temperature:g}", f"{right.double().mean():.1%}", *(f"{share:.0%}" for share in shares))
    print(f"the judge reads {accuracy:.1%} of {len(test.labels)} test digits, {len(wanted)} samples are rounded")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
