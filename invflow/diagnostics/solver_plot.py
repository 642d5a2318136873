"""The convergence of the inverses of residual blocks: error against evaluations, for each method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..bijections import Residual
from ..context import Context, each_entry, seen
from ..errors import InvflowError
from ..sequential import Sequential
from ..solvers import Method, solve
from ..state import State, leaves, part_of, shape_of
from .figure import Figure
from .rounding import in_double

LINES: dict[Method, str] = {"anderson": "-", "picard": "--"}
COLOURS: dict[Method, str] = {"anderson": "tab:blue", "picard": "tab:orange"}


@dataclass(frozen=True)
class InverseErrors:
    """The convergence of the inverse of one residual block.

    Attributes:
        layer: the index of its step in the chain; the steps of nested chains count, too.
        contraction: the bound of its branch's Lipschitz constant.
        errors: by method, the relative error ``|x_k - x| / |x|`` of the best point so far after each evaluation of g,
            the largest over the samples.
    """

    layer: int
    contraction: float
    errors: Mapping[Method, Sequence[float]]


def inverse_errors(chain: Sequential, x: State, context: Context = None) -> list[InverseErrors]:
    """The errors of each residual block of a chain, in float64 and eval mode, at the states that x reaches.

    Args:
        chain: a copy of it runs.
        x: a batch of inputs.
        context: the context, if the chain has one.
    """
    chain, x, context = in_double(chain, x, context)
    context = chain.admit(x, context)
    with torch.no_grad():
        states = chain.eval().trace(x, context)
    found = []
    for position, step in enumerate(chain.steps(shape_of(x))):
        if isinstance(step.layer, Residual):
            state = part_of(states[position + step.backwards], step.path)
            errors = {
                method: _errors(step.layer, state, seen(step.around(context), step.layer.sees), method)
                for method in COLOURS
            }
            found.append(InverseErrors(position, step.layer.contraction, errors))
    return found


@torch.no_grad()
def _errors(block: Residual, x: State, context: Context, method: Method) -> list[float]:
    (exact,) = leaves(x)
    y = block(exact, context)
    norm = exact.flatten(1).norm(dim=1).clamp(min=torch.finfo(exact.dtype).tiny)
    best = torch.full_like(norm, math.inf)
    found = []

    def step(points: Tensor, rows: Tensor) -> Tensor:
        errors = (points - exact[rows]).flatten(1).norm(dim=1) / norm[rows]
        best[rows] = torch.minimum(best[rows], errors)
        found.append(float(best.max()))
        picard: Tensor = points - (block(points, each_entry(lambda entry: entry[rows], context)) - y[rows])
        return picard

    solve(step, y, contraction=block.contraction, method=method)
    return found


def solver_plot(blocks: Sequence[InverseErrors], *, trained: bool = True) -> Figure:
    """Error against evaluations on a logarithmic scale, one line per block and method.

    Args:
        blocks: from `inverse_errors`.
        trained: whether the weights are; if not, the title says so.
    """
    if not blocks:
        raise InvflowError("a picture of solvers expects a chain with at least one residual block, got none")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for method, colour in COLOURS.items():
        evaluations = max(len(block.errors[method]) for block in blocks)
        for number, block in enumerate(blocks):
            label = f"{method.capitalize()}: at most {evaluations} evaluations" if number == 0 else None
            errors = [error if error > 0 else math.nan for error in block.errors[method]]
            style: dict[str, Any] = {"linestyle": LINES[method], "marker": ".", "ms": 3, "lw": 1, "alpha": 0.6}
            axis.plot(range(1, len(errors) + 1), errors, color=colour, label=label, **style)
    longest = max(len(errors) for block in blocks for errors in block.errors.values())
    for dtype in ("float32", "float64"):
        eps = torch.finfo(getattr(torch, dtype)).eps
        axis.axhline(eps, color="grey", lw=0.8, ls=":")
        axis.annotate(f"eps of {dtype}", (longest, eps), fontsize=7, ha="right", va="bottom", color="grey")
    axis.set(yscale="log", xlabel="evaluations of g", ylabel="relative error of the inverse")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend()
    steepest = max(block.contraction for block in blocks)
    weights = "" if trained else ", random weights"
    count = f"{len(blocks)} residual block{'s' if len(blocks) > 1 else ''}"
    axis.set_title(f"Inverses of {count}{weights}, contraction at most {steepest:g}", fontsize=10)
    return figure
