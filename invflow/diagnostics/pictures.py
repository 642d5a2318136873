"""Pictures that people look at. Images are ``(batch, channels, height, width)`` in [0, 1], with 1 or 3 channels."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..bijections import Psi
from ..errors import InvflowError
from ..files import write_atomically

CELL = 0.9  # inches a small image takes
GIF_HEIGHT = 140  # pixels an image takes in a GIF
GIF_MILLISECONDS = 120


def samples(images: Tensor, labels: Tensor, predictions: Tensor | None = None, columns: int = 8) -> Figure:
    """Images with their labels; with predictions, "label" or, in red, "label → prediction" where that is wrong."""
    rows = math.ceil(len(images) / columns)
    figure, axes = _grid(rows, columns)
    flat = [axis for row in axes for axis in row]
    for position, axis in enumerate(flat[: len(images)]):
        label = int(labels[position])
        guess = label if predictions is None else int(predictions[position])
        _show(axis, images[position])
        wrong = guess != label
        axis.set_title(f"{label} → {guess}" if wrong else str(label), color="red" if wrong else "black", fontsize=9)
    what = "" if predictions is None else ": label, in red label → prediction where that is wrong"
    figure.suptitle(f"Test images{what}", fontsize=10)
    return figure


def psi_channels(images: Tensor, psi: Psi, most: int = 16) -> Figure:
    """One row an image: the image, then each channel of its psi image, up to ``most`` of them, on one grey scale."""
    split = psi(images)
    shown = min(split.shape[1], most)
    figure, axes = _grid(len(images), shown + 1)
    for row, image, channels in zip(axes, images, split, strict=True):
        _show(row[0], image)
        for position in range(shown):
            _show(row[position + 1], channels[position : position + 1])
    for position, axis in enumerate(axes[0][1:]):
        i, j = divmod(position // images.shape[1], psi.block_size) if psi.layout == "block" else (None, None)
        place = "" if i is None else f"\n(i={i}, j={j})"
        axis.set_title(f"{position}{place}", fontsize=8)
    axes[0][0].set_title("image", fontsize=8)
    left_out = "" if shown == split.shape[1] else f", the first {shown} of {split.shape[1]}"
    sizes = f"{tuple(images.shape[1:])} → {tuple(split.shape[1:])}"
    figure.suptitle(f"psi with block_size {psi.block_size}: {sizes}; its channels{left_out}", fontsize=10)
    return figure


def training_curves(metrics: Sequence[Mapping[str, float]]) -> Figure:
    """Loss and accuracy by epoch; ``metrics`` are rows with ``epoch`` and some of train_loss, test_accuracy, ..."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for stage, colour in (("train", "tab:blue"), ("test", "tab:orange")):
        for axis, what, factor in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
            points = [
                (row["epoch"] + 1, factor * row[f"{stage}_{what}"]) for row in metrics if f"{stage}_{what}" in row
            ]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, label=f"{stage}: {points[-1][1]:.4g} at the end")
    loss.set_yscale("log")
    for axis, name in ((loss, "cross-entropy, nats"), (accuracy, "accuracy, %")):
        axis.set_xlabel("epoch")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    return figure


def reconstructions(originals: Tensor, returned: Tensor) -> Figure:
    """Three rows: originals, what the inverse returned, and |difference| on a scale of its own."""
    figure, axes = _grid(3, len(originals))
    difference = (returned - originals).abs()
    largest = float(difference.max())
    scale = Normalize(0, largest or 1.0)
    for column, (before, after, off) in enumerate(zip(originals, returned, difference, strict=True)):
        _show(axes[0][column], before)
        _show(axes[1][column], after)
        axes[2][column].imshow(off.amax(0).numpy(), cmap="magma", norm=scale)
    for row, name in zip(axes, ("original", "reconstruction", "|difference|"), strict=True):
        row[0].set_ylabel(name, fontsize=9)
    bar = figure.colorbar(ScalarMappable(scale, "magma"), ax=axes[2], shrink=0.8, format="%.0e")
    bar.ax.tick_params(labelsize=7)
    equal = float((returned == originals).float().mean())
    figure.suptitle(
        f"Run backwards: largest difference {largest:.1e}, {equal:.0%} of the pixels bit-equal", fontsize=10
    )
    return figure


def interpolation_strip(frames: Tensor, labels: Sequence[tuple[int, int]]) -> Figure:
    """One row a pair: the walk from one image to the other; ``frames`` is ``(pairs, steps, channels, h, w)``."""
    pairs, steps = frames.shape[:2]
    figure, axes = _grid(pairs, steps)
    for row, walk, (first, last) in zip(axes, frames, labels, strict=True):
        for axis, image in zip(row, walk, strict=True):
            _show(axis, image)
        row[0].set_ylabel(f"{first} → {last}", fontsize=9)
    for position, axis in enumerate(axes[0]):
        axis.set_title(f"t = {position / (steps - 1):.3g}", fontsize=8)
    figure.suptitle("Straight lines in feature space, run backwards", fontsize=10)
    return figure


def interpolation_frames(frames: Tensor) -> list[Image.Image]:
    """The walks side by side, there and back, enlarged so that each pixel shows; for a GIF."""
    there = frames.clamp(0, 1).transpose(0, 1)  # (steps, pairs, channels, height, width)
    factor = max(1, GIF_HEIGHT // there.shape[-2])
    made = []
    for step in there:
        row = (255 * step.expand(-1, 3, -1, -1)).round().byte().permute(2, 0, 3, 1).flatten(1, 2)
        picture = Image.fromarray(row.numpy())
        made.append(picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST))
    return [*made, *made[-2:0:-1]]


def comparison(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy of each seed of each spec; rows have ``name``, ``parameters`` and a list ``test_accuracy``, 0 to 1."""
    figure = Figure(figsize=(2.5 + 1.6 * len(rows), 4), layout="constrained")
    axis = figure.subplots()
    for position, row in enumerate(rows):
        percent = [100 * accuracy for accuracy in row["test_accuracy"]]
        spread = statistics.stdev(percent) if len(percent) > 1 else 0.0
        mean = statistics.mean(percent)
        axis.errorbar(position + 0.15, mean, spread, fmt="s", capsize=5, color=f"C{position}")
        axis.scatter([position] * len(percent), percent, alpha=0.6, color=f"C{position}")
        axis.annotate(f"{mean:.2f}", (position + 0.22, mean), fontsize=9, va="center")
    axis.set_xticks(range(len(rows)), [f"{row['name']}\n{row['parameters']:,} parameters" for row in rows])
    axis.set_xlim(-0.5, len(rows) - 0.2)
    axis.set_ylabel("test accuracy, %")
    axis.grid(axis="y", alpha=0.3)
    axis.set_title("Each seed, and mean ± standard deviation", fontsize=10)
    return figure


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, in one step."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def write_gif(frames: Sequence[Image.Image], path: Path) -> None:
    """Writes an endless GIF, in one step."""
    buffer = io.BytesIO()
    first, *others = frames
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=GIF_MILLISECONDS, loop=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def _grid(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    """A figure with small axes that show nothing but images."""
    figure = Figure(figsize=(max(4.0, CELL * columns + 0.6), CELL * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    return figure, [list(row) for row in axes]


def _show(axis: Axes, image: Tensor) -> None:
    """One image, (channels, height, width), grey or in colour."""
    if image.shape[0] not in (1, 3):
        raise InvflowError(f"a picture expects images of 1 or 3 channels, got {image.shape[0]}")
    axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
