"""Weights of published networks, as the code of their papers saved them, for the specs of these networks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import constants
from ..bijections import Standardize
from ..errors import CheckpointError
from ..models import Classifier, Flow
from ..nets.lipschitz import LipschitzNet
from ..nets.spectral import SpectralConv, SpectralLinear
from .build import build_model
from .document import Spec, SpecSource, load_spec
from .layouts import LAYOUTS, Convert, Group, Kind, Layout, unchanged
from .tensor_file import read_state_dict

_WRAPPERS = ("module.", "_orig_mod.")
"""What `nn.DataParallel`, DDP and `torch.compile` put before every key."""
_ROOM = 1e-6
"""How far a bound is raised above the largest norm, relative to it: norms are found with that accuracy."""


@dataclass
class Imported:
    """The result of `import_weights`.

    Attributes:
        model: the model with the weights of the file, in eval mode.
        document: its document: the spec's, changed as ``changes`` say.
        layout: the code that saved the file.
        tensors: the number of tensors that were taken.
        left_out: keys of the file that are not taken, with the reason.
        changes: what had to be changed in the document, in words.
    """

    model: Classifier | Flow
    document: dict[str, Any]
    layout: str
    tensors: int
    left_out: dict[str, str]
    changes: list[str] = field(default_factory=list)


def import_weights(source: SpecSource, file: str | Path) -> Imported:
    """Builds the model of a spec and gives it the weights of an official checkpoint.

    Modules of each kind are paired in the order in which they compute; each pair must have the same shapes. Every key
    of the file is taken, compared with what the spec says, or named in the result. What follows from the weights, such
    as singular vectors, is computed again. If official norms had not converged and exceed the spec's `bound`, the bound
    is raised, so that the map stays the official one; the result says so, or that it cannot be.

    The file is read as tensors: objects of other classes are replaced by empty ones, no code of theirs runs, and a file
    that holds a pickled model instead of its state_dict is refused.

    Args:
        source: a spec of the same network, such as one below ``specs/published``.
        file: a file of `torch.save` or safetensors: a state_dict, or a dict that holds one as "state_dict"; an
            exponential average that is saved beside it as "ema" is preferred.

    Raises:
        SpecError: as in `build_model`.
        CheckpointError: the file cannot be read, or its layout is not known, or it is of another network.
    """
    spec, path = load_spec(source), Path(file)
    state = _without_wrapper(read_state_dict(path))
    layout = next((one for one in LAYOUTS if any(re.fullmatch(one.mark, key) for key in state)), None)
    if layout is None:
        known = ", ".join(one.name for one in LAYOUTS)
        some = ", ".join(itertools.islice(state, 3))
        raise CheckpointError(f"{path}: keys such as {some} are of no layout that is known: {known}")
    left = {key: why for key in state for pattern, why in layout.left_out.items() if re.fullmatch(pattern, key)}
    kept = {key: state[key] for key in sorted(state.keys() - left.keys(), key=layout.place)}
    document = {key: value for key, value in spec.document.items() if key not in ("$schema", "checkpoint")}
    found = Imported(_filled(spec, path, layout, kept), document, layout.name, len(kept), left)
    excess = _excess(found.model)
    if excess > 1:
        _keep_the_map(found, spec.expanded, excess * (1 + _ROOM))
    return found


def _filled(spec: Spec, path: Path, layout: Layout, state: Group) -> Classifier | Flow:
    """The model of a spec with these weights."""
    model = build_model(spec)
    translated = dict(_paired(path, layout, _groups(state), model))
    for key, tensor in translated.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: what becomes {key} is not finite")
    model.load_state_dict(translated, strict=False)  # all weights, as was checked, but not what follows from them
    return model.eval()  # which computes that


def _paired(path: Path, layout: Layout, groups: Mapping[str, Group], model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The keys of the model, with the tensors of the file."""
    theirs: dict[Kind, list[tuple[str, Group, Convert]]] = {}
    for name, tensors in groups.items():
        rule = next((one for one in layout.rules if one.theirs == tensors.keys()), None)
        kind, convert = (frozenset(tensors), unchanged) if rule is None else (rule.ours, rule.convert)
        if kind:
            theirs.setdefault(kind, []).append((name, tensors, convert))
        else:  # what the spec has, and the file only repeats
            _converted(path, name, convert, tensors, model, model)
    ours: dict[Kind, list[tuple[str, nn.Module]]] = {}
    stored = model.state_dict()
    for name, module in model.named_modules():
        if own := frozenset(key for key in _own(module) if f"{name}.{key}" in stored):
            ours.setdefault(own, []).append((name, module))
    for kind in [*ours, *theirs]:
        a, b = theirs.get(kind, []), ours.get(kind, [])
        if len(a) != len(b):
            raise CheckpointError(
                f"{path}: another network than the spec's: the file has {len(a)} modules of {', '.join(sorted(kind))}, "
                f"the spec {len(b)}"
            )
    holders = {
        part: layer
        for layer in model.modules()
        if isinstance(net := getattr(layer, "net", None), nn.Module)
        for part in net.modules()
    }
    for kind, pairs in ours.items():
        for (name, tensors, convert), (own_name, module) in zip(theirs[kind], pairs, strict=True):
            made, wanted = _converted(path, name, convert, tensors, module, holders.get(module, model)), _own(module)
            if _shapes(made) != _shapes(wanted) or not all(
                made[key].is_floating_point() for key, one in wanted.items() if isinstance(one, nn.Parameter)
            ):
                which = f"{name}, {_shapes(made)}, meets {own_name}, {_shapes(wanted)}"
                raise CheckpointError(f"{path}: another network than the spec's: {which}")
            yield from ((f"{own_name}.{key}", tensor) for key, tensor in made.items())


