"""States and shapes.

A *state* is a tensor or a (nested) tuple of tensors, dim 0 of each being the batch. A *shape* describes a state
without its batch: ``(1, 28, 28)``, or ``((8, 7, 7), (8, 7, 7))`` for a pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, TypeGuard, Union

import torch
from torch import Tensor, nn

from ._torch import constants
from .errors import ShapeError

State: TypeAlias = Union[Tensor, tuple["State", ...]]
Shape: TypeAlias = tuple[Union[int, "Shape"], ...]
TensorShape: TypeAlias = tuple[int, ...]
Path: TypeAlias = tuple[int, ...]
"""The place of a part of a state: one index for each nested tuple."""


def is_tensor_shape(shape: Any) -> TypeGuard[TensorShape]:
    """Whether ``shape`` describes a single tensor (and not a tuple state).

    Examples:
        >>> is_tensor_shape((1, 28, 28)), is_tensor_shape(((8,), (8,)))
        (True, False)
    """
    # Checks the first entry only, because this runs in every forward of some layers.
    return isinstance(shape, tuple) and (len(shape) == 0 or isinstance(shape[0], int))


def shape_of(state: State) -> Shape:
    """The shape of a state, without its batch.

    Examples:
        >>> shape_of((torch.zeros(5, 2), torch.zeros(5, 3)))
        ((2,), (3,))
    """
    if isinstance(state, tuple):
        return tuple(shape_of(part) for part in state)
    if not isinstance(state, Tensor):
        raise ShapeError(f"a state is a tensor or a tuple of tensors, got {type(state).__name__}")
    return tuple(state.shape[1:])


def leaf_shapes(shape: Shape) -> Iterator[TensorShape]:
    """The shapes of the tensors of a state, in order."""
    if is_tensor_shape(shape):
        yield shape
    else:
        for part in shape:
            yield from leaf_shapes(part)  # type: ignore[arg-type]


def leaf_paths(shape: State | Shape) -> list[Path]:
    """The paths of the tensors of a state, or of a state of this shape, in order.

    Examples:
        >>> leaf_paths(((8,), ((2,), (3,))))
        [(0,), (1, 0), (1, 1)]
    """
    if not isinstance(shape, tuple) or is_tensor_shape(shape):
        return [()]
    return [(i, *path) for i, part in enumerate(shape) for path in leaf_paths(part)]  # type: ignore[arg-type]


def leaves(state: Any) -> Iterator[Tensor]:
    """The tensors of a state, or of a context, in order."""
    if isinstance(state, tuple):
        for part in state:
            yield from leaves(part)
    elif isinstance(state, dict):
        yield from state.values()
    else:
        yield state


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """The state, or the context, with ``function`` applied to each of its tensors."""
    if isinstance(state, tuple):
        return tuple(map_state(function, part) for part in state)
    if isinstance(state, dict):
        return {name: function(entry) for name, entry in state.items()}  # a context
    return function(state)


def arranged(structure: Any, values: Iterable[Any]) -> Any:
    """The next values, in the structure of a state."""
    pieces = iter(values)
    return map_state(lambda _: next(pieces), structure)


def part_of(state: Any, path: Path) -> Any:
    """The part of a state, or of a shape, at a path.

    Examples:
        >>> part_of(((8,), ((2,), (3,))), (1, 0))
        (2,)

    Raises:
        ShapeError: the path leads into a tensor, or an index is out of range.
    """
    part = state
    for index in path:
        if not isinstance(part, tuple) or is_tensor_shape(part) or not -len(part) <= index < len(part):
            raise ShapeError(f"expected a state with a part at {list(path)}, got one {described(state)}")
        part = part[index]
    return part


def with_part(state: Any, path: Path, part: Any) -> Any:
    """A state, or a shape, with the part at an existing path replaced.

    Examples:
        >>> with_part(((8,), ((2,), (3,))), (1, 0), (5,))
        ((8,), ((5,), (3,)))
    """
    if not path:
        return part
    parts = list(state)
    parts[path[0]] = with_part(parts[path[0]], path[1:], part)
    return tuple(parts)


def described(state: Any) -> str:
    """``of shape (3,)``, for a message about a state or a shape."""
    return f"of shape {shape_of(state) if any(isinstance(leaf, Tensor) for leaf in leaves(state)) else state}"


def make_state(function: Callable[[TensorShape], Tensor], shape: Shape) -> State:
    """A state of the given shape, each tensor made by ``function`` from its own shape."""
    if is_tensor_shape(shape):
        return function(shape)
    return tuple(make_state(function, part) for part in shape)  # type: ignore[arg-type]


def zeros(
    shape: Shape, batch: int = 1, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> State:
    """A state of zeros.

    Examples:
        >>> [tuple(leaf.shape) for leaf in leaves(zeros(((2, 4), (3,)), batch=5))]
        [(5, 2, 4), (5, 3)]
    """
    return make_state(lambda leaf: torch.zeros((batch, *leaf), dtype=dtype, device=device), shape)


def batch_size(state: State) -> int:
    """The number of samples in a state."""
    return next(leaves(state)).shape[0]


def sample(state: Any, index: int) -> Any:
    """One sample of a state or a context, as a batch of one; None of None."""
    return None if state is None else map_state(lambda leaf: leaf[index : index + 1], state)


def flat_size(shape: Shape) -> int:
    """The number of numbers in one sample of a state."""
    return sum(math.prod(leaf) for leaf in leaf_shapes(shape))


def flatten(state: State) -> Tensor:
    """All tensors of a state flattened and concatenated: ``(batch, flat_size)``."""
    if isinstance(state, tuple):
        return torch.cat([leaf.flatten(1) for leaf in leaves(state)], dim=1)
    return state.flatten(1)


def unflatten(flat: Tensor, shape: Shape) -> State:
    """The inverse of `flatten`, for a state of this shape."""
    pieces = iter(torch.split(flat, [flat_size(leaf) for leaf in leaf_shapes(shape)], dim=1))
    return make_state(lambda leaf: (piece := next(pieces)).reshape(piece.shape[0], *leaf), shape)


def zero_log_det(state: State) -> Tensor:
    """The log-determinant of a volume-preserving map: zeros of shape ``(batch,)``, dtype and device of the state."""
    first = next(leaves(state))
    return first.new_zeros(first.shape[0])


_AUTOCAST = (torch.float16, torch.bfloat16, torch.float32)
"""What autocast converts into one another."""


def fitting_batch(state: Any, shape: Any, dtype: torch.dtype | None) -> int | None:
    """The number of samples in a batch of states of a shape and a dtype; None if this is no such batch.

    It runs in every call of a model.

    Args:
        state: whatever a user passed.
        shape: the shape to have; None for any.
        dtype: the dtype to have; None for any.

    Examples:
        >>> fitting_batch(torch.zeros(5, 2), (2,), torch.float32), fitting_batch(torch.zeros(2), (2,), None)
        (5, None)
    """
    if isinstance(state, Tensor):
        size = state.shape  # a slice of it would take longer than all of this
        fits = len(size) > 0 and (shape is None or (size[0], *shape) == size) and dtype in (None, state.dtype)
        return size[0] if fits else None
    if not isinstance(state, tuple) or (shape is not None and (is_tensor_shape(shape) or len(state) != len(shape))):
        return None
    batch = None
    for i, part in enumerate(state):
        found = fitting_batch(part, None if shape is None else shape[i], dtype)
        if found is None or batch not in (None, found):
            return None
        batch = found
    return batch


def require_state(who: str, shape: Shape | None, dtype: torch.dtype | None, state: Any) -> None:
    """Raises ShapeError if this is no batch of states of a shape and a dtype; None for any.

    Under autocast the dtypes that it converts are accepted too.
    """
    if fitting_batch(state, shape, dtype) is not None:
        return
    wanted = f"{who} expects a batch of states of shape {shape}" if shape is not None else f"{who} expects a state"
    for leaf in leaves(state):
        if not isinstance(leaf, Tensor):
            pairs = isinstance(leaf, list | tuple) and bool(leaf) and isinstance(leaf[0], Tensor)
            fix = "pass a tuple of tensors" if pairs else "pass a tensor, or a tuple of tensors"
            if type(leaf).__module__ == "numpy":
                fix = "convert it with torch.from_numpy"
            raise ShapeError(f"{wanted}, got {type(leaf).__name__}; {fix}")
    found = shape_of(state) if next(leaves(state), None) is not None else ()
    if fitting_batch(state, shape, None) is None:
        whole = map_state(lambda leaf: leaf[None], state)
        if shape is not None and fitting_batch(whole, shape, None) is not None:
            raise ShapeError(f"{wanted}, got one state without its batch; add a dimension in front, as x[None] does")
        if len(batches := {leaf.shape[0] for leaf in leaves(state) if leaf.dim()}) > 1:
            raise ShapeError(f"{wanted}, got tensors with batches of {sorted(batches)}")
        scalar = any(leaf.dim() == 0 for leaf in leaves(state))
        raise ShapeError(f"{wanted}, got " + ("a tensor without a batch" if scalar else f"shape {found}"))
    for leaf in leaves(state):
        converted = leaf.dtype in _AUTOCAST and not leaf.is_meta and torch.is_autocast_enabled(leaf.device.type)
        if dtype not in (None, leaf.dtype) and not converted:
            model = f", or the model with .to({leaf.dtype})" if leaf.is_floating_point() else ""
            raise ShapeError(
                f"{who} expects {dtype}, which its weights have, got {leaf.dtype}; convert it with .to({dtype}){model}"
            )


def common_dtype(module: nn.Module) -> torch.dtype | None:
    """The floating-point dtype of all weights; without weights that of the buffers or constants; None if not unique.

    Examples:
        >>> common_dtype(torch.nn.Linear(2, 2))
        torch.float32
    """
    for tensors in (module.parameters(), module.buffers(), dict(constants(module)).values()):
        found = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def require_tensor(who: str, shape: Shape, dims: int | None = None) -> TensorShape:
    """``shape`` itself if it is one tensor's (with ``dims`` dimensions besides the batch), else a ShapeError."""
    if not is_tensor_shape(shape):
        raise ShapeError(f"{who} expects one tensor, got a tuple state of shape {shape}; put a merge or an each before")
    if dims is not None and len(shape) != dims:
        kind = {1: "(features,)", 3: "(channels, height, width)"}.get(dims, f"of {dims} dimensions")
        raise ShapeError(f"{who} expects a shape {kind} besides the batch, got {shape}")
    return shape


