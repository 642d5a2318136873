"""The promises of every registered bijection. Registering a new one is enough to test it here."""

from __future__ import annotations

import pytest
from hypothesis import given

import invflow
from invflow.state import shape_of
from invflow.testing import Setting, cases, chain_cases, check_case, conditions, property_tests
from invflow.testing.trial import Subject

TAGS = sorted(invflow.registered())

test_every_bijection_keeps_every_promise = property_tests(*TAGS)


@given(case=chain_cases(max_depth=12), setting=conditions())
def test_random_chains_keep_every_promise(case, setting):
    check_case(case, setting)


@given(case=chain_cases())
def test_a_chain_tells_the_shapes_of_its_states(case):
    chain = case.chain()
    trial = Subject(chain, case.shape, case.context_shape).trial(Setting())
    assert chain.shapes(case.shape) == [shape_of(state) for state in trial.bijection.trace(trial.x, trial.context)]
    if chain.invertible:
        assert chain.input_shape(chain.output_shape(case.shape)) == case.shape


@pytest.mark.parametrize("tag", TAGS)
def test_the_default_input_shape_is_right_too(tag):
    @given(case=cases(tag))
    def agrees(case):
        layer = case.bijection()
        if case.context_shape is None and layer.invertible:  # the default runs the inverse, which may need its context
            assert invflow.Bijection.input_shape(layer, layer.output_shape(case.shape)) == case.shape

    agrees()
