"""Pictures of analyses: singular values by depth, separation and contraction by depth."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..errors import InvflowError
from .analysis import LOGITS, Analysis, Separation, Spectrum
from .figure import Figure


def spectra_plot(found: Analysis) -> Figure:
    """The singular values in their order on a logarithmic scale, one colour for each depth, one line for each input."""
    if not found.spectra:
        raise InvflowError(f"a picture of singular values expects some, got none: {'; '.join(found.notes)}")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for spectrum, colour in zip(found.spectra, _colours(found.spectra), strict=True):
        for index, values in enumerate(spectrum.values):
            label = f"after {_name(spectrum)}" if index == 0 else None
            axis.plot(range(1, len(values) + 1), values, color=colour, lw=1, alpha=0.8, label=label)
    axis.set(yscale="log", xlabel="index, largest first", ylabel="singular value")
    axis.axhline(1, color="grey", lw=0.8, ls=":")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    inputs, which = len(found.spectra[0].values), "all" if found.exact else "leading"
    axis.set_title(f"Jacobian of the first layers: {which} singular values at {inputs} test inputs", fontsize=10)
    return figure


def separations_plot(found: Analysis) -> Figure:
    """The accuracy of a linear and a nearest-neighbour classifier by depth, and the contraction by depth."""
    if not found.separations:
        raise InvflowError(f"a picture of separation expects classes, got none: {'; '.join(found.notes)}")
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = found.separations
    for name, label, marker in (("linear", "linear classifier", "o"), ("nearest", "nearest neighbour", "s")):
        accuracy = [100 * getattr(row, f"{name}_accuracy") for row in rows]
        left.plot(range(len(rows)), accuracy, f"{marker}-", ms=4, label=label)
    if found.test_accuracy is not None:
        own = 100 * found.test_accuracy
        left.axhline(own, color="grey", lw=0.8, ls=":", label=f"the model's head: {own:.1f} %")
    left.set(ylabel="test accuracy, %")
    left.legend(fontsize=8)
    right.plot(range(len(rows)), [row.contraction for row in rows], "o-", ms=4, color="tab:green")
    right.set(ylabel="mean distance,\nwithin / between classes")
    for axis in (left, right):
        _name_depths(axis, rows)
    samples = f"{found.train_samples:,} training samples, {found.test_samples:,} test samples"
    figure.suptitle(f"Separation and contraction: {samples}", fontsize=10)
    return figure


def _name_depths(axis: Axes, rows: Sequence[Separation]) -> None:
    names = [_name(row) for row in rows]
    axis.set_xticks(range(len(rows)), names, rotation=35, ha="right", fontsize=8)
    axis.grid(alpha=0.3)


def _name(row: Separation | Spectrum) -> str:
    """A short name of a depth: the kind of its last layer, and its number."""
    kind = row.layer.partition("(")[0]
    return kind if row.depth == 0 or kind == LOGITS else f"{row.depth} {kind.removeprefix('the inverse of ')}"


def _colours(rows: Sequence[Spectrum]) -> list[tuple[float, float, float, float]]:
    return [colormaps["viridis"](0.9 * i / max(1, len(rows) - 1)) for i in range(len(rows))]
