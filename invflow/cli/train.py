"""``invflow train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InvflowError
from .options import AsJson, BatchSize, DataRoot, Device, Download, Epochs, LearningRate, Plugins, TrainSize, new_folder
from .output import err, out, print_evaluation, print_json, stdout_for_the_answer


def train(
    spec: Annotated[Path | None, typer.Argument(metavar="SPEC", help="The spec's JSON file.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Resume an interrupted run.")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="The run folder; default: runs/NAME-TIME-ID.")] = None,
    seed: Annotated[int | None, typer.Option(help="Override the seed.")] = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    train_size: TrainSize = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    download: Download = False,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Train the classifier or the flow that a spec describes.

    Then evaluate it and draw pictures.
    """
    from ..spec import load_spec
    from ..spec.record import RUN_FILE
    from ..training import run as runs
    from ..training.illustrate import illustrate

    overrides = {"seed": seed, "epochs": epochs, "batch_size": batch_size, "lr": lr, "train_size": train_size}
    if (spec is None) == (resume is None):
        raise InvflowError("train expects a SPEC, or --resume RUN, and not both")
    if resume is not None and (to is not None or any(value is not None for value in overrides.values())):
        raise InvflowError("--resume keeps the options that the run was started with: no --out, --seed, --epochs, ...")
    folder = resume
    options: dict[str, Any] = {"data_root": data_root, "download": download, "device": device}
    with stdout_for_the_answer(as_json):
        try:
            if resume is not None:
                run = runs.resume(resume, **options)
            elif spec is not None:
                document = load_spec(spec)
                folder = to or new_folder(runs.folder_name(document))
                run = runs.train(document, folder, overrides=overrides, **options)
            found, pictures = illustrate(run, data_root, device)
        except (KeyboardInterrupt, OSError) as error:  # Ctrl-C, a full disk
            if folder is not None and (folder / RUN_FILE).is_file():
                plugins = "".join(f" --plugin {path}" for path in plugin or ())
                err.print(f"interrupted; resume with: invflow train --resume {folder}{plugins}")
                if isinstance(error, KeyboardInterrupt):
                    raise typer.Exit(130) from None
            raise
    if as_json:
        print_json({"run": str(run.folder)}, found, {"seconds": run.record["seconds"], "pictures": pictures})
        return
    print_evaluation(run.folder, found)
    for picture in pictures:
        out.print(f"  wrote {picture}")
    if pictures:
        out.print(f"open {next((one for one in pictures if one.endswith('interpolation.png')), pictures[0])}")
