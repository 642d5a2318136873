"""What a property is tried on: a bijection in a setting, with inputs of many kinds."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, isinf, sqrt
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..bijection import Bijection
from ..context import Context, ContextShape, make_context
from ..state import Shape, State, TensorShape, flat_size, flatten, is_tensor_shape, make_state, map_state, shape_of
from .foreign import Foreign

Kind = Literal["normal", "huge", "tiny", "zeros", "repeated"]
Layout = Literal["contiguous", "strided", "channels_last", "expanded"]
Interval: TypeAlias = tuple[float, float]
Domain: TypeAlias = str | Interval

KINDS: tuple[Kind, ...] = ("normal", "huge", "tiny", "zeros", "repeated")
LAYOUTS: tuple[Layout, ...] = ("contiguous", "strided", "channels_last", "expanded")
BATCHES = (3, 2, 1, 5, 0)
TRAIN_BATCHES = (5, 2, 3)  # torch refuses batch statistics of one number
LARGE_BATCH = 40
DTYPES = (torch.float64, torch.float32)

DOMAINS: dict[str, Interval] = {"reals": (-inf, inf), "positive": (0, inf), "unit": (0, 1), "symmetric": (-1, 1)}
"""The domains that have a name: each coordinate lies in this open interval."""

_SCALES: dict[Kind, float] = {"normal": 1.0, "huge": 1e6, "tiny": 1e-6, "zeros": 0.0, "repeated": 1.0}
_SPREAD: dict[Kind, tuple[float, float]] = {"huge": (0.0, 9.0), "tiny": (-12.0, 0.0)}
"""The exponents of 10 that spread inputs have; ordinary ones are spread evenly from -8 to 8."""
_SPREAD_NUMBERS = 2**15
_SPREAD_BATCHES = (128, 2**12)
_ROOM = 64
"""A state on a grid starts below the limit of float32 divided by this, because a dozen layers may add to it."""
_LARGEST_ON_GRID = 4.0
_FARTHEST = 13.8  # its exponential is 1e6, the scale of huge inputs


@dataclass(frozen=True)
class Setting:
    """The conditions under which a property is tried.

    Attributes:
        kind: the values of the inputs.
        layout: the memory layout of the inputs.
        batch: the number of samples.
        dtype: the dtype of the inputs and of the bijection.
        training: whether the bijection is in train mode.
        spread: whether the inputs are thousands, spread evenly over the whole range of their kind.
        stretched: whether images have another aspect ratio, if the bijection takes them.
        weights: the seed of the noise added to the weights, without which a layer that starts as the identity would
            hide its faults; None for no noise.
        seed: the seed of the inputs.
    """

    kind: Kind = "normal"
    layout: Layout = "contiguous"
    batch: int = 3
    dtype: torch.dtype = torch.float64
    training: bool = False
    spread: bool = False
    stretched: bool = False
    weights: int | None = None
    seed: int = 0

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        weights = "original weights" if self.weights is None else f"weights moved by seed {self.weights}"
        sort = ", spread" * self.spread + ", stretched" * self.stretched
        values = f"{self.kind} inputs{sort}, {self.layout}, batch {self.batch}"
        return f"{values}, {str(self.dtype).removeprefix('torch.')}, {mode} mode, {weights}, seed {self.seed}"

    def draw(self, shape: Shape, domain: Interval, salt: int = 0) -> State:
        """A state in the domain; each salt gives a different one."""
        generator = torch.Generator().manual_seed(self.seed * 101 + salt)

        def tensor(leaf: TensorShape) -> Tensor:
            if self.spread:
                values = _spread((self.batch, *leaf), self.kind, generator)
            else:
                values = torch.randn((self.batch, *leaf), generator=generator, dtype=torch.float64) * _SCALES[self.kind]
            if self.kind == "repeated" and values.numel():
                values = values.flatten()[0].expand(values.shape)
            return _laid_out(_into(domain, values, self.dtype), self.layout)

        return make_state(tensor, shape)


def some_settings(seed: int, count: int, *, perturb: bool = True, kinds: Sequence[Kind] = KINDS) -> Iterator[Setting]:
    """``count`` settings: the first ones cover each kind, mode and batch, the rest is drawn at random from the seed."""
    source = random.Random(seed)
    for number in range(count):
        training = number % 3 == 1
        kind = kinds[number] if number < len(kinds) else source.choice(kinds)
        batch = source.choice(TRAIN_BATCHES if training else BATCHES) if number else 3
        large = number == 7  # in train mode; the property "large batch" is of eval mode
        yield Setting(
            kind=kinds[0] if large else kind,
            layout=LAYOUTS[0 if large else number % len(LAYOUTS)],
            batch=LARGE_BATCH if large else batch,
            dtype=DTYPES[number % 5 == 4],
            training=training,
            stretched=number % 2 == 1 and number > 4,
            weights=source.randrange(2**16) if perturb and number else None,
            seed=source.randrange(2**16),
        )


@dataclass(frozen=True)
class Trial:
    """A copy of a bijection in a setting, and the inputs to try a property on.

    Attributes:
        bijection: the copy, in the setting's dtype and mode.
        shape: the shape of the input.
        setting: the setting.
        x: an input, drawn in the domain, or from the codomain if that is the narrower one.
        y: a state drawn in the codomain, independently of x; the image of x if the codomain is unknown; None if the
            bijection raises.
        context: a context per sample, or None.
        other_context: another one.
    """

    bijection: Bijection
    shape: Shape
    setting: Setting
    x: State
    y: State | None
    context: Context
    other_context: Context

    @property
    def image(self) -> State:
        """A state to invert: y. If there is none, this raises what the bijection raises."""
        return self.bijection(self.x, self.context) if self.y is None else self.y

    @property
    def exactness(self) -> str:
        """How exact the inverse must be on these inputs: a chain that snaps to the data's grid returns data exactly."""
        return "grid" if self.snaps else self.bijection.exactness

    @property
    def snaps(self) -> bool:
        """Whether the inverse rounds to the data's grid."""
        return self.bijection.numerics.about_data

    @property
    def is_exact(self) -> bool:
        return self.exactness != "float"


