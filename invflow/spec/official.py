"""Weights of published networks, as the code of their papers saved them, for the specs of these networks."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .._torch import constants
from ..bijections import SplineCoupling, Standardize
from ..errors import CheckpointError
from ..models import Classifier, Flow
from ..nets.lipschitz import LipschitzNet
from ..nets.spectral import SpectralConv, SpectralLinear
from .build import build_model
from .document import Spec, SpecSource, load_spec
from .tensor_file import read_state_dict

Group: TypeAlias = dict[str, Tensor]
"""The tensors of one module, by their names in it."""
Kind: TypeAlias = frozenset[str]
"""The names of a module's tensors."""
Convert: TypeAlias = Callable[[Group, nn.Module, nn.Module], Group]
"""A module's tensors as ours, of our module, which the last one holds, a layer or a net."""

_WRAPPERS = ("module.", "_orig_mod.")
"""What `nn.DataParallel`, DDP and `torch.compile` put before every key."""
_DIGITS = 10
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


class Rule(NamedTuple):
    """What one kind of official module becomes.

    Attributes:
        theirs: the names of its tensors, no more and no fewer.
        ours: the names of ours.
        convert: the official tensors as ours.
    """

    theirs: Kind
    ours: Kind
    convert: Convert


class Layout(NamedTuple):
    """How a code names and stores its weights.

    Attributes:
        name: of the code.
        mark: a pattern of a key that only this code has.
        rules: for the kinds of modules that are not stored as ours are.
        left_out: patterns of keys that are not taken, each with the reason.
        first: parts of keys that come before others at their place.
        last: those that come behind the others; everything else is in the order of numbers.
    """

    name: str
    mark: str
    rules: tuple[Rule, ...] = ()
    left_out: Mapping[str, str] = {}
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()

    def place(self, key: str) -> list[tuple[int, int, str]]:
        """What sorts keys in the order in which their modules compute, which not every file keeps."""
        return [
            (-1 if part in self.first else 1 + self.last.index(part) if part in self.last else 0, _number(part), part)
            for part in key.split(".")
        ]


def _number(part: str) -> int:
    return int(part) if part.isdecimal() and len(part) < _DIGITS else -1


# ------------------------------------------------------------- Conversions


def _unchanged(tensors: Group, module: nn.Module, holder: nn.Module) -> Group:
    return tensors


