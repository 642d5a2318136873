"""Walks between samples that stay among the data: a loss of the points half-way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..context import entries, with_entries
from ..errors import InvflowError
from ..models import Classifier, Flow
from ..numerics.modes import FLOAT
from ..samples import Batch
from ..spec.training import Midpoints
from ..state import leaves, map_state

if TYPE_CHECKING:
    from .tasks import Task

MOST_TARGETS = 20_000
"""How many training samples are targets at most, evenly spaced."""


class MidpointLoss:
    """What is to be small if the straight line between the features of two classes is to lead past their samples.

    For pairs a, b of samples of different classes in a batch, with the chain f, ``x = f^-1((f(a) + f(b)) / 2)`` is the
    sample half-way. The loss is ``-weight mean(log sum_k exp(-|x - x_k|^2 / (2 width^2)))``, whose sum runs over the
    training samples x_k of the two classes, up to a constant: the density of x that a Gaussian kernel makes of them.
    Gradients run through the inverse.

    Args:
        task: the model and its data.
        options: of the training block.

    Raises:
        InvflowError: the data have no labels, or the model's chain cannot be run backwards with gradients.
    """

    def __init__(self, task: Task[Any], options: Midpoints) -> None:
        why = unfit_for_midpoints(task)
        if why is not None:
            raise InvflowError(why)
        self._task = task
        self._options = options
        train = task.data.train
        if train.own_batches() is not None or len(train) <= MOST_TARGETS:
            some = train.first(MOST_TARGETS)
        else:
            some = train.take(torch.linspace(0, len(train) - 1, MOST_TARGETS).long())
        assert some.labels is not None
        self._targets, self._classes = task.centered(some.values).flatten(1), some.labels

    def __call__(self, batch: Batch, model: Classifier | Flow) -> Tensor:
        """The loss of a model for a batch; 0 if this has no two samples of different classes."""
        labels, chain = batch.labels, model.bijection
        assert labels is not None
        partner = torch.randperm(len(labels), device=labels.device)
        first = (labels != labels[partner]).nonzero()[: self._options.pairs, 0]
        if not len(first):
            return batch.values.new_zeros(())
        ends = [batch.rows(first), batch.rows(partner[first])]
        contexts = [model.for_layers(one.context) for one in ends]
        z = [chain(self._task.inputs(one.values), context) for one, context in zip(ends, contexts, strict=True)]
        between = zip(*map(entries, contexts), strict=True)
        context = with_entries(contexts[0], [torch.lerp(a, b, 0.5) for a, b in between])
        x = chain.inverse(_half_way(*z), context).flatten(1)
        self._targets, self._classes = self._targets.to(x), self._classes.to(labels.device)
        nearness = -torch.cdist(x, self._targets).square() / (2 * self._options.width**2)
        of_ends = (self._classes == ends[0].labels[:, None]) | (self._classes == ends[1].labels[:, None])  # type: ignore[index]
        known = of_ends.any(1)
        if not bool(known.any()):
            return batch.values.new_zeros(())
        return -self._options.weight * nearness.masked_fill(~of_ends, -torch.inf)[known].logsumexp(1).mean()


def unfit_for_midpoints(task: Task[Any]) -> str | None:
    """Why a task cannot have midpoints; None if it can."""
    chain = task.model.bijection
    if not task.data.classes:
        return f"midpoints lie between two classes, and {task.data.name} has no labels"
    if not len(task.data.train):
        return "midpoints need to know the training samples: train with invflow.fit"
    if not chain.invertible:
        return "midpoints are run backwards, and the chain has a joint, which has no inverse"
    if not chain.surjective:
        return "midpoints are run backwards, and the chain adds dimensions, so that they may be no images of anything"
    if chain.numerics != FLOAT:
        return "midpoints need gradients through the inverse, which rounding has none of; leave numerics out"
    return None


def _half_way(a: Any, b: Any) -> Any:
    others = leaves(b)
    return map_state(lambda leaf: (leaf + next(others)) / 2, a)
