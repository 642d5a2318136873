"""The chain of a model, as a diagram with shapes."""

from __future__ import annotations

from ..models import Classifier, Flow
from .figures import table


def chain_of(model: Classifier | Flow, name: str) -> str:
    """The layers of a model's chain and the shapes between them, as HTML.

    Args:
        model: the model.
        name: what the page calls it.
    """
    chain = model.bijection
    if chain.declared_shape is None:
        return "<p>The chain does not know the shape of its input.</p>"
    shapes = chain.shapes(chain.declared_shape)
    rows = [["input", str(shapes[0])]]
    rows += [[step.title, str(shape)] for step, shape in zip(chain.steps(), shapes[1:], strict=True)]
    return table(["layer", "shape of the state after it"], rows, caption=f"The chain of {name}")
