"""Checkpoint folders: weights and their spec, verified when they are loaded.

A folder holds ``weights-<digest>.safetensors`` and ``spec.json``, whose ``checkpoint`` block names that file. The
rename of ``spec.json`` commits the pair: a reader finds either the old one or the new one. Savers wait for one another.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError, InvflowError, UnfinishedWarning
from ..files import locked, write_atomically
from ..models import Classifier, Flow
from ..sequential import Sequential
from ..state import Shape
from .build import build, build_model
from .document import Spec, load_spec
from .dump import to_spec
from .limits import DEFAULT_LIMITS, Limits
from .nodes import CheckpointBlock
from .record import read_record, unfinished

SPEC_FILE = "spec.json"
_WEIGHTS = "weights-{}.safetensors"
_LOCK = ".saving"
_HEADER_BYTES = 100_000_000  # safetensors' own limit for the header of a file
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what layers compute in
_LARGEST_ITEM = 16  # bytes of the largest number that torch knows, a complex128


def save(model: Sequential | Classifier | Flow, folder: str | Path, *, input_shape: Shape | None = None) -> None:
    """Writes a chain, a classifier or a flow into a folder, which is created if necessary.

    A reader finds either the old checkpoint or the new one at any moment, even if the writing is interrupted. Several
    processes may save into one folder; the last one's model stays. A layer that occurs twice in a chain is loaded as
    two layers with equal weights.

    Args:
        model: what to save; its dtype is kept, and so are NaN.
        folder: where to; an existing checkpoint is replaced.
        input_shape: as in `to_spec`.

    Raises:
        SpecError: as in `to_spec`, or if the model cannot be built for this input.
        CheckpointError: the model built from its document has other weights, or its weights have several dtypes.

    Examples:
        >>> import tempfile, invflow
        >>> chain = invflow.build({"input": {"shape": [2]}, "layers": [{"type": "affine"}]})
        >>> folder = tempfile.mkdtemp()
        >>> save(chain, folder)
        >>> load(folder)[0].log_scale.tolist() == chain[0].log_scale.tolist()
        True
    """
    document, weights = to_spec(model, input_shape), model.state_dict()
    with torch.device("meta"):  # before anything is replaced: can it be loaded?
        again = _build(load_spec(document), DEFAULT_LIMITS)
    _check_fit(Path(folder), weights, again.state_dict())
    write_checkpoint(document, weights, folder)


def load(
    folder: str | Path, *, limits: Limits = DEFAULT_LIMITS, allow_nan: bool = False
) -> Sequential | Classifier | Flow:
    """The chain, the classifier or the flow that `save` wrote, in the dtype that it had.

    Warns if the folder is that of a run whose training did not reach its end.

    Args:
        folder: where it was saved.
        limits: as in `build`.
        allow_nan: whether weights may be NaN or infinite.

    Raises:
        CheckpointError: no checkpoint, one whose parts do not match or were altered, or weights that are not finite.
        SpecError: a spec that cannot be built.

    Examples:
        >>> import tempfile
        >>> load(tempfile.mkdtemp())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        invflow.errors.CheckpointError: ...
    """
    folder = Path(folder)
    try:
        spec, block, file = _open(folder, limits)
        left = unfinished(read_record(folder), spec.training)
        with file:
            model = _build(spec, limits)
            expected = model.state_dict()
            most = _LARGEST_ITEM * sum(tensor.numel() for tensor in expected.values()) + _HEADER_BYTES
            payload = file.read(most + 1)  # bounded, whatever size the file claims
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: the weights cannot be read: {error.strerror}") from None
    if len(payload) > most:
        raise CheckpointError(f"{folder / block.weights}: larger than the weights of its spec can be")
    if left:
        warnings.warn(f"{folder}: {left}", UnfinishedWarning, stacklevel=2)
    tensors = _unpacked(payload, folder / block.weights, block.digest)
    _check_fit(folder / block.weights, tensors, expected)
    damaged = [] if allow_nan else [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if damaged:
        found = f"{damaged[0]!r} is NaN or infinite ({len(damaged)} of {len(tensors)} weights are)"
        raise CheckpointError(f"{folder / block.weights}: {found}; save a finite model, or load it with allow_nan=True")
    try:
        model.load_state_dict(tensors, assign=True)  # keeps the dtype that was saved
    except InvflowError as error:
        raise CheckpointError(f"{folder / block.weights}: these weights are refused: {error}") from None
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), None)
    for name, buffer in model.named_buffers():  # those that no checkpoint holds, such as another package's prior's
        if dtype is not None and name not in expected and buffer.is_floating_point():
            buffer.data = buffer.to(dtype)
    return model


def _build(spec: Spec, limits: Limits) -> Sequential | Classifier | Flow:
    return (build_model if spec.head or spec.prior else build)(spec, limits=limits)


def read_checkpoint_spec(folder: Path, limits: Limits = DEFAULT_LIMITS) -> tuple[Spec, CheckpointBlock]:
    """The spec in a checkpoint folder and the block that names its weights. Raises as `load` does."""
    path = folder / SPEC_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: no checkpoint here: expected a folder with {SPEC_FILE}, as written by save")
    spec = load_spec(path, limits=limits)
    block = spec.top.checkpoint
    if block is None:
        raise CheckpointError(f"{path}: no weights: this spec has no checkpoint block; build it instead of loading it")
    if block.hash != spec.declared_hash:
        raise CheckpointError(f"{path}: the layers were changed after the weights were saved; build it instead")
    return spec, block


def write_checkpoint(document: Mapping[str, Any], weights: Mapping[str, Tensor], folder: str | Path) -> None:
    """Writes weights and the document of the model they belong to."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Clones, because safetensors refuses tensors that share memory, such as those of a layer used twice.
    payload = safetensors.torch.save({name: tensor.detach().clone().contiguous() for name, tensor in weights.items()})
    digest = hashlib.sha256(payload).hexdigest()
    name = _WEIGHTS.format(digest[:16])
    plain = {key: value for key, value in document.items() if key != "checkpoint"}
    block = {"weights": name, "digest": digest, "hash": load_spec(plain).declared_hash}
    with locked(folder / _LOCK):
        write_atomically(folder / name, payload)
        write_atomically(folder / SPEC_FILE, json.dumps({**plain, "checkpoint": block}, indent=2).encode() + b"\n")
        # Files of earlier saves: their weights, and partial files if they were killed.
        for pattern in (_WEIGHTS.format("*"), f".{_WEIGHTS.format('*')}.*", f".{SPEC_FILE}.*"):
            for old in folder.glob(pattern):
                if old.name != name:
                    old.unlink(missing_ok=True)


