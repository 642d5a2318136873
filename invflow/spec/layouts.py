"""How the codes of published networks name and store their weights, and what becomes of them here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..bijections import SplineCoupling

Group: TypeAlias = dict[str, Tensor]
"""The tensors of one module, by their names in it."""
Kind: TypeAlias = frozenset[str]
"""The names of a module's tensors."""
Convert: TypeAlias = Callable[[Group, nn.Module, nn.Module], Group]
"""A module's tensors as ours, of our module, which the last one holds, a layer or a net."""

_DIGITS = 10


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


def unchanged(tensors: Group, module: nn.Module, holder: nn.Module) -> Group:
    """The conversion of what is stored as ours is."""
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
