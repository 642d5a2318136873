"""What each level promises, of random chains of everything that can give it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from invflow.testing import chain_cases, check_case, conditions

FEW_LAYERS = 4
"""A chain that snaps gives data back while its error is below half a step: random chains may be ill-conditioned."""


@st.composite
def cases_in(draw, mode, max_depth=12):
    numerics = {"mode": mode, "frac_bits": draw(st.sampled_from([4, 8, 12, 16]))}
    if mode == "exact":
        numerics["activation_bits"] = draw(st.integers(2, 12))
    if mode == "grid":
        numerics["conditioner_dtype"] = draw(st.sampled_from([None, "float64"]))
    return draw(chain_cases(max_depth, numerics))


@given(case=cases_in("grid"), setting=conditions())
def test_chains_on_a_grid_lose_no_bit(case, setting):
    check_case(case, setting)


@given(case=cases_in("exact"), setting=conditions())
def test_exact_chains_lose_no_bit_however_they_are_computed(case, setting):
    check_case(case, setting)


@given(case=cases_in("snap", FEW_LAYERS), setting=conditions())
def test_chains_that_snap_give_data_back(case, setting):
    check_case(case, setting)