def _open(folder: Path, limits: Limits) -> tuple[Spec, CheckpointBlock, BinaryIO]:
    """The spec of a checkpoint, the block that names its weights, and these, open: all of one save."""

    def read() -> tuple[Spec, CheckpointBlock, BinaryIO]:
        spec, block = read_checkpoint_spec(folder, limits)
        path = folder / block.weights
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: not a regular file, as written by save")
        return spec, block, path.open("rb")

    try:
        return read()
    except FileNotFoundError:  # a save may have replaced both after the spec was read: again, while nobody saves
        with locked(folder / _LOCK):
            return read()


def _unpacked(payload: bytes, path: Path, digest: str) -> dict[str, Tensor]:
    if hashlib.sha256(payload).hexdigest() != digest:
        raise CheckpointError(f"{path}: these are not the saved weights (their digest differs); copy them again")
    try:
        return safetensors.torch.load(payload)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from None


def _check_fit(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    dtypes: dict[torch.dtype, torch.dtype] = {}  # a cast gives all weights of one dtype the same other one
    for name in [*expected, *tensors]:
        if name not in tensors:
            raise CheckpointError(f"{path}: {name!r} of the spec's model is missing")
        if name not in expected:
            raise CheckpointError(f"{path}: the spec's model has no weight {name!r}")
        if tensors[name].shape != expected[name].shape:
            shapes = f"{tuple(expected[name].shape)}, got {tuple(tensors[name].shape)}"
            raise CheckpointError(f"{path}: {name!r} is expected to have shape {shapes}")
        built, found = expected[name].dtype, tensors[name].dtype
        wanted = dtypes.setdefault(built, found if {built, found} <= {*_FLOATS} else built)
        if found != wanted:
            raise CheckpointError(f"{path}: {name!r} is expected to have dtype {wanted}, got {found}")
