"""The command line. Heavy libraries load only in the verbs that use them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import statistics
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import TyperException

from .bijections.residual import NotConverged
from .errors import InvflowError
from .plugins import load_plugin
from .tables import out, print_conditioning, print_memory, print_reconstructions, print_thorough, wide

app = typer.Typer(
    name="invflow",
    help="Declarative invertible neural networks: check, train, invert.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
err = Console(stderr=True, highlight=False)


def _load_plugins(paths: list[Path] | None) -> list[Path] | None:
    for path in paths or ():
        load_plugin(path)
    return paths


SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="A spec's JSON file, or the folder of a run.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, as 'invflow train' writes it.")]
DataRoot = Annotated[Path | None, typer.Option(help="The torchvision root of the data; default: INVFLOW_DATA.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch an absent data set into the data root.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON on stdout, all else on stderr.")]
Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        metavar="FILE",
        callback=_load_plugins,
        is_eager=True,
        help="A Python file that registers layers, nets, heads or priors.",
    ),
]
Epochs = Annotated[int | None, typer.Option(help="Instead of the spec's.")]
LearningRate = Annotated[float | None, typer.Option(help="Instead of the spec's.")]
TrainSize = Annotated[int | None, typer.Option(help="Instead of the spec's.")]


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; ends the process with its exit status: 2 with one line for a user's mistake."""
    with warnings.catch_warnings():
        warnings.showwarning = functools.partial(_warn, warnings.showwarning)
        try:
            status = app(arguments or sys.argv[1:] or ["--help"], standalone_mode=False)
        except TyperException as error:
            status = _complain(error.format_message())
        except InvflowError as error:
            status = _complain(str(error))
        except OSError as error:
            where = "" if error.filename is None else f"{error.filename}: "
            status = _complain(f"{where}{error.strerror or error}")
    sys.exit(status if isinstance(status, int) else 0)