def _norm(u: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """``u . W v``, the estimate of W's norm that the official code uses in eval mode, on the map that v is of."""
    if weight.dim() == 2 or weight.shape[2:].numel() == 1:
        return u.flatten() @ weight.flatten(1) @ v.flatten()
    sides = (math.isqrt(v.numel() // weight.shape[1]),) * 2
    image = nn.functional.conv2d(v.reshape(1, -1, *sides), weight, padding=weight.shape[-1] // 2)
    return (u.flatten() * image.flatten()).sum()


def _normalized(weight: Tensor, u: Tensor, v: Tensor, module: Any, more: float) -> Tensor:
    """The weight that the official code computes with: ``W / (max(1, norm / bound) + more)``."""
    wide: Tensor = weight.double()
    return wide / ((_norm(u.double(), v.double(), wide) / float(module.bound)).clamp(min=1) + more)


def _iresnet_map(tensors: Group, module: nn.Module, holder: nn.Module) -> Group:
    weight = tensors["weight_orig"]
    more = 1e-5 if weight.shape[-1] > 1 else 0.0  # of the official convolutions, but not of those of 1x1
    used = _normalized(weight, tensors["weight_u"], tensors["weight_v"], module, more)
    return {"weight": used, "bias": tensors["bias"]}


def _flow_map(tensors: Group, module: nn.Module, holder: nn.Module) -> Group:
    return {
        "weight": _normalized(tensors["weight"], tensors["u"], tensors["v"], module, 0.0),
        "bias": tensors["bias"],
    }


def _iresnet_norm(tensors: Group, module: nn.Module, holder: nn.Module) -> Group:
    flat = {"log_scale": tensors["_log_scale"].flatten(), "shift": tensors["_shift"].flatten()}
    return {**flat, "initialized": torch.tensor(True)}


def _flow_norm(tensors: Group, module: nn.Module, holder: nn.Module) -> Group:
    scale, bias = tensors["weight"], tensors["bias"]  # (x + bias) * exp(weight)
    shift = bias.double() * scale.double().exp()
    return {"log_scale": scale, "shift": shift, "initialized": tensors["initialized"].bool()}


def _flow_slope(tensors: Group, module: nn.Module, holder: nn.Module) -> Group:
    return {"beta": tensors["beta"].reshape(())}


def _iresnet_prior(tensors: Group, module: nn.Module, holder: nn.Module) -> Group:
    return {"mean": tensors["prior_mu"].flatten(), "log_scale": tensors["prior_logstd"].flatten()}


def _nsf_norm(tensors: Group, module: nn.Module, holder: nn.Module) -> Group:
    return {**tensors, "initialized": torch.tensor(True)}  # not in the file: a plain attribute there


def _nsf_linear(tensors: Group, module: nn.Module, holder: nn.Module) -> Group:
    size = len(tensors["unconstrained_upper_diag"])
    factors = torch.diag(tensors["unconstrained_upper_diag"])
    for name, diagonal in (("lower", -1), ("upper", 1)):
        rows, columns = (torch.tril_indices if diagonal < 0 else torch.triu_indices)(size, size, diagonal)
        factors[rows, columns] = tensors[f"{name}_entries"]
    return {"factors": factors, "bias": tensors["bias"]}


def _nsf_conv(tensors: Group, module: nn.Module, holder: nn.Module) -> Group:
    """The last convolution of a coupling's net has its rows by channel there, and the slopes themselves.

    Here the numbers of all channels follow each other, and those of the slopes are added to that of the slope 1.
    """
    if not (isinstance(holder, SplineCoupling) and module is [*holder.net.modules()][-1]):
        return tensors
    bins, numbers = holder.spline.bins, holder.spline.numbers
    slope_1 = math.log(math.expm1(1 - holder.spline.min_slope))
    found = {}
    for name, tensor in tensors.items():
        wide = tensor.double().unflatten(0, (-1, numbers)).transpose(0, 1).clone()  # type: ignore[no-untyped-call]
        if name == "bias":
            wide[2 * bins :] -= slope_1
        found[name] = wide.flatten(0, 1)
    return found


def _nsf_halves(tensors: Group, module: nn.Module, holder: nn.Module) -> Group:
    first, second = tensors["transform_features"], tensors["identity_features"]
    if torch.cat([first, second]).tolist() != [*range(len(first) + len(second))]:
        raise ValueError("another half of the channels is transformed than the spec's, the first")
    return {}


def _nsf_pixels(tensors: Group, module: nn.Module, holder: nn.Module) -> Group:
    shift, scale = float(tensors["_shift"]), float(tensors["_scale"])
    if shift != -0.5 or scale not in (1.0, 1 / 256):
        raise ValueError(f"pixels are multiplied by {scale:g} and shifted by {shift:g}, the spec's of 8 bits by -0.5")
    return {}


_ACTNORM: Kind = frozenset({"log_scale", "shift", "initialized"})
_AFFINE: Kind = frozenset({"weight", "bias"})
_LU: Kind = frozenset({"lower_entries", "upper_entries", "unconstrained_upper_diag"})
_IRESNET_RULES = (
    Rule(frozenset({"bias", "weight_orig", "weight_u", "weight_v", "weight_sigma"}), _AFFINE, _iresnet_map),
    Rule(frozenset({"_log_scale", "_shift"}), _ACTNORM, _iresnet_norm),
    Rule(frozenset({"prior_mu", "prior_logstd"}), frozenset({"mean", "log_scale"}), _iresnet_prior),
)
LAYOUTS = (
    Layout("pytorch-i-revnet", r"stack\.\d+\.bottleneck_block\.\d+\.weight", last=("bn1", "linear")),
    Layout(
        "invertible-resnet (classifier)",
        r"stack\.\d+\.bottleneck_block\.\d+\.weight_orig",
        _IRESNET_RULES,
        {"prior_.*": "a prior that the classifier does not use"},
        last=("bn1", "logits"),
    ),
    Layout(
        "invertible-resnet (density)",
        r"stack\.\d+\.stack\.\d+\.bottleneck_block\.\d+\.weight_orig",
        _IRESNET_RULES,
        {r"(bn1|logits)\..*": "a class head that the density does not use"},
    ),
    Layout(
        "residual-flows",
        r"transforms\.\d+\.chain\.\d+\.nnet\..*",
        (
            Rule(_AFFINE | {"initialized", "spatial_dims", "scale", "u", "v"}, _AFFINE, _flow_map),
            Rule(_AFFINE | {"scale", "u", "v"}, _AFFINE, _flow_map),
            Rule(frozenset({"beta"}), frozenset({"beta"}), _flow_slope),
            Rule(_AFFINE | {"initialized"}, _ACTNORM, _flow_norm),
        ),
        {r".*\.(geom_p|lamb|last_n_samples|last_firmom|last_secmom)": "settings and records of an estimator"},
    ),
    Layout(
        "nsf",
        r"_transform\..*\.unconstrained_upper_diag",
        (
            Rule(frozenset({"log_scale", "shift"}), _ACTNORM, _nsf_norm),
            Rule(frozenset({"_permutation"}), frozenset({"order"}), lambda t, m, h: {"order": t["_permutation"]}),
            Rule(_LU | {"bias"}, frozenset({"factors", "bias"}), _nsf_linear),
            Rule(_AFFINE, _AFFINE, _nsf_conv),
            Rule(frozenset({"identity_features", "transform_features"}), frozenset(), _nsf_halves),
            Rule(frozenset({"_shift", "_scale"}), frozenset(), _nsf_pixels),
        ),
        first=("initial_layer",),
        last=("final_layer",),
    ),
)


# ---------------------------------------------------------------- The import


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
        kind, convert = (frozenset(tensors), _unchanged) if rule is None else (rule.ours, rule.convert)
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
            f"maps are scaled down by up to {1 - 1 / factor:.2%}, so the network is not quite the official one: its "
            "norms had not converged, and blocks of such norms may have no inverse"
        )
        return
    kept = {key: value for key, value in expanded.items() if key in found.document}
    raised = _raised(kept, factor)
    model, weights = build_model(raised), found.model.state_dict()
    model.load_state_dict(weights)
    found.model, found.document = model.eval(), raised
    found.changes.append(f"bounds of norms are raised by {factor - 1:.2%}: the official norms had not converged")


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
