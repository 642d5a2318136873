"""What a property is tried on: a bijection in a drawn condition, with inputs of many kinds."""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..bijection import Bijection
from ..state import Shape, State, TensorShape, make_state, map_state, shape_of
from .foreign import Foreign

Kind = Literal["normal", "huge", "tiny", "zeros", "repeated"]
Layout = Literal["contiguous", "strided", "channels_last", "expanded"]
Domain: TypeAlias = str | tuple[float, float]

KINDS: tuple[Kind, ...] = ("normal", "huge", "tiny", "zeros", "repeated")
LAYOUTS: tuple[Layout, ...] = ("contiguous", "strided", "channels_last", "expanded")
BATCHES = (3, 2, 1, 5, 0)
TRAIN_BATCHES = (5, 2, 3)  # batch statistics of one number are none: torch refuses
DTYPES = (torch.float64, torch.float32)

DOMAINS: dict[str, tuple[float, float]] = {
    "reals": (-math.inf, math.inf),
    "positive": (0.0, math.inf),
    "unit": (0.0, 1.0),
    "symmetric": (-1.0, 1.0),
}
"""The domains that have a name: open intervals, in every coordinate."""

EXACT_INVERSE = frozenset(
    {
        "round trip",
        "inverse round trip",
        "context",
        "batch independence",
        "nan contained",
        "memory layout",
        "autocast",
        "inverse log det",
        "inverse gradients",
    }
)
"""What an inverse that stops at a tolerance of its own does not promise."""

EXACT_LOG_DET = frozenset({"log det", "inverse log det", "gradients", "inverse gradients"})
"""What an estimated log-determinant does not promise."""

BOTH_WAYS = frozenset({"inverse round trip", "log det", "inverse log det", "log det form"})
"""What an injection does not promise."""

_SCALES: dict[Kind, float] = {"normal": 1.0, "huge": 1e6, "tiny": 1e-6, "zeros": 0.0, "repeated": 1.0}
_ROOM = 64
"""A state on a grid starts this far below the limit of float32, and a dozen layers may add to it."""
_LARGEST_ON_GRID = 4.0
_FARTHEST = 13.8  # exp of it is 1e6, as large as huge inputs are


@dataclass(frozen=True)
class Setting:
    """Under which conditions a property is tried.

    Attributes:
        kind: which values the inputs have.
        layout: how they lie in memory.
        batch: how many samples.
        dtype: of the inputs and the bijection.
        training: whether the bijection is in train mode.
        weights: None for the weights as they are, otherwise the seed of what is added to them: layers that start as
            the identity would hide what they do.
        seed: of the inputs.
    """

    kind: Kind = "normal"
    layout: Layout = "contiguous"
    batch: int = 3
    dtype: torch.dtype = torch.float64
    training: bool = False
    weights: int | None = None
    seed: int = 0

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        weights = "weights as given" if self.weights is None else f"weights moved by seed {self.weights}"
        values = f"{self.kind} inputs, {self.layout}, batch {self.batch}"
        return f"{values}, {str(self.dtype).removeprefix('torch.')}, {mode} mode, {weights}, seed {self.seed}"

    def draw(self, shape: Shape, domain: tuple[float, float], salt: int = 0) -> State:
        """A state in the domain; another one for another salt."""
        generator = torch.Generator().manual_seed(self.seed * 101 + salt)

        def tensor(leaf: TensorShape) -> Tensor:
            values = torch.randn((self.batch, *leaf), generator=generator, dtype=torch.float64) * _SCALES[self.kind]
            if self.kind == "repeated" and values.numel():
                values = values.flatten()[0].expand(values.shape)
            return _laid_out(_into(domain, values, self.dtype), self.layout)

        return make_state(tensor, shape)


