"""Bounds on the size of a spec and its model, because specs may come from untrusted sources."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits of a document; beyond them, it is refused before time or memory is spent on it.

    Attributes:
        text_bytes: the size of the file.
        depth: the depth of nested objects and lists.
        layers: the number of layers after every repeat is expanded.
        values: the number of JSON values after every reference is replaced.
        parameters: the numbers in all weights and buffers together.
        state: the numbers of one sample in any state.
        tensors: the tensors of a state.
        operations: what it costs to build the model, besides its weights and their random numbers: `OBJECT` for each
            module, weight and buffer, `STATE_TENSOR` for each tensor of each state between the layers, and the layers'
            `building_cost`. The default takes about ten seconds.

    Examples:
        >>> import invflow
        >>> deep = {"input": {"shape": [2]}, "layers": [{"type": "affine"}] * 5}
        >>> invflow.build(deep, limits=Limits(layers=4))
        Traceback (most recent call last):
        ...
        invflow.errors.SpecError: layers.4: more layers than the limit of 4 once every repeat is expanded
    """

    text_bytes: int = 2**20
    depth: int = 32
    layers: int = 10_000
    values: int = 1_000_000
    parameters: int = 10**9
    state: int = 2**28
    tensors: int = 1024
    operations: int = 10**11


OBJECT = 2 * 10**6
"""The operations that a module, a weight or a buffer costs: it is made on the meta device first."""

STATE_TENSOR = 10**4
"""The operations that a tensor costs in the shape of a state."""

DEFAULT_LIMITS = Limits()