def _warn(otherwise: Any, message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Prints a warning of this library as one line, without the place in the code that it came from."""
    if issubclass(category, NotConverged):
        err.print(f"invflow: {message}", markup=False, soft_wrap=True)
    else:
        otherwise(message, category, *where, **more)


def _complain(message: str) -> int:
    """Prints one line for a user's mistake and returns its exit status."""
    err.print(f"invflow: {message}", markup=False, soft_wrap=True)
    return 2


@app.command()
def train(
    spec: Annotated[Path | None, typer.Argument(metavar="SPEC", help="The spec's JSON file.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with an interrupted run.")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="The run folder; default: runs/NAME-TIME.")] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the spec's.")] = None,
    epochs: Epochs = None,
    lr: LearningRate = None,
    train_size: TrainSize = None,
    data_root: DataRoot = None,
    download: Download = False,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Train the classifier or the flow that a spec describes, evaluate it, and draw what it does."""
    from .spec import load_spec
    from .training import run as runs
    from .training.illustrate import illustrate

    overrides = {"seed": seed, "epochs": epochs, "lr": lr, "train_size": train_size}
    if (spec is None) == (resume is None):
        raise InvflowError("train expects a SPEC, or --resume RUN, and not both")
    if resume is not None and (to is not None or any(value is not None for value in overrides.values())):
        raise InvflowError("--resume goes on with what the run was started with: no --out, --seed, --epochs, --lr, ...")
    folder = resume
    with _stdout_for_the_answer(as_json):
        try:
            if resume is not None:
                run = runs.resume(resume, data_root=data_root, download=download)
            else:
                document = load_spec(spec)  # type: ignore[arg-type]
                folder = to or _new_folder(runs.folder_name(document))
                run = runs.train(document, folder, data_root=data_root, download=download, overrides=overrides)
            found, pictures = illustrate(run, data_root)
        except KeyboardInterrupt:
            if folder is None or not (folder / runs.RUN_FILE).is_file():
                raise
            err.print(f"interrupted; go on with: invflow train --resume {folder}", markup=False, soft_wrap=True)
            raise typer.Exit(130) from None
    answer = {"run": str(run.folder), **_evaluation(found), "seconds": run.record["seconds"], "pictures": pictures}
    if as_json:
        _print_json(answer)
        return
    _print_evaluation(run.folder, found)
    for picture in pictures:
        out.print(f"  wrote {picture}", markup=False, soft_wrap=True)


@app.command()
def evaluate(
    run: RunPath,
    data_root: DataRoot = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Test accuracy or likelihood of a trained run, and how exactly it runs backwards."""
    from .training.evaluate import evaluate_run
    from .training.run import Run

    with _stdout_for_the_answer(as_json):
        found = evaluate_run(Run.open(run), data_root)
    if as_json:
        _print_json({"run": str(run), **_evaluation(found)})
    else:
        _print_evaluation(run, found)


@app.command()
def freeze(
    run: RunPath,
    mode: Annotated[str, typer.Option(help="exact, grid or snap.")] = "exact",
    frac_bits: Annotated[int | None, typer.Option(help="The grid is the multiples of 2^-FRAC_BITS.")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="The new run folder; default: RUN-MODE.")] = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Make a trained run exact: another run, whose images come back without one wrong bit; measure it."""
    from pydantic import TypeAdapter, ValidationError

    from .fields import describe
    from .numerics import Numerics
    from .training.freeze import freeze_run
    from .training.run import Run

    said = {"mode": mode} | ({} if frac_bits is None else {"frac_bits": frac_bits})
    try:
        numerics: Any = TypeAdapter(Numerics).validate_python(said)
    except ValidationError as error:
        raise InvflowError(f"freeze: {describe(error.errors(include_url=False)[0])}") from None
    with _stdout_for_the_answer(as_json):
        folder = to or run.with_name(f"{run.resolve().name}-{mode}")
        frozen, found = freeze_run(Run.open(run), folder, numerics, data_root)
    if as_json:
        _print_json({"run": str(frozen.folder), "numerics": numerics.model_dump(), **dataclasses.asdict(found)})
        return
    out.print(f"run {frozen.folder}", markup=False, soft_wrap=True)
    out.print(f"  test accuracy {found.accuracy_after:.2%}, before {found.accuracy_before:.2%}")
    for way, count in found.bit_equal.items():
        out.print(f"  {count:,} of {found.images:,} test images come back bit-equal: {way}", soft_wrap=True)


@app.command()
def compare(
    specs: Annotated[list[Path], typer.Argument(metavar="SPEC...", help="The specs' JSON files.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many trainings of each spec: seeds 0, 1, ...")] = 3,
    to: Annotated[
        Path | None, typer.Option("--out", help="Where runs and plot go; default: runs/compare-TIME.")
    ] = None,
    epochs: Epochs = None,
    lr: LearningRate = None,
    train_size: TrainSize = None,
    data_root: DataRoot = None,
    download: Download = False,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Train several specs with several seeds each, and compare them in a table and a plot."""
    from .diagnostics.pictures import comparison, write_figure
    from .spec import load_spec
    from .training.compare import compare as run_all

    loaded = [(str(path), load_spec(path)) for path in specs]
    folder = to or _new_folder("compare")
    overrides = {"epochs": epochs, "lr": lr, "train_size": train_size}
    with _stdout_for_the_answer(as_json):
        found = run_all(
            loaded,
            seeds,
            folder,
            overrides=overrides,
            announce=lambda line: err.print(line, markup=False),
            data_root=data_root,
            download=download,
        )
        plot = folder / "comparison.png"
        score = found.score
        drawn = [
            {"name": Path(row.spec).stem, "parameters": row.parameters, "scores": found.values(row)}
            for row in found.rows
        ]
        label = f"test {score.label},{score.unit if score.unit[:1].isspace() else ' ' + score.unit}"
        write_figure(comparison(drawn, label, digits=score.digits, narrowest=score.narrowest), plot)
    if as_json:
        _print_json([row.as_json() for row in found.rows])
        return
    table = Table("spec", "parameters", f"test {score.label}", "round-trip error", "seconds")
    for row in found.rows:
        known = [value for value in row.scores[f"test_{score.name}"] if math.isfinite(value)]
        text = score.text(statistics.mean(known)) if known else ""
        if len(known) > 1:
            text += f" ± {score.factor * statistics.stdev(known):.{score.digits}f}"
        lost = len(row.scores[f"test_{score.name}"]) - len(known)
        text += f"{', ' * bool(text)}{lost} diverged" if lost else ""
        error = "not invertible" if row.round_trip_error is None else f"{row.round_trip_error:.1e}"
        seconds = f"{statistics.mean(row.seconds):.0f}" if row.seconds else ""
        table.add_row(row.spec, f"{row.parameters:,}", text, error, seconds)
    out.print(table)
    out.print(f"wrote {plot}", markup=False, soft_wrap=True)


@app.command()
def check(
    spec: SpecPath,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Every property of every layer and of the chain; error by depth.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="How well training in constant memory reconstructs each layer's input.")
    ] = False,
    conditioning: Annotated[
        bool, typer.Option("--conditioning", help="Lipschitz constants, singular values, the error they predict.")
    ] = False,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Shapes, parameters and round-trip error of every layer; exit status 1 where a layer does not run backwards."""
    from .diagnostics.check import chain_of
    from .diagnostics.check import check as run_check
    from .diagnostics.memory import reconstructions

    chain = chain_of(spec)
    report = run_check(chain)
    found = _check_thoroughly(chain) if thorough else None
    rebuilt = reconstructions(chain) if memory else None
    stretches = _measure_conditioning(chain) if conditioning else None
    if as_json:
        more = {} if found is None else {"thorough": dataclasses.asdict(found)}
        more |= {} if rebuilt is None else {"reconstruction_error": rebuilt}
        more |= {} if stretches is None else {"conditioning": dataclasses.asdict(stretches)}
        _print_json({"spec": str(spec), **dataclasses.asdict(report), **more})
    else:
        columns = list(report.round_trip_error)
        table = Table("", "layer", "in", "out", "parameters", "exactness", *columns)
        for layer in report.layers:
            errors = [f"{layer.round_trip_error[column]:.1e}" for column in columns]
            shapes = (str(layer.input_shape), str(layer.output_shape))
            table.add_row(
                layer.name.removeprefix("layers."),
                layer.layer,
                *shapes,
                f"{layer.parameters:,}",
                layer.exactness,
                *errors,
            )
        table.add_section()
        errors = [f"{error:.1e}" for error in report.round_trip_error.values()]
        table.add_row("", "whole chain", "", "", f"{report.parameters:,}", report.exactness, *errors)
        wide(out).print(table)
        if found is not None:
            print_thorough(found)
        if rebuilt is not None:
            print_reconstructions(rebuilt)
        if stretches is not None:
            print_conditioning(stretches)
        if found is not None and not found.ok:
            out.print("failed: a property does not hold")
        elif stretches is not None and not stretches.ok:
            out.print("failed: a Lipschitz constant exceeds its bound")
        else:
            how = "to rounding" if report.exactness == "float" else "without one wrong bit"
            how += "" if report.surjective else ", on its image only: it adds dimensions"
            out.print(f"ok: it runs backwards {how}" if report.ok else f"failed: it does not run backwards {how}")
    sound = report.ok and all(further is None or further.ok for further in (found, stretches))
    raise typer.Exit(0 if sound else 1)


def _check_thoroughly(chain: Any) -> Any:
    from .testing.thorough import check_thoroughly

    with err.status("checking") as status:
        return check_thoroughly(chain, lambda line: status.update(f"checking {line}"))


def _measure_conditioning(chain: Any) -> Any:
    from .diagnostics.conditioning import conditioning

    with err.status("measuring") as status:
        return conditioning(chain, lambda line: status.update(f"measuring {line}"))


@app.command()
def show(
    spec: SpecPath,
    expanded: Annotated[bool, typer.Option("--expanded", help="Print the spec without repeat and variables.")] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="The activation memory of training, by layer and backprop policy.")
    ] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Instead of the training's batch size.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="With --memory: train a step of each, too.")] = False,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """A spec's layers with the shapes as they flow, its expansion, or the memory that training takes."""
    from .spec import build, build_model
    from .spec.text import printable

    document = _load_document(spec)
    if expanded:
        _print_json(document.expanded)
        return
    if not memory and (batch is not None or measure or as_json):
        raise InvflowError("--batch, --measure and --json go with --memory")
    if memory:
        _show_memory(spec, document, batch, measure, as_json)
        return
    model = build_model(document) if document.head or document.prior else build(document)
    count = sum(weight.numel() for weight in model.parameters())
    out.print(f"{printable(document.name or str(spec))}: {count:,} parameters, hash {document.hash[:16]}", markup=False)
    out.print(repr(model), markup=False, soft_wrap=True)