def some_settings(seed: int, count: int, *, perturb: bool = True, kinds: Sequence[Kind] = KINDS) -> Iterator[Setting]:
    """``count`` settings: each kind and each mode early on, the rest drawn at random from the seed."""
    source = random.Random(seed)
    for number in range(count):
        training = number % 3 == 1
        yield Setting(
            kind=kinds[number] if number < len(kinds) else source.choice(kinds),
            layout=LAYOUTS[number % len(LAYOUTS)],
            batch=source.choice(TRAIN_BATCHES if training else BATCHES) if number else 3,
            dtype=DTYPES[number % 5 == 4],
            training=training,
            weights=source.randrange(2**16) if perturb and number else None,
            seed=source.randrange(2**16),
        )


@dataclass(frozen=True)
class Trial:
    """A bijection, of which a property may do what it likes with a copy, and the inputs to try it on.

    Attributes:
        bijection: a copy in the setting's dtype and mode.
        shape: the input's shape.
        x: an input.
        y: a state in the codomain, drawn independently of x where the codomain is known, else the image of x; None
            where the bijection would not say.
        context: as many contexts as samples, or None.
        other_context: another one.
    """

    bijection: Bijection
    shape: Shape
    setting: Setting
    x: State
    y: State | None
    context: Tensor | None
    other_context: Tensor | None

    @property
    def image(self) -> State:
        """A state to invert: y, and where there is none, whatever the bijection raises."""
        return self.bijection(self.x, self.context) if self.y is None else self.y

    @property
    def exactness(self) -> str:
        """How exact the inverse has to be on these inputs: a chain that snaps to the data's grid gives data back."""
        return "grid" if self.snaps else self.bijection.exactness

    @property
    def snaps(self) -> bool:
        """Whether its inverse rounds to the data's grid."""
        return self.bijection.numerics.about_data

    @property
    def is_exact(self) -> bool:
        return self.exactness != "float"

    @property
    def step(self) -> float:
        """The distance of neighbouring states; 0 for real numbers."""
        return self.bijection.numerics.step

    def generator(self) -> torch.Generator:
        """For what else a property draws: the same numbers each time."""
        return torch.Generator().manual_seed(self.setting.seed + 1)


@dataclass(frozen=True)
class Subject:
    """A bijection to be checked and what must be known about it."""

    bijection: Bijection
    shape: Shape
    context_shape: TensorShape | None = None
    domain: Domain | None = None
    codomain: Domain | None = None

    def __post_init__(self) -> None:
        _ = self.domains  # a name that means nothing is the caller's mistake, not a finding

    def trial(self, setting: Setting) -> Trial:
        """The bijection in this setting, the original left as it is."""
        bijection = copy.deepcopy(self.bijection)
        if setting.weights is not None:
            perturb(bijection, setting.weights)
        bijection = bijection.to(setting.dtype).train(setting.training)
        inputs, _ = self.domains
        x = _onto_grid(setting.draw(self.shape, inputs), bijection)
        context, other = (self._context(setting, salt) for salt in (1, 2))
        return Trial(bijection, self.shape, setting, x, self._image(setting, bijection, x, context), context, other)

    @functools.cached_property
    def domains(self) -> tuple[tuple[float, float], tuple[float, float] | None]:
        """The intervals of inputs and outputs; None for outputs that are known as images only."""
        domain = self.bijection.domain if self.domain is None else self.domain
        codomain = self.codomain or self.bijection.codomain
        if self.codomain is None and self.domain not in (None, self.bijection.domain):
            codomain = None  # what a part of the domain is mapped to, the class does not say
        return _interval(domain), None if codomain is None else _interval(codomain)

    @functools.cached_property
    def unpromised(self) -> frozenset[str]:
        """The names of the properties that the bijection does not promise, by what it says of itself."""
        names: set[str] = set()
        if not self.bijection.traceable:
            names |= {"compiles"}
        if self.bijection.inverse_tolerance is not None:
            names |= EXACT_INVERSE
        if self.bijection.log_det_is_estimated:
            names |= EXACT_LOG_DET
        if not self.bijection.surjective:
            names |= BOTH_WAYS
        for part in self.bijection.modules():
            if isinstance(part, Foreign):
                names |= part.unknown
        return frozenset(names)

    def _context(self, setting: Setting, salt: int) -> Tensor | None:
        if self.context_shape is None:
            return None
        generator = torch.Generator().manual_seed(setting.seed * 101 + salt)
        return torch.randn((setting.batch, *self.context_shape), generator=generator, dtype=setting.dtype)

    def _image(self, setting: Setting, bijection: Bijection, x: State, context: Tensor | None) -> State | None:
        """Drawn in the codomain, or computed; None where that fails, which the properties will find."""
        probe, outputs = copy.deepcopy(bijection), self.domains[1]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                y: State = probe(map_state(torch.clone, x), context)
                if outputs is None or bijection.numerics.about_data:
                    return y
                return _onto_grid(setting.draw(shape_of(y), outputs, salt=3), bijection)
            except Exception:
                return None


