"""The check of a spec: shapes, parameters and round-trip error of every layer."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..context import Context, each_entry, make_context
from ..errors import InvflowError
from ..models import Classifier, Flow, caveat
from ..sequential import Sequential
from ..spec import build, build_model, load, load_spec
from ..state import Shape, State, batch_size, flat_size, make_state, map_state, part_of, shape_of
from .roundtrip import RoundTrip, in_dtype, round_trip, round_trips

UNTRAINED = "the weights are random, from seed 0, because a spec has none; the folder of a run has trained ones"
SAMPLES = 16
FEWEST = 2
"""Batch norm needs two samples in train mode."""
OPERATIONS = 2 * 10**10
"""The most floating-point operations in the products and convolutions of a round trip in float32, of all samples: a few
seconds on one core. A larger chain is checked on fewer samples."""
LARGEST_BATCH = 2**24
"""The largest total of numbers in all samples: the states of an untrusted spec could fill the memory."""
ROUNDINGS = 1000
"""The largest error that needs no reason, in units of the dtype's eps: 1e-4 in float32, 2e-13 in float64. A correct
inverse loses a few units per layer, times the gain of the layers after it; a wrong one loses everything."""
SHRINKS = 1e-3
"""A larger error of a whole chain is one of roundings that grow if each step alone has no such error, and if it is at
most this part of itself in float64, where roundings are 2e-9 as large."""


@dataclass(frozen=True)
class LayerCheck:
    """One row of the table: a step of the chain, the shape of its part of the state before and after it, its error.

    The error is None for a joint, which has no inverse.
    """

    name: str
    layer: str
    input_shape: Shape
    output_shape: Shape
    parameters: int
    exactness: str
    round_trip_error: dict[str, float | None]


@dataclass(frozen=True)
class CheckResult:
    """The result of `check`.

    Attributes:
        layers: one entry per step of the chain; nested layers have their own entries.
        round_trip_error: the relative error of the whole chain, by dtype and mode: ``"float32 eval"``.
        samples: the number of inputs, 16; fewer, down to 2, if the chain takes many operations or numbers.
        parameters: the number of trained numbers of the chain.
        exactness: the exactness of the whole chain: "float", "grid" or "exact".
        invertible: whether there is an inverse; if not, the chain has joints, and the errors are those of the trunks
            between them.
        surjective: whether every state is an image; if not, the chain adds dimensions, and only images come back.
        growth: by mode, how many times roundings grow on the way back, if that is more than `ROUNDINGS`: then the chain
            is ill-conditioned there, as batch norm is in train mode where a channel hardly varies.
        caveat: see `invflow.models.caveat`; all other numbers are of the chain alone.
        ok: whether every error is one of rounding; in "grid" and "exact", whether there is no error.
    """

    layers: list[LayerCheck]
    round_trip_error: dict[str, float]
    samples: int
    parameters: int
    exactness: str
    invertible: bool
    surjective: bool
    growth: dict[str, float]
    caveat: str
    ok: bool


def chain_of(source: Path) -> Sequential:
    """The chain of a spec file, initialised from seed 0, or the trained chain of a run or checkpoint folder."""
    if source.is_dir():
        model: Any = load(source)
    else:
        document = load_spec(source)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = (build_model if document.head or document.prior else build)(document)
    return model.bijection if isinstance(model, Classifier | Flow) else model


def untrained(source: Path) -> str:
    """What must precede any statement about the chain of a spec file; empty for the folder of a run or checkpoint."""
    return "" if source.is_dir() else UNTRAINED


def check(chain: Sequential, head: type[nn.Module] | None = None) -> CheckResult:
    """Runs a chain forward and back in float32 and float64, in eval and train mode, on inputs that resemble pixels.

    There are 16 of these, or as many, at least 2, as `OPERATIONS` allow.

    Args:
        chain: must know its input shape, as every chain built from a spec does.
        head: the class of the head on the chain, if there is one.
    """
    chain = copy.deepcopy(chain).eval()  # which finds what follows from the weights, as norms do, once for all copies
    x, context = inputs(chain)
    shape, samples = shape_of(x), _affordable(chain, x, context)
    x, context = _first(samples, x, context)
    found = round_trips(chain, x, context)
    shapes = chain.shapes(shape)
    layers = []
    for position, step in enumerate(chain.steps(shape)):
        before, after = part_of(shapes[position], step.path), part_of(shapes[position + 1], step.path)
        errors = {" ".join(key): result.by_step[position] for key, result in found.items()}
        count, exactness = _parameters(step.layer), step.layer.exactness
        layers.append(LayerCheck(step.name, step.title, before, after, count, exactness, errors))
    of_all = {" ".join(key): result.relative for key, result in found.items()}
    growth: dict[str, float] = {}
    if chain.exactness == "float":
        growth = {mode: _growth(found["float32", mode], found["float64", mode]) for _, mode in found}
        ok = all(times < math.inf for times in growth.values())
    else:
        ok = all(trip.bit_equal == 1.0 for trip in found.values())
    kind = chain.exactness, chain.invertible, chain.surjective
    grown = {mode: times for mode, times in growth.items() if ROUNDINGS < times < math.inf}
    return CheckResult(layers, of_all, samples, _parameters(chain), *kind, grown, caveat(chain, head), ok)


def _growth(single: RoundTrip, double: RoundTrip) -> float:
    """How many times roundings grow, in float32 and float64; infinite if the errors are none of rounding."""
    tolerances = [(trip, torch.finfo(dtype).eps) for trip, dtype in ((single, torch.float32), (double, torch.float64))]
    times = max(trip.relative / eps for trip, eps in tolerances)
    steps = (error / eps for trip, eps in tolerances for error in trip.by_step if error is not None)
    grown = all(alone <= ROUNDINGS for alone in steps) and double.relative <= SHRINKS * single.relative < math.inf
    return times if times <= ROUNDINGS or grown else math.inf  # for NaN too


def inputs(chain: Sequential) -> tuple[State, Tensor | None]:
    """Inputs that resemble pixels, on the chain's grid, and a context if the chain has one; it must know its shape."""
    if chain.declared_shape is None:
        raise InvflowError("check expects a chain built from a spec, which knows the shape of its input")
    generator = torch.Generator().manual_seed(0)
    samples = max(FEWEST, min(SAMPLES, LARGEST_BATCH // flat_size(chain.declared_shape)))
    x = make_state(lambda leaf: torch.randint(256, (samples, *leaf), generator=generator) / 256, chain.declared_shape)
    x = chain.numerics.nearest_data(x)
    context_shape = chain.declared_context_shape
    return x, make_context(lambda one: torch.randn((samples, *one), generator=generator), context_shape)


def _affordable(chain: Sequential, x: State, context: Context) -> int:
    """How many of these samples `OPERATIONS` allow, as counted in a round trip of the fewest."""
    from torch.utils.flop_counter import FlopCounterMode  # a third of a second

    few = in_dtype(chain, *_first(FEWEST, x, context), torch.float32)
    with FlopCounterMode(display=False) as counter, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again, of all samples
        round_trip(*few)
    operations: int = counter.get_total_flops()
    return max(FEWEST, min(batch_size(x), FEWEST * OPERATIONS // max(1, operations)))


def _first(samples: int, x: State, context: Context) -> tuple[State, Any]:
    return map_state(lambda leaf: leaf[:samples], x), each_entry(lambda entry: entry[:samples], context)


def _parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
