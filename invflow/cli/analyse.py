"""``invflow analyse``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import AsJson, DataName, DataRoot, Device, Plugins, RunPath, named_data
from .output import err, out, percent, print_caveat, print_json, print_table, stdout_for_the_answer

if TYPE_CHECKING:
    from ..diagnostics.analysis import Analysis


def analyse(
    run: RunPath,
    depths: Annotated[int, typer.Option(min=2, help="At most how many depths, chosen evenly.")] = 12,
    inputs: Annotated[int, typer.Option(min=1, max=100, help="At how many test samples the Jacobian is taken.")] = 3,
    dense: Annotated[
        int, typer.Option(min=0, help="The largest state, in numbers, with all its singular values.")
    ] = 1024,
    leading: Annotated[int, typer.Option(min=1, help="How many singular values of a larger one.")] = 64,
    train_samples: Annotated[int, typer.Option(min=1, help="At most how many samples to learn from.")] = 1000,
    test_samples: Annotated[int, typer.Option(min=1, help="At most how many samples to measure on.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The seed that draws the samples.")] = 0,
    to: Annotated[Path | None, typer.Option("--out", help="The folder to write to; default: RUN/pictures.")] = None,
    device: Device = "auto",
    data: DataName = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Measure what a trained model does layer by layer.

    The singular values of its Jacobian, and how well a linear and a nearest-neighbour classifier tell the classes from
    the features: as a table and pictures. The walks of 'invflow interpolate' complete the picture.
    """
    from ..diagnostics.analysis_plot import separations_plot, spectra_plot
    from ..diagnostics.pictures import write_figure
    from ..training.analysing import analyse as analyse_task
    from ..training.run import task_of_run
    from ..training.run_folder import PICTURES, Run

    folder = to or run / PICTURES
    options: dict[str, Any] = {"depths": depths, "inputs": inputs, "dense": dense, "leading": leading, "seed": seed}
    options |= {"train_samples": train_samples, "test_samples": test_samples}
    with stdout_for_the_answer(as_json):
        opened = Run.open(run)
        task = task_of_run(opened, data_root, device, named_data(data))
        with err.status("analysing") as status:
            found = analyse_task(task, announce=lambda line: status.update(f"analysing: {line}"), **options)
    figures = {"singular_values": spectra_plot} if found.spectra else {}
    figures |= {"separation": separations_plot} if found.separations else {}
    pictures = [folder / f"{name}.png" for name in figures]
    for draw, picture in zip(figures.values(), pictures, strict=True):
        write_figure(draw(found), picture)
    if as_json:
        print_json({"run": str(run), "unfinished": opened.unfinished}, found, {"pictures": list(map(str, pictures))})
        return
    print_caveat(found)
    for note in found.notes:
        out.print(note)
    _print(found)
    for picture in pictures:
        out.print(f"wrote {picture}")


def _print(found: Analysis) -> None:
    spectra = {row.depth: row for row in found.spectra}
    separations = {row.depth: row for row in found.separations}
    names = {row.depth: row.layer for row in found.spectra} | {row.depth: row.layer for row in found.separations}
    rows = []
    for depth, layer in sorted(names.items()):
        cells = [str(depth), layer]
        if found.separations:
            row = separations[depth]
            cells += [percent(row.linear_accuracy), percent(row.nearest_accuracy), f"{row.contraction:.3f}"]
        if found.spectra:
            values = spectra[depth].values if depth in spectra else []
            cells += [f"{max(one[0] for one in values):.3g}" if values else ""]
            cells += [f"{min(one[-1] for one in values):.3g}" if values else ""]
        rows.append(cells)
    heads = ["depth", "layer"]
    heads += ["linear", "nearest", "within / between"] if found.separations else []
    heads += ["largest singular value", "smallest" if found.exact else "last"] if found.spectra else []
    print_table(heads, rows)
    if found.spectra:
        inputs, count = len(found.spectra[0].values), len(found.spectra[-1].values[0])
        how = "all, of the Jacobian itself" if found.exact else "the leading ones, by Lanczos iteration"
        out.print(f"singular values at {inputs} test samples: {count}, {how}")
    if found.separations:
        samples = f"{found.train_samples:,} training samples, measured on {found.test_samples:,} test samples"
        out.print(f"classifiers learned from {samples}")
        if found.test_accuracy is not None:
            out.print(f"accuracy of the model's own head on these: {percent(found.test_accuracy)}")