def perturb(module: nn.Module, seed: int) -> None:
    """Moves what training would, weights and running statistics, by seeded noise; conditioning stays moderate."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, scale: float) -> Tensor:
        return (torch.randn(like.shape, generator=generator, dtype=torch.float64) * scale).to(like)

    with torch.no_grad():
        for weight in module.parameters():
            if weight.requires_grad and weight.is_floating_point():
                # A matrix moves by a map whose norm is about a half, whatever its size.
                scale = 0.25 / math.sqrt(max(1, weight[0].numel())) if weight.dim() > 1 else 0.25
                weight.add_(noise(weight, scale))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(noise(buffer, 0.25))
            elif name.endswith("running_var"):
                buffer.mul_(noise(buffer, 0.25).exp())


def layer_count(bijection: Bijection) -> int:
    """How many bijections are at work in one: those that hold no others; at least 1. A foreign layer says itself."""
    if isinstance(bijection, Foreign):
        return bijection.layer_count

    def holds_others(one: nn.Module) -> bool:
        return any(isinstance(part, Bijection) for part in one.modules() if part is not one)

    return max(1, sum(isinstance(part, Bijection) and not holds_others(part) for part in bijection.modules()))


def _interval(domain: Domain) -> tuple[float, float]:
    if isinstance(domain, str):
        if domain not in DOMAINS:
            names = ", ".join(map(repr, sorted(DOMAINS)))
            raise ValueError(f"unknown domain {domain!r}: there is {names}; or pass an interval, domain=(low, high)")
        return DOMAINS[domain]
    low, high = domain
    if not low < high:
        raise ValueError(f"a domain expects an interval (low, high) with low < high, got {domain}")
    return low, high


def _onto_grid(state: State, bijection: Bijection) -> State:
    """The state moved to where the bijection's numerics want it, its layout as it was."""
    numerics = bijection.numerics
    if not numerics.step:
        return state
    farthest = min(_LARGEST_ON_GRID, numerics.reach(torch.float32) / _ROOM)

    def move(leaf: Tensor) -> Tensor:
        there: Any = numerics.nearest_data(leaf.clamp(-farthest, farthest))
        # Layouts are of the memory: writing into a copy that is laid out alike keeps them, but for expanded ones.
        return there if leaf.is_contiguous() else torch.empty_like(leaf).copy_(there)

    with torch.no_grad():
        return map_state(move, state)


def _into(domain: tuple[float, float], values: Tensor, dtype: torch.dtype) -> Tensor:
    """Real numbers mapped into an open interval, and kept off its ends after rounding to the dtype."""
    low, high = domain
    if math.isinf(low) and math.isinf(high):
        return values.to(dtype)
    moderate = values.clamp(-_FARTHEST, _FARTHEST)
    if math.isinf(high):
        return (low + moderate.exp()).to(dtype)
    if math.isinf(low):
        return (high - moderate.exp()).to(dtype)
    inside = (low + (high - low) * moderate.sigmoid()).to(dtype)
    margin = torch.finfo(dtype).eps * max(abs(low), abs(high), high - low)
    return inside.clamp(low + margin, high - margin)


def _laid_out(x: Tensor, layout: Layout) -> Tensor:
    if layout == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return x[:1].contiguous().expand(x.shape) if x.shape[0] else x  # one sample, seen several times
    return x.contiguous()