def _show_memory(spec: Path, document: Any, batch: int | None, measure: bool, as_json: bool) -> None:
    from .diagnostics.memory import memory
    from .spec import build
    from .spec.training import Training

    size = batch or (document.training or Training()).batch_size
    found = memory(build(document), size, log_det=document.prior is not None, measure=measure)
    if as_json:
        _print_json({"spec": str(spec), **dataclasses.asdict(found)})
        return
    print_memory(found, size)


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(metavar="A", help="A spec's JSON file, or the folder of a run.")],
    new: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    plugin: Plugins = None,
) -> None:
    """What differs between two specs, expanded, layer by layer; exit status 1 where anything does."""
    from .spec.diff import diff_specs

    lines = diff_specs(_load_document(old), _load_document(new))
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
    raise typer.Exit(1 if lines else 0)


@app.command()
def schema(
    plugin: Plugins = None,
) -> None:
    """The JSON Schema of specs, with everything that is registered or installed: for editors."""
    from .registry import REGISTRIES
    from .spec.schema import json_schema

    with _stdout_for_the_answer(True):
        broken = [error for registry in REGISTRIES for error in registry.load_plug_ins()]
        document = json_schema()
    for error in broken:
        err.print(f"left out: {error}", markup=False, soft_wrap=True)
    _print_json(document)


