"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from ..bijections import Psi
from ..diagnostics.interpolation import interpolate
from ..diagnostics.pictures import (
    interpolation_frames,
    interpolation_strip,
    psi_channels,
    reconstructions,
    samples,
    training_curves,
    write_figure,
    write_gif,
)
from ..models import Classifier
from .data import DataSet, Images, load_data
from .evaluate import Evaluation, evaluate
from .run import PICTURES, Run

SHOWN = 8


def illustrate(run: Run, data_root: Path | None = None) -> tuple[Evaluation, list[str]]:
    """Evaluates a finished run and draws its pictures: returns the evaluation and where the pictures are."""
    data = load_data(run.training.data, data_root)
    model = run.load().eval()
    folder = run.folder / PICTURES
    found = evaluate(model, data)
    pixels, labels = data.test.pixels[: 4 * SHOWN], data.test.labels[: 4 * SHOWN]
    with torch.no_grad():
        guesses = model(pixels).argmax(1)
        few = pixels[:SHOWN]
        back = model.bijection.inverse(model.features(few))
    figures = {
        "samples": samples(pixels, labels, guesses),
        "curves": training_curves(run.metrics()),
        "reconstructions": reconstructions(few, back),
    }
    psi = next((layer for layer in model.bijection if isinstance(layer, Psi)), None)
    if psi is not None:
        figures["psi"] = psi_channels(few[:3], psi)
    written = []
    for name, figure in figures.items():
        write_figure(figure, folder / f"{name}.png")
        written.append(str(folder / f"{name}.png"))
    written += draw_interpolation(model, data, pairs=5, steps=9, folder=folder)
    run.update(test_accuracy=found.test_accuracy)
    return found, written


def draw_interpolation(model: Classifier, data: DataSet, pairs: int, steps: int, folder: Path) -> list[str]:
    """Walks between pairs of test images of different classes; writes a strip and a GIF and returns where."""
    first, second = _pairs(data.test, pairs)
    frames = interpolate(model.eval().bijection, data.test.pixels[first], data.test.pixels[second], steps)
    labels = list(zip(data.test.labels[first].tolist(), data.test.labels[second].tolist(), strict=True))
    strip, gif = folder / "interpolation.png", folder / "interpolation.gif"
    write_figure(interpolation_strip(frames, labels), strip)
    write_gif(interpolation_frames(frames), gif)
    return [str(strip), str(gif)]


def _pairs(images: Images, count: int) -> tuple[list[int], list[int]]:
    """Positions of ``count`` pairs of images, the two of each having different labels."""
    first: list[int] = []
    second: list[int] = []
    position = 0
    while len(first) < count:
        partner = next(i for i in range(position + 1, len(images)) if images.labels[i] != images.labels[position])
        first.append(position)
        second.append(partner)
        position = partner + 1
    return first, second
