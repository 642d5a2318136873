"""Which of some training recipes is best, by cross-validation inside a spec's own training images.

A candidate is a change of the spec's document, as a JSON merge patch (RFC 7396): objects are merged, null removes an
entry, anything else replaces one. All candidates are trained on the same folds with the same seeds, and each repeat
has folds and a seed of its own. The test images of the spec take no part: the fold that a training leaves out is the
test data of that training, and is measured once, at its end.

The standard errors are those of a mean over the images, of which each counts once with the mean of its repeats. They
contain what another choice of images would change; that a training with another seed would end elsewhere shows in them
only as far as it differs from image to image.

Run: python benchmarks/recipes.py specs/irevnet_mnist_augmented.json benchmarks/recipes/irevnet_mnist_augmented.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.model_selection import StratifiedKFold
from torch import nn

import invflow
from invflow.files import write_atomically
from invflow.samples import Batch
from invflow.spec.document import Spec
from invflow.training.data import load_data

OF_SAMPLES = ("name", "train_size", "test_size", "validation_size", "split_seed")
"""The entries of a spec's data that say which samples are used, in place of which the folds are."""


def patched(document: Any, change: Any) -> Any:
    """A document with a JSON merge patch applied."""
    if not isinstance(change, dict):
        return change
    kept = dict(document) if isinstance(document, dict) else {}
    for key, value in change.items():
        if value is None:
            kept.pop(key, None)
        else:
            kept[key] = patched(kept.get(key), value)
    return kept


@dataclass(frozen=True)
class Fold:
    """One division of the training images into those to learn from and those to measure on."""

    repeat: int
    position: int
    learnt: Batch
    left_out: Batch
    places: list[int]  # of the images left out, among all


def folds_of(images: Batch, count: int, repeat: int) -> Iterator[Fold]:
    """The folds of a repeat, each with the classes in the same shares."""
    assert images.labels is not None
    split = StratifiedKFold(count, shuffle=True, random_state=repeat).split(images.values, images.labels)
    for position, (learnt, left_out) in enumerate(split):
        ours, others = (images.rows(torch.from_numpy(part)) for part in (learnt, left_out))
        yield Fold(repeat, position, ours, others, left_out.tolist())


def samples_of(spec: Spec) -> dict[str, Any]:
    """What a spec says about the samples that are used."""
    assert spec.training is not None
    return spec.training.data.model_dump(include=set(OF_SAMPLES))


def epochs_of(spec: Spec) -> int:
    """The length of a spec's training."""
    assert spec.training is not None
    if spec.training.epochs is None:
        raise SystemExit(f"recipes: {spec.name} is trained for a number of steps; give it a number of epochs")
    return spec.training.epochs


def trained_on(spec: Spec, fold: Fold, share: float) -> dict[str, Any]:
    """Train a spec on a fold with a share of its epochs: which of the images left out it reads, and their losses."""
    block = dict(spec.document["training"])
    block["data"] = {name: value for name, value in block["data"].items() if name not in OF_SAMPLES}
    learnt, left_out = ((part.values, part.labels) for part in (fold.learnt, fold.left_out))
    epochs = max(1, round(share * epochs_of(spec)))
    changed: dict[str, Any] = {"epochs": epochs, "evaluate_every": epochs, "seed": fold.repeat}
    with tempfile.TemporaryDirectory() as folder:
        candidate = spec.replace(training=block)
        run = invflow.fit(candidate, learnt, folder, test=left_out, **changed, device="cpu", progress=False)
        model = run.model.eval()
    with torch.no_grad():
        logits = model(fold.left_out.values)
    losses = nn.functional.cross_entropy(logits, fold.left_out.labels, reduction="none")  # type: ignore[arg-type]
    right = (logits.argmax(dim=1) == fold.left_out.labels).int()
    return {"places": fold.places, "right": right.tolist(), "losses": losses.tolist(), "seconds": run.record["seconds"]}


def by_image(found: list[dict[str, Any]], what: str) -> dict[int, float]:
    """The mean of the repeats for each image, by its place."""
    values: dict[int, list[float]] = {}
    for one in found:
        for place, value in zip(one["places"], one[what], strict=True):
            values.setdefault(place, []).append(value)
    return {place: statistics.fmean(each) for place, each in values.items()}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def report(results: dict[str, list[dict[str, Any]]]) -> Table:
    """The table of the candidates, the first of which the others are compared with."""
    table = Table("candidate", "trainings", "accuracy, %", "difference", "loss", "difference", "seconds")
    first = next(iter(results.values()))
    for name, found in results.items():
        row = [name, str(len(found))]
        for what, factor, form in (("right", 100, "+.2f"), ("losses", 1, "+.4f")):
            mine, others = by_image(found, what), by_image(first, what)
            mean, error = mean_and_error([factor * value for value in mine.values()])
            row.append(f"{mean:{form[1:]}} ± {error:{form[1:]}}")
            mean, error = mean_and_error([factor * (value - others[place]) for place, value in mine.items()])
            row.append("" if found is first else f"{mean:{form}} ± {error:{form[1:]}}")
        table.add_row(*row, f"{statistics.median(one['seconds'] for one in found):.0f}")
    return table


def main() -> None:
    """Train what is not yet in the file of results, and print the table after each fold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path)
    parser.add_argument("candidates", type=Path, help="a JSON object: a merge patch of the spec's document by name")
    parser.add_argument("--only", nargs="+", help="names of candidates, the first of which is compared with")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="each with other folds and another seed")
    parser.add_argument("--share", type=float, default=1.0, help="of the epochs, to screen")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="the folder of the results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    spec = invflow.load_spec(given.spec)
    if spec.head is None or spec.training is None:
        parser.error(f"{given.spec} is no classifier with a training block")
    changes = json.loads(given.candidates.read_text())
    unknown = set(given.only or ()) - set(changes)
    if unknown:
        parser.error(f"{given.candidates} has no {', '.join(sorted(unknown))}, only {', '.join(changes)}")
    specs = {name: invflow.load_spec(patched(spec.document, changes[name])) for name in given.only or changes}
    for name, candidate in specs.items():
        if samples_of(candidate) != samples_of(spec):
            parser.error(f"{name}: a candidate has the samples of the spec; leave {', '.join(OF_SAMPLES)} as they are")
    train = load_data(spec.training.data).train
    images = train.first(len(train))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / given.spec.name
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in specs}
    for repeat in range(given.repeats):
        for fold in folds_of(images, given.folds, repeat):
            for name, candidate in specs.items():
                meant = {entry: value for entry, value in candidate.document.items() if entry not in ("name", "note")}
                plan = [meant, given.share, given.folds, repeat, fold.position]
                key = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
                if key not in known:
                    known[key] = {"name": name, **trained_on(candidate, fold, given.share)}
                    write_atomically(path, json.dumps(known).encode())
                results[name].append(known[key])
            Console(width=120).print(f"repeat {repeat}, fold {fold.position}", report(results))


if __name__ == "__main__":
    main()