@app.command("plot-psi")
def plot_psi(
    spec: SpecPath,
    images: Annotated[int, typer.Option(min=1, max=10, help="How many images.")] = 3,
    to: Annotated[Path, typer.Option("--out", help="The picture to write.")] = Path("psi.png"),
    data_root: DataRoot = None,
    download: Download = False,
    plugin: Plugins = None,
) -> None:
    """Images and the channels that the spec's first psi makes of them."""
    from .diagnostics.check import chain_of
    from .diagnostics.pictures import first_psi, psi_channels, write_figure
    from .spec.training import Training
    from .training.data import load_data

    document = _load_document(spec)
    psi = first_psi(chain_of(spec))
    if psi is None:
        raise InvflowError(f"{spec}: plot-psi expects a spec with a psi layer, got one without")
    data = load_data((document.training or Training()).data, data_root, download=download)
    write_figure(psi_channels(data.test.values[:images], psi), to)
    out.print(f"wrote {to}", markup=False, soft_wrap=True)


@app.command("plot-solver")
def plot_solver(
    spec: SpecPath,
    to: Annotated[Path, typer.Option("--out", help="The picture to write.")] = Path("solver.png"),
    plugin: Plugins = None,
) -> None:
    """How fast the inverses of the spec's residual blocks are found: error against evaluations, for each method."""
    from .diagnostics.check import chain_of, inputs
    from .diagnostics.pictures import write_figure
    from .diagnostics.solver_plot import inverse_errors, solver_plot

    chain = chain_of(spec)
    blocks = inverse_errors(chain, *inputs(chain))
    if not blocks:
        raise InvflowError(f"{spec}: plot-solver expects a spec with a residual layer, got one without")
    write_figure(solver_plot(blocks), to)
    out.print(f"wrote {to}", markup=False, soft_wrap=True)


