"""The diagram of a chain as SVG: what each layer is, and the shapes of the state between them."""

from __future__ import annotations

from ..models import Classifier, Flow
from ..sequential import Sequential
from ..state import Shape
from .layout import Layout
from .reading import picture_of


def diagram(model: Sequential | Classifier | Flow, shape: Shape | None = None, *, name: str = "") -> str:
    """One ``<svg>`` element that shows a chain or a model from its input, above, to what stands on it, below.

    It needs no other file, and takes its colours from the page around it: lines and letters have the colour of the
    text; the variables ``--diagram-layer``, ``--diagram-net``, ``--diagram-end`` and ``--diagram-frame`` set those of
    the boxes. A model on the meta device is enough. However many layers there are, the picture has a bounded size:
    equal layers in a row are drawn once, and beyond `invflow.report.reading.MOST_BLOCKS` blocks layers are counted.

    Args:
        model: a chain, or a model with one.
        shape: of the input, without the batch; by default the one that the chain was built for.
        name: of the model, for the title.

    Raises:
        InvflowError: the chain was not built from a spec, and there is no shape.
        ShapeError: the chain does not take the shape.

    Examples:
        >>> from invflow.bijections import Psi
        >>> picture = diagram(Sequential(Psi(2), Psi(2)), (1, 8, 8), name="twice psi")
        >>> picture.startswith("<svg "), picture.count("psi") > 1
        (True, True)
    """
    return Layout(picture_of(model, shape), name).svg()
