"""Files of tensors that other codes wrote, read without running any code that is in them."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeGuard

import safetensors.torch
import torch
from torch import Tensor
from torch.serialization import safe_globals

from ..errors import CheckpointError

_MOST_CLASSES = 200


class _Empty:
    """Stands for an object of a class that is not loaded: it keeps its state, and runs no code of the class."""

    def __new__(cls, *arguments: Any, **options: Any) -> _Empty:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by key.

    Objects of classes that PyTorch does not know to be harmless become empty ones.

    Raises:
        CheckpointError: the file cannot be read, or it holds no state_dict.
    """
    found = _read(path)
    average: Any = None
    if isinstance(found, dict) and not _is_state_dict(found):
        average = found.get("ema")
        found = found.get("state_dict")
    if not _is_state_dict(found):
        raise CheckpointError(
            f"{path}: expected a state_dict, or a dict with one as 'state_dict'; a pickled model is not loaded, as it "
            "may run code: save model.state_dict()"
        )
    for key, tensor in found.items():
        _require_plain(path, key, tensor)
    if isinstance(average, _Empty):  # of an object that holds the tensors
        average = getattr(average, "state", None)
    if not isinstance(average, dict):  # a rate, for example
        return found
    average = average.get("shadow_params", average)
    for key, tensor in average.items() if _is_state_dict(average) else ():
        _require_plain(path, key, tensor)
    if not _is_state_dict(average) or not average.keys() <= found.keys():
        raise CheckpointError(f"{path}: the average of the weights, 'ema', has other keys than its state_dict")
    return {**found, **average}


def _is_state_dict(found: Any) -> TypeGuard[dict[str, Tensor]]:
    items = found.items() if isinstance(found, dict) else ()
    return bool(items) and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in items)


def _require_plain(path: Path, key: str, tensor: Tensor) -> None:
    """Refuses tensors that are no numbers in memory, and views whose size is not that of the file."""
    plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_complex() and tensor.is_cpu
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {key} is no plain tensor of numbers: save it as one, in float32")


def _read(path: Path) -> Any:
    """What a file holds, with an empty object for each one of a class that PyTorch does not know to be harmless."""
    names: list[str] = []
    try:
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise CheckpointError(f"{path}: compressed, which torch.save never writes, and may be of any size")
        while True:
            try:
                with safe_globals([(type("_Empty", (_Empty,), {}), name) for name in names]):
                    return torch.load(path, map_location="cpu", weights_only=True)
            except UnpicklingError as error:
                unknown = re.search(r"Unsupported global: GLOBAL (\S+\.\S+) was not", str(error))
                if unknown is None or len(names) == _MOST_CLASSES:
                    raise
                names.append(unknown[1])
    except CheckpointError:
        raise
    except UnpicklingError:
        raise CheckpointError(
            f"{path}: no file of tensors alone, or none that is read without running code of it: load it where you can "
            "trust it, and save a dict of tensors: its 'state_dict', and an average of weights as 'ema'"
        ) from None
    except Exception as error:  # an altered file may end anywhere in the reader
        kind = type(error).__name__
        raise CheckpointError(f"{path}: no file of tensors as torch.save or safetensors write it ({kind})") from None