@app.command()
def interpolate(
    run: RunPath,
    pairs: Annotated[int, typer.Option(min=1, max=20, help="How many pairs of test images.")] = 5,
    steps: Annotated[int, typer.Option(min=2, max=50, help="How many images from one to the other.")] = 9,
    to: Annotated[Path | None, typer.Option("--out", help="The folder to write to; default: RUN/pictures.")] = None,
    data_root: DataRoot = None,
    plugin: Plugins = None,
) -> None:
    """Walk from one test image to another on a straight line in feature space, back to pixels: a strip and a GIF."""
    from .training.data import load_data
    from .training.illustrate import draw_interpolation
    from .training.run import PICTURES, Run

    opened = Run.open(run)
    data = load_data(opened.training.data, data_root)
    for picture in draw_interpolation(opened.load(), data, pairs, steps, to or run / PICTURES):
        out.print(f"wrote {picture}", markup=False, soft_wrap=True)


@app.command()
def sample(
    run: RunPath,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="Below 1: closer to what is most likely.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Another one draws other samples.")] = 0,
    to: Annotated[Path | None, typer.Option("--out", help="The picture; default: RUN/pictures/drawn.png.")] = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Draw samples from a trained flow: a picture of them or, with --json, the numbers and their log-densities."""
    from .diagnostics.pictures import write_figure
    from .training.data import load_data
    from .training.run import PICTURES, Run
    from .training.tasks import Density, task_of

    with _stdout_for_the_answer(as_json):
        opened = Run.open(run)
        task = task_of(opened.load(), load_data(opened.training.data, data_root))
        if not isinstance(task, Density):
            raise InvflowError(f"{run}: sample expects the run of a flow, a spec with a prior, got a classifier's")
        drawn = task.draw(count, temperature=temperature, seed=seed)
        if not as_json:
            to = to or run / PICTURES / "drawn.png"
            write_figure(task.picture(drawn), to)
    if as_json:
        log_prob = task.log_prob(drawn)
        _print_json({"run": str(run), "samples": drawn.tolist(), "log_prob": log_prob.tolist()})
    else:
        out.print(f"wrote {to}", markup=False, soft_wrap=True)


def _load_document(source: Path) -> Any:
    """The Spec in a file, or of a run or checkpoint folder."""
    from .spec import load_spec
    from .spec.checkpoint import SPEC_FILE

    return load_spec(source / SPEC_FILE if source.is_dir() else source)


def _evaluation(found: Any) -> dict[str, Any]:
    """An Evaluation as JSON data."""
    answer = dataclasses.asdict(found)
    answer["round_trips"] = {" ".join(key): dataclasses.asdict(trip) for key, trip in found.round_trips.items()}
    return answer


def _print_evaluation(run: Path, found: Any) -> None:
    out.print(f"run {run}", markup=False, soft_wrap=True)
    out.print(f"  {found.summary()}, {found.parameters:,} parameters")
    if not found.invertible:
        out.print("  not invertible up to its last layer: the head has hidden layers; of the trunk below it:")
    for (dtype, mode), trip in found.round_trips.items():
        out.print(
            f"  round-trip error, {dtype}, {mode} mode: {trip.relative:.1e} relative, {trip.bit_equal:.0%} bit-equal"
        )


def _new_folder(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _print_json(answer: Any) -> None:
    print(json.dumps(_finite(answer), indent=2, allow_nan=False))


def _finite(answer: Any) -> Any:
    """JSON has no NaN and no infinity: null says that there is no number."""
    if isinstance(answer, dict):
        return {key: _finite(value) for key, value in answer.items()}
    if isinstance(answer, list | tuple):
        return [_finite(value) for value in answer]
    return None if isinstance(answer, float) and not math.isfinite(answer) else answer


@contextlib.contextmanager
def _stdout_for_the_answer(as_json: bool) -> Iterator[None]:
    """With ``--json``, whatever libraries print while they work goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield
