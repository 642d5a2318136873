"""Pictures that people look at.

Images are ``(batch, channels, height, width)`` with 1 or 3 channels, any float dtype and device; values outside [0, 1]
are drawn as the nearer end. An argument that a picture cannot be made of raises InvflowError.
"""

from __future__ import annotations

import io
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from ..bijections import Psi
from ..errors import InvflowError
from ..files import write_atomically
from ..sequential import Sequential

CELL = 0.9  # inches a small image takes
LETTER = 0.085  # inches a letter of a title takes, at most
PSI_COLUMNS = 16  # channels side by side; more go to further rows
NARROWEST = 2.0  # percentage points that a comparison shows at least: a closer look would show noise
GIF_HEIGHT = 140  # pixels an image takes in a GIF
GIF_MILLISECONDS = 120


def samples(images: Tensor, labels: Tensor, predictions: Tensor | None = None, columns: int = 8) -> Figure:
    """Images with their labels; with predictions, "label" or, in red, "label → prediction" where that is wrong.

    Args:
        images: ``(batch, channels, height, width)``.
        labels: ``(batch,)``, integers.
        predictions: likewise.
        columns: how many images a row has at most.
    """
    images = _images(images)
    guesses = labels if predictions is None else predictions
    _require_one_each("labels", len(images), len(labels))
    _require_one_each("predictions", len(images), len(guesses))
    columns = min(columns, len(images))
    what = "" if predictions is None else ": label, in red label → prediction where that is wrong"
    figure, axes = _grid(math.ceil(len(images) / columns), columns, f"Test images{what}")
    flat = [axis for row in axes for axis in row][: len(images)]
    for axis, image, label, guess in zip(flat, images, map(int, labels), map(int, guesses), strict=True):
        _show(axis, image)
        wrong = guess != label
        axis.set_title(f"{label} → {guess}" if wrong else str(label), color="red" if wrong else "black", fontsize=9)
    return figure


def gallery(images: Tensor, title: str, columns: int = 8) -> Figure:
    """Images beside one another, without labels.

    Args:
        images: ``(batch, channels, height, width)``.
        title: what they are.
        columns: how many images a row has at most.
    """
    images = _images(images)
    columns = min(columns, len(images))
    figure, axes = _grid(math.ceil(len(images) / columns), columns, title)
    for axis, image in zip([axis for row in axes for axis in row], images, strict=False):
        _show(axis, image)
    return figure


def first_psi(chain: Sequential) -> Psi | None:
    """The first psi of a chain that runs forwards, on the whole state, wherever it stands; None if there is none."""
    layers = (step.layer for step in chain.steps() if not (step.backwards or step.path))
    return next((layer for layer in layers if isinstance(layer, Psi)), None)


