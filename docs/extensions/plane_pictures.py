"""What a layer makes of a square grid of the plane."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

import invflow
from invflow import registry
from invflow.errors import InvflowError
from invflow.sequential import Sequential

NET = {"type": "mlp", "hidden": [16, 16], "activation": "tanh"}
DRAWN = (
    "actnorm", "additive_coupling", "affine", "affine_coupling", "autoregressive", "continuous", "householder",
    "leaky_relu", "linear_1x1", "logit", "mixture_coupling", "residual", "rotation", "sigmoid", "sinh_arcsinh",
    "softplus", "spline", "spline_autoregressive", "spline_coupling", "tanh",
)  # fmt: skip
"""Those of which a picture says something; the tests check that each can be drawn."""
LINES, POINTS, SIDE = 17, 400, 2.5


def plane_picture(tag: str, folder: Path) -> Path | None:
    """Draws the layer's picture as SVG into the folder; None for a tag that is not drawn."""
    if tag not in DRAWN:
        return None
    path = folder / f"{tag}.svg"
    chain, (low, high) = _chain(tag), _square(tag)
    # Two figures of one file must not differ from build to build: ids are salted at random otherwise.
    with mpl.rc_context({"svg.hashsalt": tag, "font.size": 9}):
        figure = Figure(figsize=(6, 3), layout="constrained")
        before, after = figure.subplots(1, 2)
        lines, colors = zip(*_grid(low, high), strict=True)
        with torch.no_grad():
            images = chain(torch.cat(lines)).split(POINTS)
        for line, image, color in zip(lines, images, colors, strict=True):
            for axes, points in ((before, line), (after, image)):
                axes.plot(points[:, 0], points[:, 1], color=color, linewidth=0.8)
        before.set_title("x")
        after.set_title(f"{tag}(x)")
        for axes in (before, after):
            axes.set_aspect("equal", "datalim")
        figure.savefig(path, metadata={"Date": None})
    return path


def _chain(tag: str) -> Sequential:
    """The layer on the plane: a coupling between a split and a merge, with weights away from the identity."""
    torch.manual_seed(1)
    fields = registry.bijections.fields(registry.bijections.registered()[tag]).fields
    document: dict[str, Any] = {"type": tag}
    if "net" in fields and fields["net"].required:
        document["net"] = NET if "autoregressive" not in tag else {"type": "masked_mlp", "hidden": [16, 16]}
    for layers in ([document], [{"type": "split"}, document, {"type": "merge"}]):
        try:
            chain = invflow.build({"input": {"shape": [2]}, "layers": layers}).double()
        except InvflowError:
            continue
        with torch.no_grad():
            for weight in chain.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.5)
        return chain.eval()
    raise InvflowError(f"{tag} does not map the plane")


def _square(tag: str) -> tuple[float, float]:
    """The square that is drawn, within the layer's domain."""
    domain = _domain(tag)
    return {"unit": (0.001, 0.999), "symmetric": (-0.999, 0.999), "positive": (0.01, SIDE)}.get(domain, (-SIDE, SIDE))


def _domain(tag: str) -> str:
    return next(step.domain for step in _chain(tag))


def _grid(low: float, high: float) -> Iterator[tuple[torch.Tensor, str]]:
    """Lines of points, with their colours: those along the two axes differ."""
    along = torch.linspace(low, high, POINTS, dtype=torch.double)
    for at in torch.linspace(low, high, LINES, dtype=torch.double):
        constant = at.expand_as(along)
        yield torch.stack([along, constant], 1), "#0072b2"
        yield torch.stack([constant, along], 1), "#d55e00"
