"""``invflow evaluate``."""

from __future__ import annotations

from .options import AsJson, DataName, DataRoot, Device, Plugins, RunPath, named_data
from .output import print_evaluation, print_json, stdout_for_the_answer


def evaluate(
    run: RunPath,
    device: Device = "auto",
    data: DataName = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Measure the test scores and round trips of a trained run."""
    from ..training.run import task_of_run
    from ..training.run_folder import Run

    with stdout_for_the_answer(as_json):
        opened = Run.open(run)
        found = task_of_run(opened, data_root, device, named_data(data)).evaluate()
    if as_json:
        print_json({"run": str(run), "unfinished": opened.unfinished}, found)
    else:
        print_evaluation(run, found)
