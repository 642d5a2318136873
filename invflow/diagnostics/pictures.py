"""Pictures: image grids, training curves, comparisons, GIFs.

Images are ``(batch, channels, height, width)`` with 1 or 3 channels, of any float dtype, on any device; values outside
[0, 1] are clipped, and pictures of what a model made say how many of them are. Arguments that cannot be drawn raise
InvflowError.
"""

from __future__ import annotations

import io
import math
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from ..bijections import Psi
from ..errors import InvflowError
from ..files import write_atomically
from ..sequential import Sequential
from .figure import Figure, png
from .walks import clipped_pixels, outside

CELL = 0.9  # inches per small image
LETTER = 0.085  # inches per letter of a title, at most
STAGES = {"train": ("tab:blue", "o-"), "val": ("tab:green", "s--"), "test": ("tab:orange", "^-")}  # also in grey
PSI_COLUMNS = 16  # channels side by side; the others go to further rows
NARROWEST = 2.0  # percentage points that the axis of a comparison spans at least: a smaller range would show noise
GIF_HEIGHT = 140  # pixels per image in a GIF
GIF_MILLISECONDS = 120
CAPTION_SIZE, CAPTION_LINE, CAPTION_LETTER = 12, 18, 7  # pixels of a GIF's caption: its font, a line, a letter at most


def samples(images: Tensor, labels: Tensor, predictions: Tensor | None = None, columns: int = 8) -> Figure:
    """Images with their labels; a wrong prediction is shown in red as "label → prediction".

    Args:
        images: ``(batch, channels, height, width)``.
        labels: ``(batch,)``, integers.
        predictions: likewise.
        columns: the largest number of images in a row.
    """
    guesses = labels if predictions is None else predictions
    _require_one_each("labels", len(images), len(labels))
    _require_one_each("predictions", len(images), len(guesses))
    what = "" if predictions is None else ": label, or label → prediction in red if it is wrong"
    figure = gallery(images, f"Test images{what}", columns)
    for axis, label, guess in zip(figure.axes, map(int, labels), map(int, guesses), strict=False):
        wrong = guess != label
        axis.set_title(f"{label} → {guess}" if wrong else str(label), color="red" if wrong else "black", fontsize=9)
    return figure


def gallery(images: Tensor, title: str, columns: int = 8, names: Sequence[str] = ()) -> Figure:
    """Images side by side, without labels.

    Args:
        images: ``(batch, channels, height, width)``.
        title: the title of the figure.
        columns: the largest number of images in a row.
        names: of the rows, to their left.
    """
    images = _images(images)
    columns = min(columns, len(images))
    figure, axes = _grid(math.ceil(len(images) / columns), columns, title, clipped=outside(images))
    _show(axes.flat[: len(images)], images)
    for axis, name in zip(axes[:, 0], names, strict=False):
        axis.set_ylabel(textwrap.fill(name, 12), fontsize=9)
    return figure


def first_psi(chain: Sequential) -> Psi | None:
    """The first psi that runs forward on the whole state, in nested chains too; None if there is none."""
    layers = (step.layer for step in chain.steps() if not (step.backwards or step.path))
    return next((layer for layer in layers if isinstance(layer, Psi)), None)


def psi_channels(images: Tensor, psi: Psi, most: int = 64) -> Figure:
    """Each image and the channels of its psi image, all on a grey scale from 0 to 1.

    The title of a channel is its number and the position (i, j) of its pixels in a block; for colour images also the
    colour channel c.

    Args:
        images: ``(batch, channels, height, width)``; each takes one row, or more if it has over 16 psi channels.
        psi: the layer.
        most: the largest number of psi channels shown.
    """
    images = _images(images)
    split = psi(images)
    shown = min(split.shape[1], most)
    deep = math.ceil(shown / PSI_COLUMNS)
    left_out = "" if shown == split.shape[1] else f", the first {shown} of {split.shape[1]}"
    sizes = f"{tuple(images.shape[1:])} → {tuple(split.shape[1:])}"
    title = f"psi with block_size {psi.block_size}: {sizes}; its channels{left_out}"
    figure, axes = _grid(deep * len(images), 1 + min(shown, PSI_COLUMNS), title)
    of_channels = axes[:, 1:].reshape(len(images), -1)[:, :shown]
    _show(axes[::deep, 0], images)
    _show(of_channels.flat, split[:, :shown].flatten(0, 1)[:, None])
    for channel, axis in enumerate(of_channels[0]):
        axis.set_title(f"{channel}\n{_place(channel, psi, images.shape[1])}", fontsize=8)
    axes[0, 0].set_title("image", fontsize=8)
    return figure