@dataclass(frozen=True)
class Subject:
    """A bijection to check, with the arguments of `check_bijection` that describe it."""

    bijection: Bijection
    shape: Shape
    context_shape: ContextShape = None
    domain: Domain | None = None
    codomain: Domain | None = None

    def __post_init__(self) -> None:
        _ = self.domains  # an unknown name is the caller's mistake, not a finding

    def trial(self, setting: Setting) -> Trial:
        """A copy of the bijection in this setting, with inputs."""
        bijection = copy.deepcopy(self.bijection)
        if setting.weights is not None:
            perturb(bijection, setting.weights)
        bijection = bijection.to(setting.dtype).train(setting.training)
        shape = self.stretched_shape if setting.stretched else self.shape
        if setting.spread:
            batch = max(_SPREAD_BATCHES[0], min(_SPREAD_BATCHES[1], _SPREAD_NUMBERS // max(1, flat_size(shape))))
            setting = dataclasses.replace(setting, batch=batch)
        context, other = (self._context(setting, salt) for salt in (1, 2))
        x = onto_grid(self._input(setting, bijection, shape, context), bijection)
        return Trial(bijection, shape, setting, x, self._image(setting, bijection, x, context), context, other)

    @functools.cached_property
    def stretched_shape(self) -> Shape:
        """The shape with images of another aspect ratio; the shape itself if the bijection takes none such."""
        setting = Setting(batch=2)
        for widen in (False, True):
            shape = _stretched(self.shape, widen=widen)
            probe = copy.deepcopy(self.bijection).to(setting.dtype).eval()
            try:
                with torch.random.fork_rng(devices=[]), torch.no_grad():
                    x = onto_grid(setting.draw(shape, self.domains[0]), probe)
                    probe.output_shape(shape)
                    probe(x, self._context(setting, 1))
            except Exception:  # it refuses the shape
                continue
            return shape
        return self.shape

    @functools.cached_property
    def domains(self) -> tuple[Interval, Interval | None]:
        """The intervals of inputs and outputs; None for outputs if only images are known to be in the codomain."""
        domain = self.bijection.domain if self.domain is None else self.domain
        codomain = self.codomain or self.bijection.codomain
        if self.codomain is None and self.domain not in (None, self.bijection.domain):
            codomain = None  # the class does not say what a part of its domain is mapped to
        return _interval(domain), None if codomain is None else _interval(codomain)

    def _context(self, setting: Setting, salt: int) -> Any:
        generator = torch.Generator().manual_seed(setting.seed * 101 + salt)
        size, dtype = setting.batch, setting.dtype
        return make_context(lambda one: torch.randn((size, *one), generator=generator, dtype=dtype), self.context_shape)

    def _input(self, setting: Setting, bijection: Bijection, shape: Shape, context: Context) -> State:
        """A state drawn in the domain or, if that is wider than the codomain, computed from one drawn there.

        A map of all reals into an interval rounds to its ends far from 0, and nothing could come back from there; what
        it returns there is the business of `whole domain`.
        """
        domain, codomain = self.domains
        x = setting.draw(shape, domain)
        if codomain is None or _infinities(domain) <= _infinities(codomain):
            return x
        probe = copy.deepcopy(bijection)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), contextlib.suppress(Exception):
            before = probe.inverse(setting.draw(shape_of(probe(x, context)), codomain), context)
            if bool(flatten(before).isfinite().all()):
                return map_state(lambda leaf: _laid_out(leaf, setting.layout), before)
        return x  # its faults are found from there

    def _image(self, setting: Setting, bijection: Bijection, x: State, context: Context) -> State | None:
        """A state drawn in the codomain, or computed; None if that fails, which the properties will report."""
        probe, outputs = copy.deepcopy(bijection), self.domains[1]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                y: State = probe(map_state(torch.clone, x), context)
                if outputs is None or bijection.numerics.about_data:
                    return y
                return onto_grid(setting.draw(shape_of(y), outputs, salt=3), bijection)
            except Exception:
                return None


def perturb(module: nn.Module, seed: int) -> None:
    """Adds seeded noise to weights and running statistics, as training would; conditioning stays moderate."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, scale: float) -> Tensor:
        return (torch.randn(like.shape, generator=generator, dtype=torch.float64) * scale).to(like)

    with torch.no_grad():
        for weight in module.parameters():
            if weight.requires_grad and weight.is_floating_point():
                # What is added to a matrix has a norm of about a half, whatever its size.
                scale = 0.25 / sqrt(max(1, weight[0].numel())) if weight.dim() > 1 else 0.25
                weight.add_(noise(weight, scale))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(noise(buffer, 0.25))
            elif name.endswith("running_var"):
                buffer.mul_(noise(buffer, 0.25).exp())


def layer_count(bijection: Bijection) -> int:
    """The number of bijections inside one that hold no others, at least 1; a foreign layer has its own number."""
    if isinstance(bijection, Foreign):
        return bijection.layer_count

    def holds_others(one: nn.Module) -> bool:
        return any(isinstance(part, Bijection) for part in one.modules() if part is not one)

    return max(1, sum(isinstance(part, Bijection) and not holds_others(part) for part in bijection.modules()))


def rounding_count(bijection: Bijection) -> float:
    """The same, with each bijection's `rounding_growth` in the place of 1."""
    grown = [part.rounding_growth - 1 for part in bijection.modules() if isinstance(part, Bijection)]
    return layer_count(bijection) + sum(grown)


def _interval(domain: Domain) -> Interval:
    if isinstance(domain, str) and domain not in DOMAINS:
        names = ", ".join(map(repr, sorted(DOMAINS)))
        raise ValueError(f"unknown domain {domain!r}: choose one of {names}, or pass an interval, domain=(low, high)")
    low, high = DOMAINS[domain] if isinstance(domain, str) else domain
    if not low < high:
        raise ValueError(f"a domain expects an interval (low, high) with low < high, got {domain}")
    return low, high


def onto_grid(state: State, bijection: Bijection) -> State:
    """The state, rounded to the grid of the bijection's numerics if they have one; its layout is kept."""
    numerics = bijection.numerics
    if not numerics.step:
        return state
    farthest = min(_LARGEST_ON_GRID, numerics.reach(torch.float32) / _ROOM)

    def move(leaf: Tensor) -> Tensor:
        there: Any = numerics.nearest_data(leaf.clamp(-farthest, farthest))
        # Writing into a tensor of the same layout keeps it; an expanded one becomes contiguous.
        return there if leaf.is_contiguous() else torch.empty_like(leaf).copy_(there)

    return map_state(move, state)


def _infinities(domain: Interval) -> int:
    return sum(map(isinf, domain))


def _into(domain: Interval, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Real numbers mapped into an open interval, and clamped to stay inside it after rounding to the dtype."""
    low, high = domain
    if isinf(low) and isinf(high):
        return values.to(dtype)
    moderate = values.clamp(-_FARTHEST, _FARTHEST)
    if isinf(high):
        return (low + moderate.exp()).to(dtype)
    if isinf(low):
        return (high - moderate.exp()).to(dtype)
    inside = (low + (high - low) * moderate.sigmoid()).to(dtype)
    margin = torch.finfo(dtype).eps * max(abs(low), abs(high), high - low)
    return inside.clamp(low + margin, high - margin)


def _stretched(shape: Shape, *, widen: bool) -> Shape:
    """Images of twice the width or, if they are not to ``widen``, of twice the height and half the width."""
    if not is_tensor_shape(shape):
        return tuple(_stretched(part, widen=widen) for part in shape)  # type: ignore[arg-type]
    if len(shape) < 3:
        return shape
    *channels, height, width = shape
    return (*channels, height, 2 * width) if widen else (*channels, 2 * height, max(1, width // 2))


def _spread(shape: tuple[int, ...], kind: Kind, generator: torch.Generator) -> Tensor:
    """Real numbers of both signs, without a gap: samples of each length in one direction, samples of one number in all
    coordinates, and samples in which each coordinate, independently of the others, takes every number once.
    """
    even = torch.linspace(-1, 1, shape[0], dtype=torch.float64)
    if kind in _SPREAD:
        least, most = _SPREAD[kind]
        even = even.sign() * 10 ** (least + (most - least) * even.abs())
    else:
        even = 8 * even
    rows = even.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    direction = torch.randn(shape[1:], generator=generator, dtype=torch.float64)
    shuffled = even[torch.rand(shape, generator=generator).argsort(0)]
    family = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)) % 4
    return torch.where(family == 0, rows * direction, torch.where(family == 1, rows, shuffled))


def _laid_out(x: Tensor, layout: Layout) -> Tensor:
    if layout == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return x[:1].contiguous().expand(x.shape)  # one sample, repeated without a copy
    return x.contiguous()