def _converted(path: Path, name: str, convert: Convert, tensors: Group, module: nn.Module, holder: nn.Module) -> Group:
    try:
        return convert(tensors, module, holder)
    except (IndexError, KeyError, RuntimeError, ValueError) as error:  # of shapes that do not fit each other
        why = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: another network than the spec's: {name}: {why}") from None


def _own(module: nn.Module) -> Group:
    """The tensors of a module itself that follow neither from others nor from the spec."""
    if isinstance(module, Standardize):
        return {}
    derived: frozenset[str] = getattr(module, "derived", frozenset())
    named = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    own = {name: tensor for name, tensor in named if name not in derived}
    return own | {name: tensor for name, tensor in constants(module) if "." not in name}


def _shapes(tensors: Group) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensors[name].shape) for name in sorted(tensors)}


def _groups(state: Mapping[str, Tensor]) -> dict[str, Group]:
    """The tensors by module, in the same order."""
    found: dict[str, Group] = {}
    for key, tensor in state.items():
        module, _, name = key.rpartition(".")
        found.setdefault(module, {})[name] = tensor
    return found


def _without_wrapper(state: Mapping[str, Tensor]) -> Group:
    for wrapper in _WRAPPERS * 2:  # of both, in any order
        if state and all(key.startswith(wrapper) for key in state):
            state = {key.removeprefix(wrapper): tensor for key, tensor in state.items()}
    return dict(state)


@torch.no_grad()
def _excess(model: nn.Module) -> float:
    """The largest norm of a bounded map, in units of its bound; 0 if there is none."""
    maps = (one for one in model.modules() if isinstance(one, SpectralConv | SpectralLinear))
    return max((float(one.norm()) / one.bound for one in maps), default=0.0)


def _keep_the_map(found: Imported, expanded: Mapping[str, Any], factor: float) -> None:
    """Raises the bounds of norms by a factor if all residual blocks still contract: else their maps are scaled down."""
    nets = [one for one in found.model.modules() if isinstance(one, LipschitzNet)]
    contract = all(net.lipschitz_bound() * factor ** len(net.maps) < 1 for net in nets)
    if not contract or any(one.bound * factor > 1 for net in nets for one in net.maps):  # type: ignore[operator]
        found.changes.append(
            f"maps are scaled down by up to {100 * (1 - 1 / factor):.2f} %, so the network is not quite the official "
            "one: its norms had not converged, and blocks of such norms may have no inverse"
        )
        return
    kept = {key: value for key, value in expanded.items() if key in found.document}
    raised = _raised(kept, factor)
    model, weights = build_model(raised), found.model.state_dict()
    model.load_state_dict(weights)
    found.model, found.document = model.eval(), raised
    found.changes.append(
        f"bounds of norms are raised by {100 * (factor - 1):.2f} %: the official norms had not converged"
    )


def _raised(node: Any, factor: float) -> Any:
    """A document, or a part of one, with all bounds of norms times a factor."""
    if isinstance(node, list):
        return [_raised(one, factor) for one in node]
    if not isinstance(node, dict):
        return node
    lipschitz = str(node.get("type", "")).startswith("lipschitz_") and "bound" in node
    return {
        key: node["bound"] * factor if lipschitz and key == "bound" else _raised(value, factor)
        for key, value in node.items()
    }