@dataclass(frozen=True)
class Curve:
    """One panel of `training_curves`.

    Attributes:
        name: the quantity drawn, from ``train_<name>``, ``val_<name>`` and ``test_<name>`` in the rows.
        label: the label of the axis, with the unit.
        factor: multiplies the values.
        log_scale: whether the axis is logarithmic.
        final: the format of the last test value, written beside its point; if empty, nothing is written.
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
_IMAGE_DENSITY_CURVES = (Curve("bits_per_dim", "bits per dimension"),)
_DENSITY_CURVES = (Curve("nll", "negative log-likelihood, nats"),)


def curves_of(metrics: Sequence[Mapping[str, float | None]]) -> Sequence[Curve]:
    """The panels for what is in the rows: a classifier's metrics, or those of a density of images or of points."""
    known = {name.partition("_")[2] for row in metrics for name in row}
    if "accuracy" in known:
        return CLASSIFIER_CURVES
    return _IMAGE_DENSITY_CURVES if "bits_per_dim" in known else _DENSITY_CURVES


def training_curves(metrics: Sequence[Mapping[str, float | None]], curves: Sequence[Curve] | None = None) -> Figure:
    """Training, validation and test metrics by epoch.

    Args:
        metrics: rows with ``epoch``, counted from 0, and any of the curves' values, ``train_loss`` for example; values
            that are missing or None are skipped.
        curves: the panels, from left to right; None for those of `curves_of`.
    """
    curves = curves_of(metrics) if curves is None else curves
    figure = Figure(figsize=(4.5 * max(len(curves), 1.4), 3.6), layout="constrained")
    for axis, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        axis.set(xlabel="epoch", ylabel=curve.label, yscale="log" if curve.log_scale else "linear")
        axis.margins(y=0.12)  # room for the number below the lowest point
        for stage, (colour, line) in STAGES.items():
            known = [(row["epoch"], row.get(f"{stage}_{curve.name}")) for row in metrics]
            points = [(epoch + 1, curve.factor * y) for epoch, y in known if epoch is not None and y is not None]
            if not points:
                continue
            last = points[-1][1]
            text = curve.final.format(last) if curve.final else f"{last:.4g}"
            # Markers, because a line of one epoch is invisible.
            axis.plot(*zip(*points, strict=True), line, color=colour, ms=4, label=f"{stage}: {text} at the end")
            if stage != "train" and curve.final:
                axis.annotate(text, points[-1], (0, -14), textcoords="offset points", ha="right", color=colour)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    return figure


def reconstructions(originals: Tensor, reconstructed: Tensor) -> Figure:
    """Three rows: the originals, what the inverse returned, and |difference| on its own scale.

    Args:
        originals: ``(batch, channels, height, width)``.
        reconstructed: of the same shape. If there are several colour channels, the largest difference is drawn.
    """
    originals, reconstructed = _images(originals), _images(reconstructed)
    if originals.shape != reconstructed.shape:
        came = f"{tuple(originals.shape)} and {tuple(reconstructed.shape)}"
        raise InvflowError(f"originals and reconstructions are expected to have the same shape, got {came}")
    difference = (reconstructed - originals).abs()
    largest = float(difference.max())
    # A count: a percentage would round 99.9 % up, which is false.
    equal = f"{int((reconstructed == originals).sum()):,} of {originals.numel():,} elements bit-equal"
    figure, axes = _grid(3, len(originals), f"Run backwards: largest difference {_tick(largest)}, {equal}")
    scale = Normalize(0, largest or 1.0)
    _show(axes[0], originals)
    _show(axes[1], reconstructed)
    for axis, off in zip(axes[2], difference.amax(1), strict=True):
        axis.imshow(off.numpy(), cmap="magma", norm=scale)
    for axis, name in zip(axes[:, 0], ("original", "reconstruction", "|difference|"), strict=True):
        axis.set_ylabel(name, fontsize=9)
    # All axes shrink for the colour bar, so that the columns stay aligned. If the difference is 0, so is the only tick.
    ticks = [0.0, largest / 2, largest] if largest else [0.0]
    mappable = ScalarMappable(scale, "magma")
    bar = figure.colorbar(mappable, ax=axes, shrink=0.3, anchor=(0, 0), ticks=ticks, format=_tick)
    bar.ax.tick_params(labelsize=7)
    return figure


