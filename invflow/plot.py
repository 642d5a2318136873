"""Pictures of models, chains and runs, as matplotlib figures; a notebook shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from . import models
from .bijection import Bijection
from .context import Context
from .diagnostics import analysis_plot, pictures, plane
from .diagnostics.analysis import Analysis
from .diagnostics.figure import Figure
from .diagnostics.interpolation import interpolate
from .errors import InvflowError
from .sequential import Sequential
from .training.density import in_turn
from .training.module import evaluation_draws
from .training.run_folder import Run
from .training.tasks import evaluating

Model: TypeAlias = models.Classifier | models.Flow
Drawn: TypeAlias = Model | Bijection | Run | str | Path
"""What is drawn: a model, a chain, a run, or the folder of one."""

IMAGES = 64
POINTS = 2000


def samples(
    model: Drawn, data: Any = None, count: int | None = None, *, context: Context = None, seed: int = 0
) -> Figure:
    """Samples of a flow; for a classifier, images with their labels, and its mistakes in red.

    Args:
        model: the flow, or the classifier.
        data: of a classifier, images ``(n, channels, height, width)`` and labels ``(n,)``; of a flow of points, some
            data ``(n, 2)`` to be drawn beside them.
        count: the number of samples; by default 64 images or 2,000 points.
        context: rows that the samples take in turn.
        seed: of the samples.

    Examples:
        >>> import torch, invflow
        >>> flow = invflow.build_model(
        ...     {"input": {"shape": [2]}, "layers": [{"type": "affine"}], "prior": {"type": "standard_normal"}}
        ... )
        >>> len(samples(flow, count=50).axes) > 0
        True
    """
    found = _model(model)
    if isinstance(found, models.Classifier) and not (isinstance(found, models.Flow) and data is None):
        if not isinstance(data, tuple | list) or len(data) != 2:
            raise InvflowError("the samples of a classifier are data: pass images and labels, data=(images, labels)")
        images, labels = data[0][:count], data[1][:count]
        with evaluating(found):
            return pictures.samples(images, labels, found.logits(images, context).argmax(1))
    shape = found.bijection.declared_shape
    if shape is not None and len(shape) == 3:
        drawn = _draw(found, count or IMAGES, context, seed)
        return pictures.gallery(drawn, f"{len(drawn)} samples of the flow")
    return density(found, data, count, context=context, seed=seed)


def density(
    flow: Drawn, points: Tensor | None = None, count: int | None = None, *, context: Context = None, seed: int = 0
) -> Figure:
    """Points of the plane, samples of a flow, and its log-density.

    Args:
        flow: a density of points (2,).
        points: data, ``(n, 2)``; None to draw the flow's own samples in their place.
        count: the number of samples; by default 2,000.
        context: of the points, ``(n, ...)``, or one row for all.
        seed: of the samples.

    Examples:
        >>> import torch, invflow
        >>> flow = invflow.build_model(
        ...     {"input": {"shape": [2]}, "layers": [{"type": "affine"}], "prior": {"type": "standard_normal"}}
        ... )
        >>> len(density(flow, torch.randn(50, 2), count=50).axes) >= 3
        True
    """
    found = _flow(flow)
    drawn = _draw(found, count or POINTS, context, seed)
    with evaluating(found):
        some, points_are = (drawn, "samples") if points is None else (points, "points")
        return plane.density(found, some, drawn, context, points_are=points_are)


def psi(model: Drawn, images: Tensor) -> Figure:
    """Images, and the channels that the first psi of a chain makes of them.

    Args:
        model: a model or a chain with a psi.
        images: ``(n, channels, height, width)``.

    Examples:
        >>> import torch, invflow
        >>> model = invflow.build_model({
        ...     "input": {"shape": [1, 4, 4]}, "layers": [{"type": "psi", "block_size": 2}],
        ...     "head": {"type": "linear", "classes": 3},
        ... })
        >>> len(psi(model, torch.rand(2, 1, 4, 4)).axes) > 0
        True
    """
    first = pictures.first_psi(_chain(model))
    if first is None:
        raise InvflowError("a picture of psi expects a chain with a psi layer, got one without")
    return pictures.psi_channels(images, first)


def reconstructions(model: Drawn, images: Tensor, context: Context = None) -> Figure:
    """Images, what a chain's inverse makes of their features, and the difference.

    Args:
        model: a model or a chain.
        images: ``(n, channels, height, width)``.
        context: ``(n, ...)``.

    Examples:
        >>> import torch, invflow
        >>> model = invflow.build_model({
        ...     "input": {"shape": [1, 4, 4]}, "layers": [{"type": "psi", "block_size": 2}],
        ...     "head": {"type": "linear", "classes": 3},
        ... })
        >>> len(reconstructions(model, torch.rand(2, 1, 4, 4)).axes) > 0
        True
    """
    chain = _chain(model)
    with evaluating(chain), evaluation_draws(0):
        if not isinstance(model, Bijection):
            context = _model(model).for_layers(context)
        return pictures.reconstructions(images, chain.inverse(chain(images, context), context))


def interpolation(
    model: Drawn, x0: Tensor, x1: Tensor, steps: int = 9, labels: list[tuple[int, int]] | None = None
) -> Figure:
    """Walks from images to others, straight in feature space.

    Args:
        model: a model or a chain.
        x0: the first images, ``(pairs, channels, height, width)``.
        x1: the last images, of the same shape.
        steps: the number of images in each walk.
        labels: for each pair, the classes of its ends.

    Examples:
        >>> import torch, invflow
        >>> model = invflow.build_model({
        ...     "input": {"shape": [1, 4, 4]}, "layers": [{"type": "psi", "block_size": 2}],
        ...     "head": {"type": "linear", "classes": 3},
        ... })
        >>> len(interpolation(model, torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4), steps=5).axes)
        5
    """
    chain = _chain(model)
    with evaluating(chain):
        frames = interpolate(chain, x0, x1, steps)
    return pictures.interpolation_strip(frames, labels)


def spectra(found: Analysis) -> Figure:
    """The singular values of the Jacobian of a model's first layers, in their order, for each depth.

    Args:
        found: the result of `invflow.analyse`.

    Examples:
        >>> import torch, invflow
        >>> flow = invflow.build_model(
        ...     {"input": {"shape": [2]}, "layers": [{"type": "affine"}], "prior": {"type": "standard_normal"}}
        ... )
        >>> len(spectra(invflow.analyse(flow, torch.randn(10, 2), inputs=1)).axes) > 0
        True
    """
    return analysis_plot.spectra_plot(found)


def separation(found: Analysis) -> Figure:
    """The accuracy of a linear and a nearest-neighbour classifier by depth, and the contraction by depth.

    Args:
        found: the result of `invflow.analyse`.

    Examples:
        >>> import torch, invflow
        >>> model = invflow.build_model({
        ...     "input": {"shape": [1, 4, 4]}, "layers": [{"type": "psi", "block_size": 2}],
        ...     "head": {"type": "linear", "classes": 3},
        ... })
        >>> images, labels = torch.rand(30, 1, 4, 4), torch.arange(30) % 3
        >>> len(separation(invflow.analyse(model, (images, labels), inputs=1)).axes) > 0
        True
    """
    return analysis_plot.separations_plot(found)


def curves(run: Run | str | Path) -> Figure:
    """The training and test metrics of a run by epoch.

    Examples:
        >>> import tempfile, invflow
        >>> spec = {
        ...     "input": {"shape": [2]}, "layers": [{"type": "affine"}], "prior": {"type": "standard_normal"},
        ...     "training": {"data": {"name": "moons", "train_size": 200, "test_size": 100}, "epochs": 1},
        ... }
        >>> run = invflow.train(spec, tempfile.mkdtemp(), progress=False)
        >>> len(curves(run).axes) > 0
        True
    """
    opened = run if isinstance(run, Run) else Run.open(Path(run))
    return pictures.training_curves(opened.metrics)


def _draw(flow: models.Flow, count: int, context: Context, seed: int) -> Tensor:
    with evaluating(flow), evaluation_draws(seed):
        drawn: Tensor = flow.sample(count) if context is None else flow.sample(1, in_turn(context, count))[0]
    return drawn


def _model(drawn: Drawn) -> Model:
    if isinstance(drawn, str | Path):
        drawn = Run.open(Path(drawn))
    if isinstance(drawn, Run):
        return drawn.load()
    if isinstance(drawn, models.Classifier | models.Flow):
        return drawn
    raise InvflowError(f"this picture expects a classifier or a flow, got a {type(drawn).__name__}")


def _flow(drawn: Drawn) -> models.Flow:
    found = _model(drawn)
    if not isinstance(found, models.Flow):
        raise InvflowError("this picture expects a flow, a model with a prior, got a classifier")
    return found


def _chain(drawn: Drawn) -> Sequential:
    if isinstance(drawn, Sequential):
        return drawn
    if isinstance(drawn, Bijection):
        return Sequential(drawn)
    return _model(drawn).bijection
