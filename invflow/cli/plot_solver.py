"""``invflow plot-solver``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InvflowError
from .options import Plugins, SpecPath
from .output import out


def plot_solver(
    spec: SpecPath,
    to: Annotated[Path, typer.Option("--out", help="The picture to write.")] = Path("solver.png"),
    plugin: Plugins = None,
) -> None:
    """Draw how fast a spec's residual blocks are inverted.

    Those of a run are trained; those of a spec have random weights. The picture shows the error by the number of
    evaluations, for each method.
    """
    from ..diagnostics.check import chain_of, inputs, untrained
    from ..diagnostics.pictures import write_figure
    from ..diagnostics.solver_plot import inverse_errors, solver_plot

    chain = chain_of(spec)
    blocks = inverse_errors(chain, *inputs(chain))
    if not blocks:
        raise InvflowError(f"{spec}: plot-solver expects a spec with a residual layer, got one without")
    write_figure(solver_plot(blocks, trained=not untrained(spec)), to)
    if untrained(spec):
        out.print(untrained(spec))
    out.print(f"wrote {to}")
