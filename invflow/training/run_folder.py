"""Runs: a training and the folder that holds all of it.

A run folder is a checkpoint (``spec.json`` and its weights, so `invflow.load` reads it). It also has ``best/``, another
checkpoint, ``run.json`` (overrides, versions, results), ``logs/`` (CSV and TensorBoard), ``resume/`` (the state from
which an interrupted training goes on, see `saving`) and ``pictures/``. A spec in exact numerics is trained in float and
frozen at the end: the float model stays in ``float/``, and the one in ``best/`` is float too. Each file is written
beside its target and renamed, so that an interruption or a full disk leaves a folder to read and to resume; only
TensorBoard's events, which nothing here reads, are appended to.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import html
import json
import math
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..errors import DataError, RunError
from ..fields import describe, shortened
from ..files import locked, write_atomically
from ..models import Classifier, Flow
from ..samples import DataSet
from ..spec.checkpoint import SPEC_FILE, load, read_checkpoint_spec, write_checkpoint
from ..spec.document import Spec
from ..spec.record import RUN_FILE, read_record, unfinished
from ..spec.text import JsonPath
from ..spec.training import Data, Training
from .data import load_data

if TYPE_CHECKING:
    from ..diagnostics.figure import Figure

PICTURES = "pictures"
_OWNER = ".training"


class Metrics(list[dict[str, float]]):
    """The metrics of a training, one row per epoch, which is counted from 0."""

    @property
    def columns(self) -> list[str]:
        """The names of the metrics, the epoch first."""
        return list(dict.fromkeys(["epoch", *(name for row in self for name in row)]))

    def column(self, name: str) -> list[float | None]:
        """A metric by epoch; None where it was not measured."""
        return [row.get(name) for row in self]

    def __repr__(self) -> str:
        return f"Metrics({len(self)} epochs: {', '.join(self.columns)})"

    def _repr_html_(self) -> str:
        def cells(tag: str, texts: list[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

        rows = [["" if (one := row.get(name)) is None else f"{one:.6g}" for name in self.columns] for row in self]
        return "<table>" + cells("th", self.columns) + "".join(cells("td", row) for row in rows) + "</table>"


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: its path.
        spec: the spec that it trains, with its overrides.
        record: the content of ``run.json``.

    Examples:
        >>> import tempfile, invflow
        >>> spec = {
        ...     "input": {"shape": [2]}, "layers": [{"type": "affine"}], "prior": {"type": "standard_normal"},
        ...     "training": {"data": {"name": "moons", "train_size": 200, "test_size": 100}, "epochs": 1},
        ... }
        >>> run = invflow.train(spec, tempfile.mkdtemp(), progress=False)
        >>> opened = invflow.open_run(run.folder)
        >>> opened.load().shape, sorted(opened.metrics[-1])[:1]
        ((2,), ['epoch'])
    """

    folder: Path
    spec: Spec
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Open a folder that `train` or `invflow.save` wrote. Raise RunError if there is no model in it."""
        record = read_record(folder)
        if record is None and not (folder / SPEC_FILE).is_file():
            raise RunError(f"{folder}: no run here: expected a folder that 'invflow train' or invflow.save wrote")
        return cls(folder, read_checkpoint_spec(folder)[0], record or {})

    @functools.cached_property
    def model(self) -> Classifier | Flow:
        """The trained model, in eval mode, read once."""
        return self.load().eval()

    @property
    def training(self) -> Training:
        """The spec's training block, or its defaults."""
        return self.spec.training or Training()

    @property
    def unfinished(self) -> str | None:
        """Why the training of the model did not reach its end, in words; None if it did."""
        return unfinished(self.record or None, self.spec.training)

    def load(self) -> Classifier | Flow:
        """The trained model, with the weights of the last evaluation. Warn if its training did not reach its end."""
        model = load(self.folder)
        if not isinstance(model, Classifier | Flow):
            raise RunError(f"{self.folder}: a chain without a head or a prior: nothing to evaluate")
        return model

    def data(self, data_root: Path | None = None, named: dict[str, Any] | None = None) -> DataSet:
        """The data set of its spec, or another one that a document names.

        Args:
            data_root: see `load_data`.
            named: the other one, as in a spec.

        Raises:
            DataError: the data are missing, or do not fit the model.
        """
        options = self.training.data if named is None else parsed_data(named)
        found = load_data(options, data_root, folder=self.data_folder)
        if found.shape != self.spec.input_shape or found.context_shape != self.spec.context_shape:
            raise DataError(f"{self.folder}: {misfit(self.spec, found, named is None)[1]}")
        return found

    @property
    def data_folder(self) -> Path | None:
        """The folder of the spec that was trained, to which the paths of its data are relative."""
        known = self.record.get("data_folder")
        return Path(known) if isinstance(known, str) else None

    def update(self, **entries: Any) -> None:
        """Add entries to ``run.json``."""
        self.record.update(entries)
        write_atomically(self.folder / RUN_FILE, json.dumps(self.record, indent=2).encode() + b"\n")

    @property
    def metrics(self) -> Metrics:
        """One row per epoch, from the CSV logs of a run and its resumptions; a later log overrides an earlier one."""
        rows: dict[int, dict[str, float]] = {}
        logs = self.folder.glob("logs/csv/version_[0-9]*/metrics.csv")
        for log in sorted(logs, key=lambda path: int(path.parent.name.removeprefix("version_"))):
            for row in csv.DictReader(log.read_text().splitlines()):
                known = {name: float(value) for name, value in row.items() if value}
                # Version 0.2 logged the final evaluation under an epoch that does not exist.
                known["epoch"] = min(known["epoch"], (self.training.epochs or math.inf) - 1)
                rows.setdefault(int(known["epoch"]), {}).update(known)
        return Metrics(rows[epoch] for epoch in sorted(rows))

    def plot(self) -> Figure:
        """The training curves."""
        from ..diagnostics.pictures import training_curves

        return training_curves(self.metrics)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.unfinished or self.record.get('status', 'saved by a program')})"


