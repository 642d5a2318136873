"""Which layers draw random numbers, found out before they run: a compiled graph cannot draw the same ones again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .._torch import constant_to_compiler
from ..bijection import Bijection
from ..state import Shape, zeros


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether an operator that draws random numbers ran."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


@constant_to_compiler
def draw_random_numbers(layer: Bijection, backwards: bool, shape: Shape, context_shape: Shape | None) -> bool:
    """Whether a layer, in the mode that it is in, draws random numbers for an input of this shape.

    A copy of it runs on the meta device; a layer that cannot be run there may draw some.
    """
    mode = _Draws()  # type: ignore[no-untyped-call]
    try:
        # From within torch.compile this runs as an ordinary call does, while the surrounding code is traced.
        probe = copy.deepcopy(layer).to("meta")
        like = next((weight for weight in probe.parameters() if weight.is_floating_point()), torch.empty(0))
        x = zeros(shape, batch=2, dtype=like.dtype, device="meta")
        context: Any = None if context_shape is None else zeros(context_shape, 2, dtype=like.dtype, device="meta")
        with torch.no_grad(), mode:
            (probe.inverse if backwards else probe)(x, context)
    except Exception:
        return True
    return mode.found