def interpolation_strip(frames: Tensor, labels: Sequence[tuple[int, int]] | None = None) -> Figure:
    """One row per pair: the walk from one image to the other, with the classes of both at its ends.

    The title says how many of the pixels between the ends are clipped.

    Args:
        frames: ``(pairs, steps, channels, height, width)``, as from `interpolate`.
        labels: for each pair, the classes of its first and its last image; None to show none.
    """
    frames = _walks(frames)
    pairs, steps = frames.shape[:2]
    ends = [("", "")] * pairs if labels is None else [(str(first), str(last)) for first, last in labels]
    _require_one_each("pairs of labels", pairs, len(ends))
    clipped = outside(frames[:, 1:-1])
    figure, axes = _grid(pairs, steps, "Straight lines in feature space, run backwards", clipped)
    _show(axes.flat, frames.flatten(0, 1))
    for row, (first, last) in zip(axes, ends, strict=True):
        row[0].set_ylabel(first, rotation=0, ha="right", va="center")
        row[-1].yaxis.set_label_position("right")
        row[-1].set_ylabel(last, rotation=0, ha="left", va="center")
    for position, axis in enumerate(axes[0]):
        axis.set_title(f"t = {position / (steps - 1):.3g}", fontsize=8)
    return figure


def interpolation_frames(frames: Tensor) -> list[Image.Image]:
    """The frames of a GIF: the walks side by side, forth and back, enlarged so that each pixel is visible.

    If pixels between the ends are clipped, a line below says how many.

    Args:
        frames: ``(pairs, steps, channels, height, width)``, as from `interpolate`.

    Returns:
        ``2 * steps - 2`` pictures: in a loop, each end is shown once.

    Examples:
        >>> import torch
        >>> pictures = interpolation_frames(torch.zeros(2, 5, 1, 28, 28))
        >>> len(pictures), pictures[0].size
        (8, (280, 140))
    """
    pixels = (255 * _walks(frames).clamp(0, 1).expand(-1, -1, 3, -1, -1)).round().byte()
    rows = pixels.permute(1, 3, 0, 4, 2).flatten(2, 3)  # (steps, height, pairs * width, 3)
    factor = max(1, GIF_HEIGHT // rows.shape[1])
    enlarged = rows.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    clipped = outside(frames[:, 1:-1])
    text = clipped_pixels(clipped) if clipped else ""
    made = [_captioned(Image.fromarray(picture.numpy()), text) for picture in enlarged]
    return [*made, *made[-2:0:-1]]


def comparison(
    rows: Sequence[Mapping[str, Any]], label: str = "test accuracy, %", *, digits: int = 2, narrowest: float = NARROWEST
) -> Figure:
    """The test score of each seed of each spec, with mean and standard deviation.

    Args:
        rows: for each spec ``name``, ``parameters`` and ``scores``, a list with one entry per seed; an entry that is
            not finite, from a training that diverged, is skipped and counted.
        label: the label of the scores, with their unit.
        digits: how many decimals are shown.
        narrowest: the smallest range of the axis.
    """
    if not rows or not all(row["scores"] for row in rows):
        raise InvflowError("a comparison expects at least one spec, and a score of each; train them first")
    figure = Figure(figsize=(2.5 + 1.6 * len(rows), 4), layout="constrained")
    axis = figure.subplots()
    names = []
    for position, row in enumerate(rows):
        scores = [score for score in row["scores"] if math.isfinite(score)]
        lost = len(row["scores"]) - len(scores)
        name = f"{textwrap.fill(row['name'], 18)}\n{row['parameters']:,} parameters"
        names.append(name + f"\n{lost} diverged" * (lost > 0))
        if not scores:
            continue
        mean, spread = statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else None
        axis.errorbar(position + 0.15, mean, spread, fmt="s", capsize=5, color=f"C{position}")
        axis.scatter([position] * len(scores), scores, alpha=0.6, color=f"C{position}")
        text = f"{mean:.{digits}f}" if spread is None else f"{mean:.{digits}f}\n± {spread:.{digits}f}"
        axis.annotate(text, (position + 0.22, mean), fontsize=9, va="center")
    axis.set_xticks(range(len(rows)), names)
    low, high = axis.get_ylim()
    missing = max(0.0, narrowest - (high - low)) / 2
    axis.set(xlim=(-0.5, len(rows) - 0.2), ylim=(low - missing, high + missing), ylabel=label)
    axis.grid(axis="y", alpha=0.3)
    axis.set_title("Each seed, and mean ± standard deviation", fontsize=10)
    return figure


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png(figure))


