"""How fast the inverses of residual blocks are found: error against evaluations, for each method."""

from __future__ import annotations

import copy
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..bijections import Residual
from ..errors import InvflowError
from ..sequential import Sequential
from ..solvers import Method, solve
from ..state import State, leaves, map_state, part_of, shape_of

METHODS: tuple[Method, ...] = typing.get_args(Method)
COLOURS = {"picard": "tab:orange", "anderson": "tab:blue"}


@dataclass(frozen=True)
class InverseErrors:
    """How the inverse of one residual block is approached.

    Attributes:
        layer: which step of the chain: those of chains inside it counted too.
        coefficient: the bound of its contraction.
        errors: by method, the relative error ``|x_k - x| / |x|`` of the best point so far after each evaluation of g,
            the largest of all samples.
    """

    layer: int
    coefficient: float
    errors: Mapping[str, Sequence[float]]


def inverse_errors(chain: Sequential, x: State, context: Tensor | None = None) -> list[InverseErrors]:
    """The errors of each residual block of a chain, in float64 and eval mode, at the states that x reaches.

    Args:
        chain: a copy of it runs.
        x: a batch of inputs.
        context: likewise, where the chain wants one.
    """
    chain = copy.deepcopy(chain).double().eval()
    given = None if context is None else context.double()
    with torch.no_grad():
        states = chain.trace(map_state(torch.Tensor.double, x), given)
    found = []
    for position, step in enumerate(chain.steps(shape_of(x))):
        block = step.layer
        if isinstance(block, Residual):
            state = part_of(states[position + step.backwards], step.path)
            errors: dict[str, Sequence[float]] = {method: _errors(block, state, given, method) for method in METHODS}
            found.append(InverseErrors(position, block.coefficient, errors))
    return found


@torch.no_grad()
def _errors(block: Residual, x: State, context: Tensor | None, method: Method) -> list[float]:
    (exact,) = leaves(x)
    y = block(exact, context)
    norm = exact.flatten(1).norm(dim=1).clamp(min=torch.finfo(exact.dtype).tiny)
    best = torch.full_like(norm, math.inf)
    found = []

    def step(points: Tensor, rows: Tensor) -> Tensor:
        errors = (points - exact[rows]).flatten(1).norm(dim=1) / norm[rows]
        best[rows] = torch.minimum(best[rows], errors)
        found.append(float(best.max()))
        picard: Tensor = points - (block(points, None if context is None else context[rows]) - y[rows])
        return picard

    solve(step, y, contraction=block.coefficient, method=method)
    return found


def solver_plot(blocks: Sequence[InverseErrors]) -> Figure:
    """Error against evaluations on a logarithmic scale, a line for each block and method."""
    if not blocks:
        raise InvflowError("a picture of solvers expects a chain with at least one residual block, got none")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for method in METHODS:
        worst = max(len(block.errors[method]) for block in blocks)
        for number, block in enumerate(blocks):
            label = f"{method.capitalize()}: at most {worst} evaluations" if number == 0 else None
            errors = [error if error > 0 else math.nan for error in block.errors[method]]
            axis.plot(
                range(1, len(errors) + 1), errors, ".-", ms=3, lw=1, color=COLOURS[method], alpha=0.6, label=label
            )
    longest = max(len(errors) for block in blocks for errors in block.errors.values())
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        axis.axhline(eps, color="grey", lw=0.8, ls=":")
        name = f"eps of {str(dtype).removeprefix('torch.')}"
        axis.annotate(name, (longest, eps), fontsize=7, ha="right", va="bottom", color="grey")
    axis.set_yscale("log")
    axis.set_xlabel("evaluations of g")
    axis.set_ylabel("relative error of the inverse")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend()
    steepest = max(block.coefficient for block in blocks)
    axis.set_title(f"Inverses of {len(blocks)} residual blocks, coefficient at most {steepest:g}", fontsize=10)
    return figure
