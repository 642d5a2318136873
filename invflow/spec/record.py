"""What ``run.json`` says of the training that left a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import RunError
from .training import Training

RUN_FILE = "run.json"
_LARGEST = 2**20


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of ``run.json``; None if the folder has none. Raise RunError if it cannot be read."""
    path = folder / RUN_FILE
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(_LARGEST))
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    return record


def unfinished(record: dict[str, Any] | None, training: Training | None) -> str | None:
    """Why the training of a run did not reach its end, in words; None if it did, or if there was none."""
    if record is None or record.get("status") == "finished":
        return None
    options = training or Training()
    unit, length = ("steps", options.steps) if options.epochs is None else ("epochs", options.epochs)
    done = f"the weights are those after {record.get(f'{unit}_done', 0)} of {length} {unit}"
    if record.get("status") == "diverged":
        return f"{record.get('why', 'training diverged')}; {done}"
    return f"training was interrupted, or goes on; {done}"
