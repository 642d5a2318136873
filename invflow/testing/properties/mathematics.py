"""What makes a map a bijection with the right log-determinant: round trips, shapes, volume, gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from operator import attrgetter

import torch
from torch import Tensor

from ...bijection import Bijection
from ...context import each_entry
from ...diagnostics.rounding import condition_number, in_double, trace
from ...measures import derivatives, difference, jacobian, joint_jacobian, magnitude, slopes_of, with_context
from ...state import (
    Shape,
    State,
    batch_size,
    flat_size,
    flatten,
    leaves,
    make_state,
    map_state,
    sample,
    shape_of,
    unflatten,
)
from ...wires import Wired
from ..report import shown
from ..tolerances import (
    DOMAIN_ROUNDINGS,
    EXACT,
    GRADIENT,
    JUDGED,
    LOG_DET,
    LOG_DET_CONDITION,
    ROUND_TRIP_ROUNDINGS,
    eps,
)
from ..trial import DOMAINS, KINDS, Kind, Trial, onto_grid
from .base import (
    FLOAT32_EVAL,
    SPREAD,
    Call,
    all_calls,
    both_ways,
    differentiated,
    expect,
    has_exact_log_det,
    inverts_to_rounding,
    is_surjective,
    lost,
    promised,
    relative,
    roundings,
    same_numbers,
    same_states,
)

SPREAD_KINDS: tuple[Kind, ...] = ("normal", "huge", "tiny")
_ZOOMS = 3
_SUSPECTS = 3
_NEIGHBOURS = 256
_SHAKE = 2**10  # of the noise that finds ill-conditioned inputs, in roundings
_JACOBIAN_NUMBERS = 2**16  # in all Jacobians of a batch

OFF_KINKS = tuple(kind for kind in KINDS if kind != "zeros")
"""Zeros lie on the kinks of a net without biases: an inverse that is off by a rounding there has another Jacobian."""


IN_FLOAT64 = {"batch": 2, "dtype": torch.float64}
"""Log-determinants are measured in train mode too."""


def _round_trip_tolerance(trial: Trial) -> float:
    return EXACT if trial.is_exact else roundings(ROUND_TRIP_ROUNDINGS)(trial)


def _inverse_tolerance(trial: Trial) -> float:
    """As for `round_trip`, but a chain that snaps to the data's grid recomputes the image in real numbers."""
    return roundings(ROUND_TRIP_ROUNDINGS)(trial) if trial.snaps else _round_trip_tolerance(trial)


@promised(_round_trip_tolerance, inverts_to_rounding, needs={})
def round_trip(trial: Trial) -> float:
    """inverse(forward(x)) is x, in units of the largest magnitude met and of the condition number."""
    y = trial.bijection(trial.x, trial.context)
    back = trial.bijection.inverse(y, trial.context)
    expect(shape_of(back) == trial.shape, f"the shape {trial.shape} back, got {shape_of(back)}")
    return lost(trial, y, back, _round_trip_tolerance(trial))


@promised(_inverse_tolerance, inverts_to_rounding, is_surjective, needs={}, start="y")
def inverse_round_trip(trial: Trial) -> float:
    """forward(inverse(y)) is y, in units of the largest magnitude met and of the condition number."""
    y = trial.image
    x = trial.bijection.inverse(y, trial.context)
    again = trial.bijection(x, trial.context)
    expect(shape_of(again) == shape_of(y), f"the shape {shape_of(y)} back, got {shape_of(again)}")
    return relative(trial, difference(y, again), [x, y], _inverse_tolerance(trial), backwards=True)


@promised(_round_trip_tolerance, inverts_to_rounding, needs={})
def context(trial: Trial) -> float:
    """Forward and inverse use the context of the same call, not that of an earlier one."""
    bijection, x = trial.bijection, trial.x
    first, second = bijection(x, trial.context), bijection(x, trial.other_context)
    given, allowed = (trial.context, trial.other_context), _round_trip_tolerance(trial)
    images = zip((first, second), given, strict=True)
    return max(lost(dataclasses.replace(trial, context=c), y, bijection.inverse(y, c), allowed) for y, c in images)