def require_channels(who: str, shape: Shape, channels: int | None = None) -> TensorShape:
    """``shape`` itself if it is one tensor's with a channel dimension (of ``channels``), else a ShapeError."""
    extents = require_tensor(who, shape)
    if not extents:
        raise ShapeError(f"{who} expects a channel dimension besides the batch, got {shape}")
    if channels not in (None, extents[0]):
        raise ShapeError(f"{who} expects {channels} channels, got {extents[0]} in {shape}")
    return extents


def require_positions(who: str, shape: Shape, channels: int | None = None) -> TensorShape:
    """``shape`` itself if it is a sequence's, an image's or a volume's (of ``channels``), else a ShapeError."""
    extents = require_tensor(who, shape)
    if not 2 <= len(extents) <= 4:
        expected = "(channels, length), (channels, height, width) or (channels, depth, height, width)"
        raise ShapeError(f"{who} expects a shape {expected} besides the batch, got {shape}")
    return extents if channels is None else require_channels(who, extents, channels)


def require_pair(who: str, shape: Shape) -> tuple[Shape, Shape]:
    """``shape`` itself if it is a pair's, else a ShapeError."""
    if is_tensor_shape(shape) or len(shape) != 2:
        raise ShapeError(f"{who} expects a pair of states, got shape {shape}; put a split before")
    return shape[0], shape[1]  # type: ignore[return-value]
