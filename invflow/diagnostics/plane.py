"""Pictures of models of points of the plane: densities, and what a classifier decides."""

from __future__ import annotations

import math

import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..errors import InvflowError
from ..models import Flow

SIDE = 200  # points of the grid along each axis
MARGIN = 0.15  # how far the picture reaches beyond the points, as a fraction of their extent
DEPTH = 8.0  # nats below its maximum at which the colours of a log-density end
CELL = 4.0  # inches a panel takes


@torch.no_grad()
def density(flow: Flow, points: Tensor, drawn: Tensor) -> Figure:
    """Points of the data, samples of the flow, and its log-density in nats, on the same piece of the plane.

    Args:
        flow: a density of points (2,), in the mode that it is in.
        points: ``(n, 2)``.
        drawn: ``(m, 2)``; those outside of the picture are counted in its title.
    """
    low, high = _window(points)
    x = _grid(low, high)
    log_prob = torch.cat([flow.log_prob(part) for part in torch.split(x, SIDE * 50)]).reshape(SIDE, SIDE).double()
    figure = Figure(figsize=(3 * CELL + 1, _height(low, high)), layout="constrained")
    data, samples, map_ = figure.subplots(1, 3)
    outside = int(((drawn < low) | (drawn > high)).any(1).sum())
    _scatter(data, points, f"{len(points):,} test points")
    _scatter(samples, drawn, f"{len(drawn):,} samples" + (f", {outside} of them outside" if outside else ""))
    top = float(log_prob.nan_to_num(nan=-math.inf).max())
    image = map_.imshow(
        log_prob.numpy(),
        extent=_extent(low, high),
        origin="lower",
        cmap="viridis",
        norm=Normalize(top - DEPTH, top) if math.isfinite(top) else None,
    )
    width, height = ((high - low) / (SIDE - 1)).tolist()
    mass = float(torch.trapezoid(torch.trapezoid(log_prob.exp(), dx=width), dx=height))
    map_.set_title(f"log-density, {mass:.1%} of its mass in here", fontsize=10)
    figure.colorbar(image, ax=map_, label="nats", extend="min")
    for axis in (data, samples, map_):
        _frame(axis, low, high)
    return figure


@torch.no_grad()
def decisions(classifier: nn.Module, points: Tensor, labels: Tensor) -> Figure:
    """The class that a classifier gives to each place, under labelled points.

    Args:
        classifier: from points ``(n, 2)`` to logits, in the mode that it is in.
        points: ``(n, 2)``.
        labels: ``(n,)``.
    """
    low, high = _window(points)
    places = classifier(_grid(low, high)).argmax(1).reshape(SIDE, SIDE)
    wrong = classifier(points).argmax(1) != labels
    figure = Figure(figsize=(CELL + 1, _height(low, high)), layout="constrained")
    axis = figure.subplots()
    colours = Normalize(0, 9)
    axis.imshow(
        places.numpy(), extent=_extent(low, high), origin="lower", cmap="tab10", norm=colours, alpha=0.3,
        interpolation="nearest",
    )  # fmt: skip
    axis.scatter(points[:, 0].numpy(), points[:, 1].numpy(), c=labels.numpy(), cmap="tab10", norm=colours, s=3)
    axis.set_title(f"Decisions, {int(wrong.sum())} of {len(points):,} test points on the wrong side", fontsize=10)
    _frame(axis, low, high)
    return figure


def _window(points: Tensor) -> tuple[Tensor, Tensor]:
    """The corners of the piece of the plane that is drawn."""
    if points.dim() != 2 or points.shape[1] != 2 or not len(points):
        raise InvflowError(f"a picture of the plane expects points (n, 2), at least one, got {tuple(points.shape)}")
    low, high = points.amin(0), points.amax(0)
    margin = MARGIN * (high - low).clamp(min=1e-6)
    return low - margin, high + margin


def _grid(low: Tensor, high: Tensor) -> Tensor:
    """``(SIDE * SIDE, 2)``, row after row from below."""
    x, y = (torch.linspace(float(a), float(b), SIDE, dtype=low.dtype) for a, b in zip(low, high, strict=True))
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], dim=-1).reshape(-1, 2)


def _height(low: Tensor, high: Tensor) -> float:
    """Inches for a row of panels that show this piece, with their titles."""
    width, height = (high - low).tolist()
    ratio: float = height / width
    return CELL * min(max(ratio, 0.3), 2.0) + 0.6


def _extent(low: Tensor, high: Tensor) -> tuple[float, float, float, float]:
    return float(low[0]), float(high[0]), float(low[1]), float(high[1])


def _scatter(axis: Axes, points: Tensor, title: str) -> None:
    axis.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=2, alpha=0.5, linewidths=0)
    axis.set_title(title, fontsize=10)


def _frame(axis: Axes, low: Tensor, high: Tensor) -> None:
    axis.set_xlim(float(low[0]), float(high[0]))
    axis.set_ylim(float(low[1]), float(high[1]))
    axis.set_aspect("equal")
