"""``invflow train``."""

from __future__ import annotations

import contextlib
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..errors import InvflowError
from .options import (
    AsJson,
    BatchSize,
    DataName,
    DataRoot,
    Download,
    Epochs,
    LearningRate,
    Plugins,
    Steps,
    TrainSize,
    named_data,
)
from .output import err, out, print_evaluation, print_json, stdout_for_the_answer

if TYPE_CHECKING:
    from ..diagnostics.walks import Walks
    from ..training.run_folder import Run


T = TypeVar("T")


def train(
    spec: Annotated[Path | None, typer.Argument(metavar="SPEC", help="The spec's JSON file.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Resume an interrupted run.")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="The run folder; default: runs/NAME-TIME-ID.")] = None,
    seed: Annotated[int | None, typer.Option(help="Override the seed.")] = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    train_size: TrainSize = None,
    save_every: Annotated[
        str | None, typer.Option(metavar="STEPS|MINUTESm", help="Save that often, ends of epochs too; default: 5m.")
    ] = None,
    data: DataName = None,
    device: Annotated[
        str | None, typer.Option("--device", "--accelerator", help="Where to train: auto, cpu, cuda, cuda:1 or mps.")
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Processes on each machine, each with its own device.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines, each of which starts this command.")] = None,
    strategy: Annotated[str | None, typer.Option(help="ddp shares the work, fsdp the weights too.")] = None,
    precision: Annotated[str | None, typer.Option(help="32, 64 or bf16-mixed.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Take each batch in so many parts.")] = None,
    clip_gradient: Annotated[float | None, typer.Option(help="Override the largest norm of the gradients.")] = None,
    early_stopping: Annotated[
        int | None, typer.Option(metavar="PATIENCE", help="End after so many evaluations without improvement.")
    ] = None,
    find_lr: Annotated[bool, typer.Option("--find-lr", help="Find the learning rate by a short trial.")] = False,
    compile_it: Annotated[bool, typer.Option("--compile", help="Compile the model.")] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Use deterministic algorithms alone.")] = False,
    profile: Annotated[str | None, typer.Option(help="Measure the time: simple, advanced or pytorch.")] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no HTML page about the run.")] = False,
    data_root: DataRoot = None,
    download: Download = False,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Train the classifier or the flow that a spec describes.

    Then evaluate it, draw pictures and write an HTML page about it.
    """
    from ..spec import load_spec
    from ..spec.record import RUN_FILE
    from ..training import run as runs
    from ..training.illustrate import illustrate
    from ..training.processes import leads, one_tells
    from ..training.run_folder import folder_name, new_folder

    overrides = {
        "data": named_data(data),
        "seed": seed,
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "train_size": train_size,
        "precision": int(precision) if precision is not None and precision.isdecimal() else precision,
        "accumulate": accumulate,
        "clip_gradient": clip_gradient,
        "early_stopping": None if early_stopping is None else {"patience": early_stopping},
        "find_lr": find_lr or None,
        "compile": compile_it or None,
        "deterministic": deterministic or None,
        "profile": profile,
    }
    hardware = {"accelerator": device, "devices": devices, "nodes": nodes, "strategy": strategy}
    if (spec is None) == (resume is None):
        raise InvflowError("train expects a SPEC, or --resume RUN, and not both")
    if resume is not None and (to is not None or any(value is not None for value in overrides.values())):
        raise InvflowError("--resume keeps the options that the run was started with: no --out, --seed, --epochs, ...")
    folder = resume
    options: dict[str, Any] = {"data_root": data_root, "download": download}
    if save_every is not None:
        options["save_every"] = save_every
    with stdout_for_the_answer(as_json), _sigterm_raises(), one_tells():
        try:
            if resume is not None:
                run = runs.resume(resume, hardware=hardware, **options)
            elif spec is not None:
                document = load_spec(spec)
                folder = to or new_folder(folder_name(document))
                run = runs.train(document, folder, overrides=overrides | hardware, **options)
            if not leads():
                return
            found, pictures = illustrate(run, data_root, device or "auto")
            walks = _walks(run, data_root, device or "auto")
            page = None if no_report else _reported(run, data_root, device or "auto")
        except (KeyboardInterrupt, OSError) as error:  # Ctrl-C, SIGTERM, a full disk
            if folder is not None and (folder / RUN_FILE).is_file() and leads():
                more = [("--plugin", path) for path in plugin or ()]
                more += [("--data-root", data_root)] if data_root is not None else []
                again = ["invflow", "train", "--resume", folder, *(word for option in more for word in option)]
                err.print(f"interrupted; resume with: {shlex.join(map(str, again))}")
            if isinstance(error, KeyboardInterrupt):
                raise typer.Exit(143 if isinstance(error, _Terminated) else 130) from None
            raise
    if as_json:
        measured = {"walks": walks} if walks is not None else {}
        known = {"seconds": run.record["seconds"], "pictures": pictures, **measured, "report": page}
        print_json({"run": str(run.folder)}, found, known)
        return
    print_evaluation(run.folder, found)
    for picture in pictures:
        out.print(f"  wrote {picture}")
    for line in () if walks is None else walks.lines():
        out.print(line)
    if page is not None:
        out.print(f"open {page}")


def _walks(run: Run, data_root: Path | None, device: str) -> Walks | None:
    """What the walks between test images look like, if the training asked for walks among them."""
    from ..training.run import task_of_run
    from ..training.walking import measure_walks

    if run.training.midpoints is None:
        return None
    again = f"invflow interpolate {shlex.quote(str(run.folder))} --measure"
    return _if_possible("walks", again, lambda: measure_walks(task_of_run(run, data_root, device)))


def _reported(run: Run, data_root: Path | None, device: str) -> str | None:
    """The path of the report on a run."""
    from ..report.write import write_report

    again = f"invflow report {shlex.quote(str(run.folder))}"
    return _if_possible("report", again, lambda: str(write_report([run.open(run.folder)], None, data_root, device)))


def _if_possible(what: str, again: str, make: Callable[[], T]) -> T | None:
    """What is made of a finished training, which is not lost if it cannot be: then None, and a line says why."""
    try:
        return make()
    except (InvflowError, OSError) as error:
        why = str(error)
    except Exception as error:  # of a library, or of a layer that others wrote
        why = f"{type(error).__name__}: {error}"
    err.print(f"invflow: no {what}: {why}; try '{again}'")
    return None


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a training as Ctrl-C does."""


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Raise `_Terminated` at SIGTERM inside of the context, in the main thread."""

    def terminate(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