def psi_channels(images: Tensor, psi: Psi, most: int = 64) -> Figure:
    """Each image and the channels of its psi image, all on the grey scale from 0 to 1.

    A channel is titled with its number and with the place (i, j) in a block that its pixels come from; where the
    images have colours, also with the colour channel c.

    Args:
        images: ``(batch, channels, height, width)``; each takes a row, or more where it has over 16 psi channels.
        psi: the layer.
        most: how many psi channels are shown at most.
    """
    images = _images(images)
    split = psi(images)
    shown = min(split.shape[1], most)
    deep = math.ceil(shown / PSI_COLUMNS)
    left_out = "" if shown == split.shape[1] else f", the first {shown} of {split.shape[1]}"
    sizes = f"{tuple(images.shape[1:])} → {tuple(split.shape[1:])}"
    title = f"psi with block_size {psi.block_size}: {sizes}; its channels{left_out}"
    figure, axes = _grid(deep * len(images), 1 + min(shown, PSI_COLUMNS), title)
    for number, (image, channels) in enumerate(zip(images, split, strict=True)):
        rows = axes[deep * number : deep * (number + 1)]
        _show(rows[0][0], image)
        for channel in range(shown):
            axis = rows[channel // PSI_COLUMNS][1 + channel % PSI_COLUMNS]
            _show(axis, channels[channel : channel + 1])
            if number == 0:
                axis.set_title(f"{channel}\n{_place(channel, psi, images.shape[1])}", fontsize=8)
    axes[0][0].set_title("image", fontsize=8)
    return figure


@dataclass(frozen=True)
class Curve:
    """One panel of `training_curves`.

    Attributes:
        name: what is drawn: the rows' ``train_<name>`` and ``test_<name>``.
        label: what the axis is called, with its unit.
        factor: what the values are multiplied by.
        log_scale: whether the axis is logarithmic.
        final: how the last test value is written beside its point; not at all where empty.
    """

    name: str
    label: str
    factor: float = 1.0
    log_scale: bool = False
    final: str = ""


CLASSIFIER_CURVES = (
    Curve("loss", "cross-entropy, nats", log_scale=True),
    Curve("accuracy", "accuracy, %", factor=100, final="{:.2f} %"),
)


def training_curves(
    metrics: Sequence[Mapping[str, float | None]], curves: Sequence[Curve] = CLASSIFIER_CURVES
) -> Figure:
    """What was measured on the training and the test samples, by epoch.

    Args:
        metrics: rows with ``epoch``, counted from 0, and any of the curves' values, ``train_loss`` for example; what a
            row lacks, or has as None, is left out.
        curves: the panels, from left to right.
    """
    figure = Figure(figsize=(4.5 * max(len(curves), 1.4), 3.6), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, len(curves), squeeze=False)[0])
    for axis, curve in zip(axes, curves, strict=True):
        if curve.log_scale:
            axis.set_yscale("log")
        axis.margins(y=0.12)  # room for the number below the lowest point
        for stage, colour in (("train", "tab:blue"), ("test", "tab:orange")):
            known = [(row["epoch"], row.get(f"{stage}_{curve.name}")) for row in metrics]
            points = [(epoch + 1, curve.factor * y) for epoch, y in known if epoch is not None and y is not None]
            if not points:
                continue
            last = points[-1][1]
            # Markers, because a line of one epoch is invisible.
            axis.plot(*zip(*points, strict=True), ".-", color=colour, label=f"{stage}: {last:.4g} at the end")
            if stage == "test" and curve.final:
                place: dict[str, Any] = {"xytext": (0, -14), "textcoords": "offset points", "ha": "right"}
                axis.annotate(curve.final.format(last), points[-1], color=colour, **place)
        axis.set_xlabel("epoch")
        axis.set_ylabel(curve.label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    return figure


def reconstructions(originals: Tensor, reconstructed: Tensor) -> Figure:
    """Three rows: originals, what the inverse returned, and |difference| on a scale of its own.

    Args:
        originals: ``(batch, channels, height, width)``.
        reconstructed: of the same shape. Of several colour channels, the largest difference is drawn.
    """
    originals, reconstructed = _images(originals), _images(reconstructed)
    if originals.shape != reconstructed.shape:
        came = f"{tuple(originals.shape)} and {tuple(reconstructed.shape)}"
        raise InvflowError(f"originals and reconstructions are expected to have the same shape, got {came}")
    difference = (reconstructed - originals).abs()
    largest = float(difference.max())
    # A count, because a percentage would round 99.9 % up to a claim that is false.
    equal = f"{int((reconstructed == originals).sum()):,} of {originals.numel():,} elements bit-equal"
    figure, axes = _grid(3, len(originals), f"Run backwards: largest difference {largest:.1e}, {equal}")
    scale = Normalize(0, largest or 1.0)
    for column, (before, after, off) in enumerate(zip(originals, reconstructed, difference, strict=True)):
        _show(axes[0][column], before)
        _show(axes[1][column], after)
        axes[2][column].imshow(off.amax(0).numpy(), cmap="magma", norm=scale)
    for row, name in zip(axes, ("original", "reconstruction", "|difference|"), strict=True):
        row[0].set_ylabel(name, fontsize=9)
    # All axes give way to the bar, so that the columns stay aligned. A difference of zero has no scale, only its zero.
    ticks = [0.0, largest / 2, largest] if largest else [0.0]
    everything = [axis for row in axes for axis in row]
    bar = figure.colorbar(
        ScalarMappable(scale, "magma"), ax=everything, shrink=0.3, anchor=(0, 0), ticks=ticks, format="{x:.1e}"
    )
    bar.ax.tick_params(labelsize=7)
    return figure


def interpolation_strip(frames: Tensor, labels: Sequence[tuple[int, int]]) -> Figure:
    """One row a pair: the walk from one image to the other, the classes of both at its ends.

    Args:
        frames: ``(pairs, steps, channels, height, width)``, as from `interpolate`.
        labels: of each pair, the classes of its first and its last image.
    """
    frames = _walks(frames)
    pairs, steps = frames.shape[:2]
    _require_one_each("pairs of labels", pairs, len(labels))
    figure, axes = _grid(pairs, steps, "Straight lines in feature space, run backwards")
    for row, walk, (first, last) in zip(axes, frames, labels, strict=True):
        for axis, image in zip(row, walk, strict=True):
            _show(axis, image)
        row[0].set_ylabel(str(first), rotation=0, ha="right", va="center")
        row[-1].yaxis.set_label_position("right")
        row[-1].set_ylabel(str(last), rotation=0, ha="left", va="center")
    for position, axis in enumerate(axes[0]):
        axis.set_title(f"t = {position / (steps - 1):.3g}", fontsize=8)
    return figure


def interpolation_frames(frames: Tensor) -> list[Image.Image]:
    """The walks side by side, there and back, enlarged so that each pixel shows; for a GIF.

    Args:
        frames: ``(pairs, steps, channels, height, width)``, as from `interpolate`.

    Returns:
        ``2 * steps - 2`` pictures: played in a loop, each end shows once.

    Examples:
        >>> import torch
        >>> pictures = interpolation_frames(torch.zeros(2, 5, 1, 28, 28))
        >>> len(pictures), pictures[0].size
        (8, (280, 140))
    """
    there = _walks(frames).clamp(0, 1).transpose(0, 1)  # (steps, pairs, channels, height, width)
    factor = max(1, GIF_HEIGHT // there.shape[-2])
    made = []
    for step in there:
        row = (255 * step.expand(-1, 3, -1, -1)).round().byte().permute(2, 0, 3, 1).flatten(1, 2)
        picture = Image.fromarray(row.numpy())
        made.append(picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST))
    return [*made, *made[-2:0:-1]]


def comparison(
    rows: Sequence[Mapping[str, Any]], label: str = "test accuracy, %", *, digits: int = 2, narrowest: float = NARROWEST
) -> Figure:
    """A test score of each seed of each spec, with mean and standard deviation.

    Args:
        rows: of each spec ``name``, ``parameters`` and ``scores``, a list with an entry a seed; an entry that is not
            finite, of a training that diverged, is left out and counted.
        label: what the scores are, with their unit.
        digits: how many are shown after the point.
        narrowest: the range that the axis shows at least.
    """
    if not rows or not all(row["scores"] for row in rows):
        raise InvflowError("a comparison expects at least one spec, and a score of each; train them first")
    figure = Figure(figsize=(2.5 + 1.6 * len(rows), 4), layout="constrained")
    axis = figure.subplots()
    names = []
    for position, row in enumerate(rows):
        scores = [score for score in row["scores"] if math.isfinite(score)]
        lost = len(row["scores"]) - len(scores)
        names.append(
            f"{textwrap.fill(row['name'], 18)}\n{row['parameters']:,} parameters" + f"\n{lost} diverged" * (lost > 0)
        )
        if not scores:
            continue
        spread = statistics.stdev(scores) if len(scores) > 1 else None
        mean = statistics.mean(scores)
        axis.errorbar(position + 0.15, mean, spread, fmt="s", capsize=5, color=f"C{position}")
        axis.scatter([position] * len(scores), scores, alpha=0.6, color=f"C{position}")
        text = f"{mean:.{digits}f}" if spread is None else f"{mean:.{digits}f}\n± {spread:.{digits}f}"
        axis.annotate(text, (position + 0.22, mean), fontsize=9, va="center")
    axis.set_xticks(range(len(rows)), names)
    axis.set_xlim(-0.5, len(rows) - 0.2)
    low, high = axis.get_ylim()
    missing = max(0.0, narrowest - (high - low)) / 2
    axis.set_ylim(low - missing, high + missing)
    axis.set_ylabel(label)
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
    if not frames:
        raise InvflowError(f"{path}: a GIF expects at least one picture, got none")
    buffer = io.BytesIO()
    first, *others = frames
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=GIF_MILLISECONDS, loop=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def _grid(rows: int, columns: int, title: str) -> tuple[Figure, list[list[Axes]]]:
    """A titled figure with small axes that show nothing but images."""
    width = max(4.0, CELL * columns + 0.6)
    lines = textwrap.wrap(title, int(width / LETTER))
    figure = Figure(figsize=(width, CELL * rows + 0.5 + 0.2 * len(lines)), layout="compressed")
    figure.suptitle("\n".join(lines), fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    return figure, [list(row) for row in axes]


def _show(axis: Axes, image: Tensor) -> None:
    """One image, (channels, height, width), grey or in colour."""
    axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)


def _place(channel: int, psi: Psi, colours: int) -> str:
    """Where the pixels of a psi channel come from: "(i, j)", with colours "(i, j) c"."""
    if psi.layout == "block":
        block, colour = divmod(channel, colours)
    else:
        colour, block = divmod(channel, psi.block_size**2)
    i, j = divmod(block, psi.block_size)
    return f"(i={i}, j={j})" + (f"\nc={colour}" if colours > 1 else "")


def _images(images: Tensor) -> Tensor:
    """The images as matplotlib can draw them. In double, which holds every float and their differences."""
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        expected = "images (batch, channels, height, width) of 1 or 3 channels, at least one"
        raise InvflowError(f"a picture expects {expected}, got shape {tuple(images.shape)}")
    return images.detach().cpu().double()


def _walks(frames: Tensor) -> Tensor:
    """The frames of `interpolate`, as `_images` makes them."""
    if frames.dim() != 5 or frames.shape[1] < 2:
        expected = "frames (pairs, steps, channels, height, width) with at least 2 steps"
        raise InvflowError(f"an interpolation's picture expects {expected}, got shape {tuple(frames.shape)}")
    return _images(frames.flatten(0, 1)).reshape(frames.shape)


def _require_one_each(what: str, count: int, came: int) -> None:
    if came != count:
        raise InvflowError(f"a picture expects as many {what} as it has rows or images: {count}, got {came}")
