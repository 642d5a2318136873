"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diagnostics import pictures
from ..diagnostics.interpolation import interpolate
from ..diagnostics.solver_plot import inverse_errors, solver_plot
from ..errors import DataError, InvflowError
from .module import evaluation_draws
from .run import task_of_run
from .run_folder import PICTURES, Run
from .tasks import Evaluation, Task, evaluating

SHOWN = 8


def illustrate(run: Run, data_root: Path | None = None, device: str = "auto") -> tuple[Evaluation, list[str]]:
    """Evaluate a finished run and draw its pictures: return the evaluation and the paths of the pictures.

    Pictures of inversion are drawn only of a model that is invertible.
    """
    task = task_of_run(run, data_root, device)
    chain, data, folder = task.model.bijection, task.data, run.folder / PICTURES
    found, shown = task.evaluate(), data.test.first(SHOWN)
    images = shown.values
    figures = {**task.figures(), "curves": pictures.training_curves(run.metrics)}
    with evaluating(task.model), evaluation_draws(0):
        context = task.model.for_layers(shown.context)
        if data.holds_images:
            if not found.caveat:
                back = task.rounded(chain.inverse(chain(task.centered(images), context), context))
                figures["reconstructions"] = pictures.reconstructions(images, back)
            psi = pictures.first_psi(chain)
            if psi is not None:
                figures["psi"] = pictures.psi_channels(images[:3], psi)
        blocks = inverse_errors(chain, task.inputs(images), context)
        if blocks:
            figures["solver"] = solver_plot(blocks)
    for name, figure in figures.items():
        pictures.write_figure(figure, folder / f"{name}.png")
    written = [str(folder / f"{name}.png") for name in figures]
    if data.holds_images and not found.caveat and _pairs(task, 1):
        written += draw_interpolation(task, pairs=5, steps=9, folder=folder)
    run.update(**found.scores)
    return found, written


def draw_interpolation(task: Task[Any], pairs: int, steps: int, folder: Path) -> list[str]:
    """Interpolate between pairs of test images of different classes; write a strip and a GIF and return their paths.

    Raises:
        DataError: the data set holds points, or no two test images of different classes.
        InvflowError: the model is not invertible.
    """
    frames, ends = walks(task, pairs, steps)
    strip, gif = folder / "interpolation.png", folder / "interpolation.gif"
    pictures.write_figure(pictures.interpolation_strip(frames, ends), strip)
    pictures.write_gif(pictures.interpolation_frames(frames), gif)
    return [str(strip), str(gif)]


def walks(task: Task[Any], pairs: int, steps: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Walks between test images of different classes, straight in feature space, and the classes at their ends.

    The walks are ``(pairs, steps, channels, height, width)``, perhaps out of the range of the data.

    Raises:
        DataError: the data set holds points, or no two test images of different classes.
        InvflowError: the model is not invertible.
    """
    if task.model.caveat:
        raise InvflowError(f"interpolate expects an invertible model, got this: {task.model.caveat}")
    if not task.data.holds_images:
        raise DataError(f"interpolate expects images, the data set holds points of shape {task.data.shape}")
    chosen = _pairs(task, pairs)
    if not chosen:
        count = len(task.data.test)
        raise DataError(f"interpolate expects test images of different classes, got {count} of one class")
    with evaluating(task.model, task.device):
        places = zip(*chosen, strict=True)
        first, last = (task.data.test.take(torch.tensor(ends)).to(task.device) for ends in places)
        contexts = (task.model.for_layers(one.context) for one in (first, last))
        x0, x1 = (task.centered(one.values) for one in (first, last))
        frames = task.rounded(interpolate(task.model.bijection, x0, x1, steps, *contexts).cpu())
    classes = _classes(task).tolist()
    return frames, [(classes[first], classes[last]) for first, last in chosen]


def _classes(task: Task[Any]) -> Tensor:
    """The classes of the test images; without labels, each is one of its own."""
    labels = task.data.test.labels
    return torch.arange(len(task.data.test)) if labels is None else labels


def _pairs(task: Task[Any], count: int) -> list[tuple[int, int]]:
    """The positions of the first ``count`` pairs of images of different classes; fewer if there are not enough."""
    labels = _classes(task).tolist()
    pairs: list[tuple[int, int]] = []
    first = 0
    for last, label in enumerate(labels):
        if len(pairs) < count and label != labels[first]:
            pairs.append((first, last))
            first = last + 1
    return pairs