@promised(_round_trip_tolerance, inverts_to_rounding, needs=SPREAD, kinds=SPREAD_KINDS, trials=3)
def round_trip_everywhere(trial: Trial) -> float:
    """inverse(forward(x)) is x for inputs without a gap, and near those for which a search finds it off the most."""
    allowed, found = _round_trip_tolerance(trial), 0.0
    for zoom in range(_ZOOMS):
        y = trial.bijection(trial.x, trial.context)
        back = trial.bijection.inverse(y, trial.context)
        errors = _unexplained(trial, y, back, allowed)
        for i in _worst(errors):
            one, image = _at_sample(trial, i), sample(y, i)
            error = lost(one, image, sample(back, i), allowed)
            found = max(found, _judged(error, allowed, one, "the input back"))
        trial = _around(trial, int(errors.argmax()), 16.0 ** -(zoom + 1))
    return found


def _worst(errors: Tensor) -> list[int]:
    """The samples with the largest errors, to be judged by their condition number."""
    return errors.nan_to_num(nan=torch.inf).topk(min(_SUSPECTS, len(errors))).indices.tolist()


def _judged(off: float, allowed: float, trial: Trial, expected: str) -> float:
    expect(off <= allowed, f"{expected}, which is off by {off:.3g} ({allowed:.3g} is allowed) at x = {shown(trial.x)}")
    return off


def _at_sample(trial: Trial, i: int) -> Trial:
    return dataclasses.replace(trial, x=sample(trial.x, i), context=sample(trial.context, i))


def _around(trial: Trial, i: int, part: float) -> Trial:
    """The trial with inputs near sample i: on the way to others, of which only this part is gone."""
    others, center = flatten(trial.x)[:_NEIGHBOURS], flatten(sample(trial.x, i))
    near = onto_grid(unflatten(center + part * (others - center), trial.shape), trial.bijection)
    context = each_entry(lambda entry: entry[[i] * len(others)], trial.context)
    return dataclasses.replace(trial, x=near, context=context)


def _unexplained(trial: Trial, y: State, back: State, allowed: float) -> Tensor:
    """The error of each sample's round trip; where it is no rounding, divided by how much a rounding of y grows."""
    x, image, returned = (flatten(state).double() for state in (trial.x, y, back))
    unit = torch.maximum(x.abs().amax(1), image.abs().amax(1)).clamp(min=1)
    errors = ((returned - x).abs().amax(1) / unit).nan_to_num(nan=torch.inf)
    if trial.is_exact or not bool((errors > allowed).any()):
        return errors
    step = _SHAKE * unit * eps(trial.setting.dtype)
    shaken = (image + step[:, None]).to(trial.setting.dtype)
    other = flatten(trial.bijection.inverse(unflatten(shaken, shape_of(y)), trial.context)).double()
    growth = (other - returned).abs().amax(1) / step
    return errors / growth.nan_to_num(nan=1.0).clamp(min=1)


@promised(EXACT)
def shapes(trial: Trial) -> None:
    """output_shape and input_shape return the shapes of what forward and inverse return."""
    bijection = trial.bijection
    y = bijection(trial.x, trial.context)
    told = bijection.output_shape(trial.shape)
    numbers, made = flat_size(trial.shape), flat_size(shape_of(y))
    if not bijection.invertible:
        expect(told == shape_of(y), f"output_shape({trial.shape}) to be that of forward, {shape_of(y)}, got {told}")
        return
    x = bijection.inverse(trial.image, trial.context)
    expect(made == numbers if bijection.surjective else made >= numbers, f"{numbers} numbers of {numbers}, got {made}")
    expect(told == shape_of(y), f"output_shape({trial.shape}) to be that of forward, {shape_of(y)}, got {told}")
    # A bijection that cannot run without its context need not know the shape: the builder passes it.
    if trial.context is None:
        told = bijection.input_shape(shape_of(y))
        expect(told == shape_of(x), f"input_shape({shape_of(y)}) to be that of inverse, {shape_of(x)}, got {told}")
    expect(batch_size(y) == batch_size(x) == trial.setting.batch, f"a batch of {trial.setting.batch} both ways")


