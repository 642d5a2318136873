"""Pictures of models of points in the plane: densities and the decisions of classifiers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.image import AxesImage
from torch import Tensor, nn

from ..context import Context, entries, rows_of, spread
from ..errors import InvflowError
from ..models import Flow
from ..state import require_state, sample
from .figure import Figure

SIDE = 200  # points of the grid along each axis
MARGIN = 0.15  # how far the picture extends beyond the points, as a fraction of their extent
DEPTH = 8.0  # nats below its maximum at which the colours of a log-density end
MARKERS = "o+^xsv1D2*"  # of classes, which a print in grey tells apart by them
LONGEST = 30  # letters of a line beside a panel
CELL = 4.0  # inches per panel
_MOST_ROWS = 16  # of a context that is not discrete: each costs an evaluation of the whole region


@torch.no_grad()
def density(
    flow: Flow,
    points: Tensor,
    drawn: Tensor,
    context: Context = None,
    parts: Sequence[tuple[str, Tensor, Tensor, Tensor]] = (),
    *,
    points_are: str = "test points",
) -> Figure:
    """Points of the data, samples of the flow, and its log-density in nats, on the same region of the plane.

    Args:
        flow: a density of points (2,), evaluated in its current mode.
        points: ``(n, 2)``.
        drawn: ``(m, 2)``; a title counts the samples outside the region.
        context: of the points, ``(n, ...)``; the density is the mean over its rows, or over some of them.
        parts: of these points and samples, such as classes, each in a row of its own: the name, points, samples, and
            the context.
        points_are: what a title calls the points.
    """
    low, high = window(points)
    figure, axes = _panels(3, low, high, 1 + len(parts))
    rows: list[tuple[str, Tensor, Tensor, Context]] = [("", points, drawn, context), *parts]
    maps = [log_density(flow, grid(low, high), row[-1]) for row in rows]
    top = max(float(one.nan_to_num(nan=-math.inf).max()) for one in maps)
    norm = Normalize(top - DEPTH, top) if math.isfinite(top) else None  # the same for all rows, which are compared
    for (name, some, of_flow, _), log_prob, (data, samples, map_) in zip(rows, maps, axes, strict=True):
        outside = int(((of_flow < low) | (of_flow > high)).any(1).sum())
        of_points = f"{len(some):,} {points_are}"
        of_samples = f"{len(of_flow):,} samples" + f", {outside} of them outside" * (outside > 0)
        for axis, shown, title in ((data, some, of_points), (samples, of_flow, of_samples)):
            axis.scatter(shown[:, 0].numpy(), shown[:, 1].numpy(), s=2, alpha=0.5, linewidths=0)
            axis.set_title(title, fontsize=10)
        image = _paint(map_, log_prob, cmap="viridis", norm=norm)
        cell = float((high - low).prod()) / (SIDE - 1) ** 2
        mass = float(torch.trapezoid(torch.trapezoid(log_prob.exp().reshape(SIDE, SIDE)))) * cell
        map_.set_title(f"log-density, {100 * mass:.1f} % of its mass in this region", fontsize=10)
        figure.colorbar(image, ax=map_, label="nats", extend="min")
        if name:
            data.set_ylabel(f"{textwrap.fill(name, LONGEST)}\nx₂")
    return figure


@torch.no_grad()
def log_density(flow: Flow, points: Tensor, context: Context = None) -> Tensor:
    """The log-density at points ``(n, 2)``, in float64; with a context, of the mixture of those for its rows."""
    parts = torch.split(points, SIDE * 50)
    if context is None:
        return torch.cat([flow.log_prob(part) for part in parts]).double()
    context = spread(context, rows_of(context))
    flat = torch.cat([entry.flatten(1) for entry in entries(context)], dim=1)
    _, places, times = torch.unique(flat, dim=0, return_inverse=True, return_counts=True)
    first = [int((places == i).nonzero()[0]) for i in range(min(len(times), _MOST_ROWS + 1))]
    if len(first) > _MOST_ROWS:
        first, times = list(range(_MOST_ROWS)), torch.ones(_MOST_ROWS)
    of_rows = [torch.cat([flow.log_prob(part, sample(context, i)) for part in parts]).double() for i in first]
    return torch.logsumexp(torch.stack(of_rows) + (times / times.sum()).log().double()[:, None], 0)


@torch.no_grad()
def decisions(classifier: nn.Module, points: Tensor, labels: Tensor) -> Figure:
    """The class that a classifier assigns to each point of a region, below labelled points.

    Args:
        classifier: from points ``(n, 2)`` to logits, evaluated in its current mode.
        points: ``(n, 2)``.
        labels: ``(n,)``.
    """
    low, high = window(points)
    wrong = int((classifier(points).argmax(1) != labels).sum())
    figure, ((axis,),) = _panels(1, low, high)
    colours: dict[str, Any] = {"cmap": "tab10", "norm": Normalize(0, 9)}
    _paint(axis, classifier(grid(low, high)).argmax(1), alpha=0.3, interpolation="nearest", **colours)
    for number in sorted(set(labels.tolist())):
        of_class, marker = points[labels == number], MARKERS[number % len(MARKERS)]
        style: dict[str, Any] = {"marker": marker, "s": 8, "linewidths": 0.6, "label": f"class {number}", **colours}
        axis.scatter(of_class[:, 0].numpy(), of_class[:, 1].numpy(), c=[number] * len(of_class), **style)
    axis.legend(fontsize=8)
    axis.set_title(f"Decisions, {wrong} of {len(points):,} test points on the wrong side", fontsize=10)
    return figure


def window(points: Tensor) -> tuple[Tensor, Tensor]:
    """The lower left and the upper right corner of the region that is drawn around points ``(n, 2)``."""
    require_state("a picture of the plane", None, None, points)
    if points.dim() != 2 or points.shape[1] != 2 or not len(points):
        raise InvflowError(f"a picture of the plane expects points (n, 2), at least one, got {tuple(points.shape)}")
    low, high = points.amin(0), points.amax(0)
    margin = MARGIN * (high - low).clamp(min=1e-6)
    return low - margin, high + margin


def grid(low: Tensor, high: Tensor, side: int | None = None) -> Tensor:
    """The points of a grid over a region, ``(side * side, 2)``, row after row from below; `SIDE` along each axis."""
    side = side or SIDE
    x, y = (torch.linspace(float(a), float(b), side, dtype=low.dtype) for a, b in zip(low, high, strict=True))
    return torch.cartesian_prod(y, x).flip(1)


def _panels(count: int, low: Tensor, high: Tensor, rows: int = 1) -> tuple[Figure, Sequence[Sequence[Axes]]]:
    """Rows of panels that show the region."""
    (left, bottom), (right, top) = low.tolist(), high.tolist()
    height = CELL * min(max((top - bottom) / (right - left), 0.3), 2.0) + 0.6
    figure = Figure(figsize=(count * CELL + 1, rows * height), layout="constrained")
    region = {"xlim": (left, right), "ylim": (bottom, top), "aspect": "equal", "xlabel": "x₁", "ylabel": "x₂"}
    return figure, figure.subplots(rows, count, squeeze=False, subplot_kw=region).tolist()


def _paint(axis: Axes, values: Tensor, **style: Any) -> AxesImage:
    """Draws the values at the points of `grid` over all of the panel."""
    extent = (*axis.get_xlim(), *axis.get_ylim())
    return axis.imshow(values.reshape(SIDE, SIDE).numpy(), extent=extent, origin="lower", **style)
