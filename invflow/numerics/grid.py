r"""Arithmetic on a grid of powers of two, without one wrong bit.

A float of p significand bits (24 in float32, 53 in float64) holds every multiple of 2^-k whose magnitude is at most
2^(p-k). Let b be on the grid and r any integer that the float holds, and let ``u = fl(b + 2^-k r)``.

**Lemma.** If ``|u| < 2^(p-k)`` then u is ``b + 2^-k r`` itself, and ``fl(u - 2^-k r)`` is b.
Proof. The true sum s is a multiple of 2^-k. Rounding is monotone and 2^(p-k) is a float, so ``|s| >= 2^(p-k)`` would
give ``|u| >= 2^(p-k)``: hence ``|s| < 2^(p-k)``, s is a float, and u = s. Then the true difference is b, a float.

The bound has to be strict: just above it, ``2^(p-k) + 2^-k`` rounds to 2^(p-k) and would pass. So one check of the
result is enough for each addition, whatever r is, if the input of the chain is on the grid: b is an earlier result.

Zeros count as one number: -0.0 comes back as 0.0 or as itself. `conditioners.evaluate` hides the sign from nets that
might depend on it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._torch import transforms_active
from ..errors import NumericsError
from ..state import State, map_state


def limit(dtype: torch.dtype, frac_bits: int) -> float:
    """2^(p-k): a float of this dtype holds every multiple of 2^-frac_bits up to it.

    Examples:
        >>> limit(torch.float32, 16), limit(torch.float64, 16) == 2.0**37
        (256.0, True)
    """
    return 2.0 / torch.finfo(dtype).eps * 2.0**-frac_bits


def round_through(x: Tensor) -> Tensor:
    """Rounds to integers, half to even, in place if no gradient is recorded; the gradient is that of the identity.

    Nobody but the caller may hold x.
    """
    if not torch.is_grad_enabled():
        return x.round() if traced() else x.round_()
    fixed = x.detach()
    return fixed.round() + (x - fixed)  # x - x is 0.0 without a rounding


def steps(x: Tensor, frac_bits: int, dtype: torch.dtype) -> Tensor:
    """The nearest multiple of 2^-frac_bits, as an integer of this dtype."""
    counted = round_through(x * 2.0**frac_bits)
    return counted if counted.dtype == dtype else counted.to(dtype)


def snap(state: State, frac_bits: int) -> State:
    """The nearest state on the grid; the gradient is that of the identity.

    Examples:
        >>> snap(torch.tensor([0.3, -0.9]), 2).tolist()
        [0.25, -1.0]
    """
    return map_state(lambda leaf: steps(leaf, frac_bits, leaf.dtype) * 2.0**-frac_bits, state)


def add(who: str, b: Tensor, r: Tensor, frac_bits: int, sign: int = 1) -> Tensor:
    """``b + sign * 2^-frac_bits r``, exact or an error: see the lemma above.

    Args:
        who: named in the error.
        b: on the grid.
        r: integers.
        frac_bits: of the grid.
        sign: 1 or -1.

    Raises:
        NumericsError: the result is too large for its dtype to hold the grid.
    """
    return _in_range(who, torch.add(b, r, alpha=sign * 2.0**-frac_bits), frac_bits)


def enter(state: State, mode: str, frac_bits: int, *, rounds: bool) -> State:
    """A state as it enters a chain: on the grid and within its range.

    Args:
        state: the state.
        mode: the name of the numerics.
        frac_bits: of the grid.
        rounds: whether a state off the grid is rounded rather than refused.

    Raises:
        NumericsError: the state is off the grid and not rounded, or too large.
    """

    def checked(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise NumericsError(f"a chain in {mode} numerics expects floating-point states, got {x.dtype}")
        if rounds:
            x = snap(x, frac_bits)  # type: ignore[assignment]
        elif traced():
            x = torch.where((x.detach() * 2.0**frac_bits).frac() == 0, x, torch.nan)
        elif not x.is_meta and x.numel():
            fractions = (x.detach() * 2.0**frac_bits).frac_()
            # The sum of magnitudes: one pass, in which nothing cancels and nothing underflows.
            if torch.linalg.vector_norm(fractions, 1).item() != 0.0:
                off = x.detach()[~(fractions == 0)]  # NaN too
                raise NumericsError(
                    f"a chain in {mode} numerics expects multiples of 2^-{frac_bits}, got {off[0].item()!r} and "
                    f"{len(off) - 1} other such numbers; divide pixels by 256, not by 255, or let "
                    '"entry": "snap" round what enters'
                )
        return _in_range("the state that enters", x, frac_bits)

    return map_state(checked, state)


def _in_range(who: str, x: Tensor, frac_bits: int) -> Tensor:
    """The tensor itself, if its dtype holds the grid up to its largest number."""
    bound = limit(x.dtype, frac_bits)
    if traced():  # nothing can be raised from a graph, and NaN spreads to all that follows
        return torch.where(x.abs() < bound, x, torch.nan)
    if x.is_meta or not x.numel():
        return x
    extremes = torch.aminmax(x.detach())  # both are NaN if any number is
    low, high = extremes.min.item(), extremes.max.item()
    if -bound < low and high < bound:
        return x
    largest = max(-low, high)
    if not math.isfinite(largest):
        raise NumericsError(f"{who}: expected numbers on the grid of 2^-{frac_bits}, got {largest}")
    fitting = frac_bits - math.floor(math.log2(largest / bound)) - 1
    fixes = [f"frac_bits {fitting}" if fitting >= 0 else "smaller states"]
    fixes += ["float64"] if x.dtype != torch.float64 else []
    raise NumericsError(
        f"{who}: reaches {largest:.6g}, but {str(x.dtype).removeprefix('torch.')} holds multiples of 2^-{frac_bits} "
        f"below {bound:.6g} only; use {' or '.join(fixes)}"
    )


def traced() -> bool:
    """Whether the code is being traced, by torch.compile or torch.func, so that no value can be read."""
    return torch.compiler.is_compiling() or transforms_active()