def write_gif(frames: Sequence[Image.Image], path: Path) -> None:
    """Writes an endless GIF, atomically."""
    if not frames:
        raise InvflowError(f"{path}: a GIF expects at least one picture, got none")
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=GIF_MILLISECONDS, loop=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def _grid(rows: int, columns: int, title: str, clipped: float = 0.0) -> tuple[Figure, NDArray[Any]]:
    """A titled figure with small axes, ``(rows, columns)``, that show nothing but images, some of it clipped."""
    width = max(4.0, CELL * columns + 0.6)
    said = [title, clipped_pixels(clipped)] if clipped else [title]
    lines = [line for text in said for line in textwrap.wrap(text, int(width / LETTER))]
    figure = Figure(figsize=(width, CELL * rows + 0.5 + 0.2 * len(lines)), layout="compressed")
    figure.suptitle("\n".join(lines), fontsize=10)
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    return figure, figure.subplots(rows, columns, squeeze=False, subplot_kw=bare)


def _show(axes: Iterable[Axes], images: Tensor) -> None:
    """Draws images, grey or in colour, one in each of the axes."""
    for axis, image in zip(axes, images, strict=True):
        axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)


def _captioned(picture: Image.Image, text: str) -> Image.Image:
    """A picture with lines of text below it, black on white; the picture itself if there is no text."""
    if not text:
        return picture
    lines = textwrap.wrap(text, max(1, picture.width // CAPTION_LETTER))
    whole = Image.new("RGB", (picture.width, picture.height + CAPTION_LINE * len(lines) + 4), "white")
    whole.paste(picture)
    ImageDraw.Draw(whole).text((4, picture.height + 2), "\n".join(lines), "black", font_size=CAPTION_SIZE)
    return whole


def _tick(value: float, _: object = None) -> str:
    """A difference as text; matplotlib also passes the position of the tick."""
    return f"{value:.1e}" if value else "0"


def _place(channel: int, psi: Psi, colours: int) -> str:
    """The position in a block from which the pixels of a psi channel come: "(i, j)", with colours "(i, j) c"."""
    side = psi.block_size
    block, colour = divmod(channel, colours) if psi.layout == "block" else divmod(channel, side**2)[::-1]
    i, j = divmod(block, side)
    return f"(i={i}, j={j})" + (f"\nc={colour}" if colours > 1 else "")


def _images(images: Tensor) -> Tensor:
    """The images as matplotlib can draw them. In double, which holds every float and their differences."""
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        expected = "images (batch, channels, height, width) of 1 or 3 channels, at least one"
        raise InvflowError(f"a picture expects {expected}, got shape {tuple(images.shape)}")
    return images.detach().cpu().double()


def _walks(frames: Tensor) -> Tensor:
    """The frames of `interpolate`, converted as by `_images`."""
    if frames.dim() != 5 or frames.shape[1] < 2:
        expected = "frames (pairs, steps, channels, height, width) with at least 2 steps"
        raise InvflowError(f"an interpolation's picture expects {expected}, got shape {tuple(frames.shape)}")
    return _images(frames.flatten(0, 1)).reshape(frames.shape)


def _require_one_each(what: str, count: int, came: int) -> None:
    if came != count:
        raise InvflowError(f"a picture expects as many {what} as it has rows or images: {count}, got {came}")
