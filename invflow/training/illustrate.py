"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diagnostics import pictures
from ..diagnostics.solver_plot import inverse_errors, solver_plot
from ..diagnostics.walks import outside
from ..errors import DataError
from .module import evaluation_draws
from .run import task_of_run
from .run_folder import PICTURES, Run
from .tasks import Evaluation, Task, evaluating
from .walking import require_walks, walk

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
    if data.holds_images and not found.caveat and first_pairs(task, 1):
        written += draw_interpolation(task, pairs=5, steps=9, folder=folder)[0]
    run.update(**found.scores)
    return found, written


def draw_interpolation(task: Task[Any], pairs: int, steps: int, folder: Path) -> tuple[list[str], float]:
    """Interpolate between pairs of test images of different classes; write a strip and a GIF.

    Returns:
        The paths of the strip and the GIF, and the fraction of the pixels between the ends that they show clipped.

    Raises:
        DataError: the data set holds points, or no two test images of different classes.
        InvflowError: the model is not invertible.
    """
    frames, ends = walks(task, pairs, steps)
    strip, gif = folder / "interpolation.png", folder / "interpolation.gif"
    pictures.write_figure(pictures.interpolation_strip(frames, ends), strip)
    pictures.write_gif(pictures.interpolation_frames(frames), gif)
    return [str(strip), str(gif)], outside(frames[:, 1:-1])


def walks(task: Task[Any], pairs: int, steps: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Walks between test images of different classes, straight in feature space, and the classes at their ends.

    The walks are ``(pairs, steps, channels, height, width)``, perhaps out of the range of the data.

    Raises:
        DataError: the data set holds points, or no two test images of different classes.
        InvflowError: the model is not invertible.
    """
    require_walks(task)
    chosen = torch.tensor(first_pairs(task, pairs))
    if not len(chosen):
        count = len(task.data.test)
        raise DataError(f"interpolate expects test images of different classes, got {count} of one class")
    return walk(task, chosen, steps), [(first, last) for first, last in _classes(task)[chosen].tolist()]


def _classes(task: Task[Any]) -> Tensor:
    """The classes of the test images; without labels, each is one of its own."""
    labels = task.data.test.labels
    return torch.arange(len(task.data.test)) if labels is None else labels


def first_pairs(task: Task[Any], count: int) -> list[tuple[int, int]]:
    """The positions of the first ``count`` pairs of images of different classes; fewer if there are not enough."""
    labels = _classes(task).tolist()
    pairs: list[tuple[int, int]] = []
    first = 0
    for last, label in enumerate(labels):
        if len(pairs) < count and label != labels[first]:
            pairs.append((first, last))
            first = last + 1
    return pairs
