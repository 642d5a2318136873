"""Where a training diverged: the part of the model that is the first to give numbers that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from ..context import Context, entries
from ..errors import InvflowError
from ..models import Classifier, Flow
from ..state import leaves, shape_of


def culprit(model: Classifier | Flow, x: Tensor, context: Context = None) -> str:
    """What is the first to give numbers that are not finite: the data, a step of the chain, the head or the prior.

    Args:
        model: the model; statistics of its layers may move, as in a step of its training.
        x: the model's input, with the batch.
        context: as the model's calls take it.

    Examples:
        >>> import invflow
        >>> from invflow.bijections import Scale
        >>> flow = Flow(invflow.Sequential(Scale(1), Scale(64), Scale(64)), invflow.models.StandardNormal(shape=(2,)))
        >>> culprit(flow, torch.tensor([[0.0, 1000.0]]))
        'layers.2, Scale(exponent=64)'
    """
    if not _finite(x, *entries(context)):
        return "the data"
    chain, log_det = model.bijection, isinstance(model, Flow)
    with torch.no_grad():
        context = chain.admit(x, model.for_layers(context))
        state = chain.numerics.enter(x)
        for step in chain.steps(shape_of(x)):
            try:
                state, change = step.forward(state, context, log_det)
            except InvflowError:  # a layer that refuses what it computed itself
                return str(step)
            if not _finite(*leaves(state), change):
                return str(step)
    return _top(model)


def broken_weight(model: Classifier | Flow) -> str | None:
    """A weight that is not finite and what it belongs to, in words; None if all are finite."""
    broken = next((name for name, weight in model.state_dict().items() if not _finite(weight)), None)
    if broken is None:
        return None
    owners = (step for step in model.bijection.steps() if broken.startswith(f"bijection.{step.name}."))
    return f"the weight {broken} of {next(owners, None) or _top(model)}"


def _top(model: Classifier | Flow) -> str:
    return "the prior" if isinstance(model, Flow) else "the head"


def _finite(*tensors: Tensor | None) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None)