def begin(folder: Path, document: dict[str, Any], model: Classifier | Flow, record: dict[str, Any]) -> Run:
    """Write a new run into a folder that is owned. Raise RunError if it's not empty; after an error, nothing stays."""
    require_empty(folder)
    try:
        write_checkpoint(document, model.state_dict(), folder)
        run = Run(folder, read_checkpoint_spec(folder)[0], {})
        run.update(**record)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return run


def require_empty(folder: Path) -> None:
    """Raise RunError if a folder is not empty."""
    if folder.exists() and (not folder.is_dir() or any(path.name != _OWNER for path in folder.iterdir())):
        raise RunError(f"{folder}: exists already; name another folder with --out, or resume it with --resume")


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold a run folder, which is created if necessary.

    Raises:
        RunError: another process holds it, or it cannot be written.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / _OWNER, wait=False))
        except BlockingIOError:
            found = "another process writes this run; wait until it has ended, or name another folder with --out"
            raise RunError(f"{folder}: {found}") from None
        except OSError as error:
            raise RunError(f"{folder}: a run is written there, which is not possible: {error.strerror}") from None
        yield


def folder_name(spec: Spec) -> str:
    """A folder name for a spec: its own name without characters that lead elsewhere; the spec may be a stranger's."""
    return re.sub(r"[^\w.-]+", "-", spec.name or "").strip(".-")[:60] or "run"


def new_folder(name: str) -> Path:
    """The default folder of a training, a new one at each call."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def parsed_data(named: dict[str, Any]) -> Data:
    """The options of a data set in a document. Raises DataError for those that no spec could have."""
    try:
        return Data.model_validate_json(json.dumps(named))
    except (ValidationError, TypeError) as error:
        first = describe(error.errors(include_url=False)[0]) if isinstance(error, ValidationError) else str(error)
        raise DataError(f"the data {shortened(named)}: {first}") from None


def misfit(spec: Spec, data: DataSet, by_spec: bool) -> tuple[JsonPath, str]:
    """Where a spec does not fit data of another shape, and what is wrong.

    Args:
        spec: the spec.
        data: the data.
        by_spec: whether the spec names the data, or leaves them to the default.
    """
    if spec.input_shape != data.shape:
        kind = "images" if data.holds_images else "points" if data.shape == (2,) else "samples"
        message = f"{data.name} has {kind} of shape {data.shape}, the spec expects {spec.input_shape}"
        if by_spec and (spec.training is None or "name" not in spec.training.data.model_fields_set):
            other = 'name others in the training block, "data": {"name": ...}, or with --data'
            message += f"; {data.name} is the default: {other}"
        return ("input", "shape"), message
    place: JsonPath = ("input", "context_shape")
    there, wanted = data.context_shape, spec.context_shape
    if there is None:
        hint = 'name one in training.data, such as "context": "labels"'
        return place, f"{data.name} gives no context to train with; {hint}"
    expects = "no context_shape" if wanted is None else f"the context_shape {json.dumps(wanted)}"
    return place, f"{data.name} gives a context of shape {json.dumps(there)}, but the input has {expects}"