def sample_jacobians(trial: Trial) -> Tensor:
    """The dense Jacobian of each sample, by autodiff."""
    calls = [with_context(trial.bijection, sample(trial.context, i)) for i in range(batch_size(trial.x))]
    return torch.stack([jacobian(call, sample(trial.x, i)) for i, call in enumerate(calls)])


def _blocks(joint: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of the Jacobian of a batch, that of each sample, and that of each sample with respect to the others."""
    blocks = joint.reshape(size, len(joint) // size, size, -1).transpose(1, 2)
    same = torch.eye(size, dtype=torch.bool)
    return blocks[same], blocks[~same]


def _apart(trial: Trial, found: Tensor, expected: Tensor) -> Tensor:
    """The relative errors of log-determinants; 0 for that of a flat map whose dense Jacobian is below all numbers."""
    errors = (found - expected).abs() / expected.abs().clamp(min=1)
    return errors.masked_fill(expected == -math.inf, 0.0) if trial.bijection.may_be_flat else errors


def _dense_log_det(trial: Trial) -> tuple[Tensor, bool]:
    """The log-determinants of the dense Jacobians, and whether there is a single one because samples mix."""
    if not trial.setting.training:
        return torch.linalg.slogdet(sample_jacobians(trial)).logabsdet, False
    joint = joint_jacobian(with_context(trial.bijection, trial.context), trial.x)
    own, others = _blocks(joint, batch_size(trial.x))
    mixes = bool((others != 0).any())  # then only the sum over the batch is a log-determinant
    return torch.linalg.slogdet(joint if mixes else own).logabsdet, mixes


def _log_det_error(trial: Trial, log_det: Tensor) -> float:
    expected, mixes = _dense_log_det(trial)
    error = float(_apart(trial, log_det.sum() if mixes else log_det, expected).max())
    if not error > LOG_DET:
        return error
    bijection, x, context = trial.bijection, trial.x, trial.context
    condition = condition_number(bijection, x, context)
    if bijection.may_be_flat and not condition < 1 / eps(trial.setting.dtype):
        return 0.0  # a slope was rounded away beside others, and the determinant is one of roundings
    # Beside huge numbers a state is off by their roundings, and its log-determinant by what these make of it; so is
    # that of a state at a kink, of which one of two opposite steps is on the other side.
    reach = roundings(ROUND_TRIP_ROUNDINGS)(trial) * magnitude(*trace(bijection, x, context))
    flat = flatten(x)
    step = reach * torch.randn(flat.shape, generator=torch.Generator().manual_seed(0), dtype=flat.dtype)
    shaken = [dataclasses.replace(trial, x=unflatten(flat + way * step, trial.shape)) for way in (1, -1)]
    moved = sum(float(_apart(trial, _dense_log_det(one)[0], expected).max()) for one in shaken)
    return error / max(1.0, condition / LOG_DET_CONDITION, moved / LOG_DET)


@differentiated(LOG_DET, has_exact_log_det, is_surjective, needs=IN_FLOAT64, dense=True)
def log_det(trial: Trial) -> float:
    """The forward log-determinant is log |det dy/dx| of the dense Jacobian by autodiff."""
    _, found = trial.bijection.forward_and_log_det(trial.x, trial.context)
    return _log_det_error(trial, found.detach())


@differentiated(
    LOG_DET, inverts_to_rounding, has_exact_log_det, is_surjective, needs=IN_FLOAT64, kinds=OFF_KINKS, dense=True
)
def inverse_log_det(trial: Trial) -> float:
    """The inverse log-determinant is log |det dx/dy|: the negative of the forward one at x."""
    y = map_state(torch.Tensor.detach, trial.bijection(trial.x, trial.context))
    x, found = trial.bijection.inverse_and_log_det(y, trial.context)
    if trial.bijection.may_be_flat:  # it returned some x of the same image, and its log-determinant is the one there
        trial = dataclasses.replace(trial, x=map_state(torch.Tensor.detach, x))
    return _log_det_error(trial, -found.detach())


@differentiated(
    LOG_DET,
    inverts_to_rounding,
    has_exact_log_det,
    is_surjective,
    needs={**SPREAD, "dtype": torch.float64},
    kinds=("normal", "huge"),
    trials=2,
    dense=True,
)
def log_det_everywhere(trial: Trial) -> float:
    """Log-determinants of both directions are those of the dense Jacobian for inputs without a gap."""
    count = max(16, _JACOBIAN_NUMBERS // max(1, flat_size(trial.shape)) ** 2)
    step = batch_size(trial.x) // count | 1  # odd: it leaves out no sort of sample
    context = each_entry(lambda entry: entry[::step], trial.context)
    trial = dataclasses.replace(trial, x=map_state(lambda leaf: leaf[::step], trial.x), context=context)
    # Samples do not mix in eval mode. Log-determinants take more than states, and would take gigabytes with a graph.
    flat, call = flatten(trial.x), with_context(trial.bijection, context)
    sums = slopes_of(lambda at: flatten(call(unflatten(at, trial.shape))).sum(0), flat)
    expected = torch.linalg.slogdet(sums.movedim(0, 1)).logabsdet
    with torch.no_grad():
        _, forward = trial.bijection.forward_and_log_det(trial.x, context)
        y = trial.bijection(trial.x, context)
        _, backward = trial.bijection.inverse_and_log_det(y, context)
    found = 0.0
    both = (forward,) if trial.bijection.may_be_flat else (forward, -backward)
    for log_det in both:  # a flat map returns another x, whose log-determinant is another
        for i in _worst(_apart(trial, log_det, expected)):
            one = _at_sample(trial, i)
            off = _log_det_error(one, log_det[i : i + 1])
            found = max(found, _judged(off, LOG_DET, one, "the log-determinant"))
    return found


@promised(EXACT, is_surjective, needs={}, with_grad=True)
def log_det_form(trial: Trial) -> None:
    """Log-determinants have the shape (batch,), the dtype and the device of the input, and are finite."""
    like = next(leaves(trial.x))
    for name, call, state in both_ways(trial):
        _, found = call(state, trial.context)
        expect(isinstance(found, Tensor), f"{name} to return a tensor second, got {type(found).__name__}")
        expect(found.shape == like.shape[:1], f"{name}: shape {tuple(like.shape[:1])}, got {tuple(found.shape)}")
        expect(found.dtype == like.dtype, f"{name}: {like.dtype}, got {found.dtype}")
        expect(found.device == like.device, f"{name}: device {like.device}, got {found.device}")
        expect(bool(found.isfinite().all()), f"{name}: finite log-determinants, got {found.tolist()}")


@promised(same_states, attrgetter("invertible"))
def plain_call(trial: Trial) -> float:
    """A plain call returns the same state as the call with the log-determinant."""
    found = []
    for (_, call, state), plain in zip(
        both_ways(trial), (trial.bijection.forward, trial.bijection.inverse), strict=True
    ):
        found.append((plain(state, trial.context), call(state, trial.context)[0]))
    return same_numbers(trial, found)


def _is_bounded(bijection: Bijection) -> bool:
    """Whether it is one layer whose inputs or outputs are known not to be all real numbers."""
    return not isinstance(bijection, Wired) and bool({bijection.domain, bijection.codomain} - {"reals", None})


@promised(roundings(DOMAIN_ROUNDINGS), _is_bounded, has_exact_log_det, needs=FLOAT32_EVAL, kinds=("normal",), trials=2)
def whole_domain(trial: Trial) -> float:
    """Up to the ends of its domain float32 agrees with float64; outside, only what comes back has a density."""
    single, context = trial.bijection, sample(trial.context, 0)
    double, _, precise_context = in_double(single, trial.x, context)
    ways = [("forward", single.domain, trial.shape), ("inverse", single.codomain, single.output_shape(trial.shape))]
    errors = [0.0]
    for way, domain, shape in ways if single.codomain else ways[:1]:
        there, back = (f"{name}_and_log_det" for name in (way, "inverse" if way == "forward" else "forward"))
        inside, outside = (_filled(values, shape) for values in _float32_numbers(*DOMAINS[domain or "reals"]))
        image = with_context(getattr(single, there), context)(inside)[0]
        for name, state in ((there, inside), (back, image)):
            found = with_context(getattr(single, name), context)(state)
            right = with_context(getattr(double, name), precise_context)(map_state(torch.Tensor.double, state))
            errors += [
                _relative_error(a, b, flat_size(shape)) for a, b in zip(leaves(found), leaves(right), strict=True)
            ]
        with contextlib.suppress(ValueError):  # a layer may refuse what is outside
            made, log_det = with_context(getattr(single, there), context)(outside)
            returned = with_context(getattr(single, back), context)(made)[0]
            same = (flatten(returned) - flatten(outside)).abs().amax(1) <= JUDGED
            expect(
                bool((same | log_det.isnan() | (log_det == -math.inf)).all()),
                f"{there} to return -inf outside ({domain}), got {log_det.tolist()}",
            )
    return max(errors)


def _float32_numbers(low: float, high: float) -> tuple[Tensor, Tensor]:
    """Numbers of every exponent, from 0 and from both ends, inside an open interval; and some outside."""
    generator = torch.Generator().manual_seed(0)
    mantissas = 1 + torch.rand(8, generator=generator, dtype=torch.float64)
    sizes = (mantissas[:, None] * 2.0 ** torch.arange(-149, 128, dtype=torch.float64)).flatten()
    ends = [end for end in (low, high) if math.isfinite(end)]
    found = torch.cat([end + sign * sizes for end in (0.0, *ends) for sign in (1, -1)]).float()
    beyond = [end + step for end in ends for step in (-2.0, 2.0) if not low <= end + step <= high]
    return found[(found > low) & (found < high)], torch.tensor(beyond)


def _filled(values: Tensor, shape: Shape) -> State:
    """A state with a sample for each value, which is all of its numbers."""
    return make_state(lambda leaf: values.reshape(-1, *(1 for _ in leaf)).expand(-1, *leaf), shape)


def _relative_error(found: Tensor, right: Tensor, numbers: int) -> float:
    """The largest error relative to max(1, |right|), for a log-determinant as many as the numbers that it sums."""
    counted = right.abs() < torch.finfo(torch.float32).max
    least = numbers if right.dim() == 1 else 1
    error = (found.double() - right).abs() / right.abs().clamp(min=least)
    return float(error[counted].nan_to_num(nan=math.inf).max())


def _is_smooth(bijection: Bijection) -> bool:
    """Whether the map does not round: gradients through a rounding are straight-through, not those of differences."""
    return not bijection.numerics.step


def _gradient_error(trial: Trial, call: Call, start: State) -> float:
    """The error of the gradients of what a call returns last.

    It is the smallest error of three neighbouring points: a kink between two evaluations is not a wrong gradient.
    """
    weights = [weight for weight in trial.bijection.parameters() if weight.requires_grad]
    errors = []
    for nearby in (1.0, 0.999, 0.998):
        state = map_state(lambda leaf, factor=nearby: leaf * factor, start)  # type: ignore[misc]
        generator = torch.Generator().manual_seed(trial.setting.seed + 1)
        errors.append(max(derivatives(lambda x: call(x, trial.context)[-1], state, weights, generator)))
        if errors[-1] <= GRADIENT:
            break
    return min(errors)


@differentiated(GRADIENT, has_exact_log_det, _is_smooth, kinds=("normal",), trials=4)
def gradients(trial: Trial) -> float:
    """Gradients of y and of the log-determinant, by inputs and weights, are those of central differences."""
    calls = [call for name, call, _ in all_calls(trial) if name.startswith("forward")]
    return max(_gradient_error(trial, call, trial.x) for call in calls)


@differentiated(GRADIENT, inverts_to_rounding, has_exact_log_det, _is_smooth, kinds=("normal",), trials=4, start="y")
def inverse_gradients(trial: Trial) -> float:
    """Gradients of x and of the inverse log-determinant, by y and weights, are those of central differences."""
    calls = [(call, map_state(torch.clone, y)) for name, call, y in all_calls(trial) if name.startswith("inverse")]
    return max(_gradient_error(trial, call, y) for call, y in calls)
