"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..diagnostics.interpolation import interpolate
from ..diagnostics.pictures import (
    first_psi,
    interpolation_frames,
    interpolation_strip,
    psi_channels,
    reconstructions,
    training_curves,
    write_figure,
    write_gif,
)
from ..diagnostics.solver_plot import inverse_errors, solver_plot
from ..errors import DataError
from ..models import Classifier, Flow
from ..sequential import Sequential
from .data import DataSet, Samples, load_data
from .module import evaluation_draws
from .run import PICTURES, Run
from .tasks import Evaluation, task_of

SHOWN = 8


def illustrate(run: Run, data_root: Path | None = None) -> tuple[Evaluation, list[str]]:
    """Evaluates a finished run and draws its pictures: returns the evaluation and where the pictures are."""
    data = load_data(run.training.data, data_root)
    model = run.load().eval()
    folder = run.folder / PICTURES
    task = task_of(model, data)
    found = task.evaluate()
    figures = {**task.figures(), "curves": training_curves(run.metrics(), task.curves())}
    if data.holds_images:
        figures |= _figures_of_images(model.bijection, data.test.values[:SHOWN])
    with evaluation_draws(0):
        blocks = inverse_errors(model.bijection, task.inputs(data.test.values[:SHOWN]))
    if blocks:
        figures["solver"] = solver_plot(blocks)
    written = []
    for name, figure in figures.items():
        write_figure(figure, folder / f"{name}.png")
        written.append(str(folder / f"{name}.png"))
    if data.holds_images:
        written += draw_interpolation(model, data, pairs=5, steps=9, folder=folder)
    run.update(**found.scores)
    return found, written


@torch.no_grad()
def _figures_of_images(chain: Sequential, images: Tensor) -> dict[str, Figure]:
    figures = {"reconstructions": reconstructions(images, chain.inverse(chain(images)))}
    psi = first_psi(chain)
    if psi is not None:
        figures["psi"] = psi_channels(images[:3], psi)
    return figures


def draw_interpolation(model: Classifier | Flow, data: DataSet, pairs: int, steps: int, folder: Path) -> list[str]:
    """Walks between pairs of test images of different classes; writes a strip and a GIF and returns where.

    Raises:
        DataError: the data set holds points.
    """
    if not data.holds_images:
        raise DataError(f"a walk is drawn between images, the data set holds points of shape {data.shape}")
    first, second = _pairs(data.test, pairs)
    frames = interpolate(model.eval().bijection, data.test.values[first], data.test.values[second], steps)
    labels = list(zip(data.test.labels[first].tolist(), data.test.labels[second].tolist(), strict=True))
    strip, gif = folder / "interpolation.png", folder / "interpolation.gif"
    write_figure(interpolation_strip(frames, labels), strip)
    write_gif(interpolation_frames(frames), gif)
    return [str(strip), str(gif)]


def _pairs(images: Samples, count: int) -> tuple[list[int], list[int]]:
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
