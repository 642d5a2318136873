"""``invflow sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..context import each_entry
from ..errors import InvflowError
from .options import AsJson, DataName, DataRoot, Device, Plugins, RunPath, named_data
from .output import out, print_json, stdout_for_the_answer


def sample(
    run: RunPath,
    count: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="How many samples; default: 2000 points of a plane, else 64.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Below 1, samples are closer to the likeliest.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the samples.")] = 0,
    context: Annotated[
        list[str] | None,
        typer.Option(help="A class, or numbers with commas; repeat the option. Default: those of the test data."),
    ] = None,
    to: Annotated[Path | None, typer.Option("--out", help="The picture; default: RUN/pictures/drawn.png.")] = None,
    device: Device = "auto",
    data: DataName = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Draw samples from a trained flow.

    The result is a picture or, with --json, the numbers and their log-densities.
    """
    from ..diagnostics.pictures import write_figure
    from ..training.density import DRAWN_IMAGES, Density, in_turn
    from ..training.run import task_to_sample
    from ..training.run_folder import PICTURES, Run
    from ..training.tasks import DRAWN_POINTS

    to = to or run / PICTURES / "drawn.png"
    with stdout_for_the_answer(as_json):
        opened = Run.open(run)
        task = task_to_sample(opened, data_root, device, named_data(data))
        if not isinstance(task, Density):
            raise InvflowError(f"{run}: sample expects the run of a flow, a spec with a prior, got a classifier's")
        if count is None:
            count = DRAWN_POINTS if task.data.shape == (2,) else DRAWN_IMAGES
        rows = in_turn(task.rows_of_context(context or []), count)
        drawn = task.draw(count, rows, temperature=temperature, seed=seed)
    if as_json:
        known: dict[str, Any] = {"run": str(run), "unfinished": opened.unfinished}
        known |= {} if rows is None else {"context": each_entry(lambda entry: entry.tolist(), rows)}
        print_json({**known, "samples": drawn.tolist(), "log_prob": task.log_prob(drawn, rows).tolist()})
    else:
        write_figure(task.picture(drawn, rows if context else None), to)
        out.print(f"wrote {to}")
