"""Any mutated document is either built or refused with a place."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

import invflow
from invflow import Limits, SpecError
from invflow.context import make_context
from invflow.state import shape_of, zeros

from .mutations import mutated

DOCUMENTS = 34 * settings().max_examples  # 10,200 in the thorough profile
HOSTILE = 8 + settings().max_examples  # 308 in the thorough profile
LIMITS = Limits(layers=100, parameters=10**5, state=10**5)


def outcome(path):
    """The chain that a file describes, or the error that refuses it."""
    try:
        spec = invflow.load_spec(path, limits=LIMITS)
        model = (invflow.build_model if spec.head or spec.prior else invflow.build)(spec, limits=LIMITS)
    except SpecError as error:
        return error
    return getattr(model, "bijection", model)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "spec.json"


@settings(max_examples=DOCUMENTS)
@given(st.integers(0, 2**64 - 1))
def test_a_mutated_document_is_built_or_refused_with_a_line(path, seed):
    text = mutated(seed)
    note(text)
    path.write_text(text)
    result = outcome(path)
    if isinstance(result, SpecError):
        assert result.errors
        lines = text.split("\n")
        for error in result.errors:
            assert 1 <= error["line"] <= len(lines)
            assert 1 <= error["column"] <= len(lines[error["line"] - 1]) + 1
            assert error["message"]
        str(result).encode()
    else:
        assert_runs(result.eval())


def assert_runs(chain):
    """A built chain takes the states that its document declares, and returns the inferred shape."""
    context = make_context(lambda one: torch.zeros(2, *one), chain.declared_context_shape)
    with torch.no_grad():
        y = chain(zeros(chain.declared_shape, batch=2), context)
        assert shape_of(y) == chain.output_shape(chain.declared_shape)
        assert shape_of(chain.inverse(y, context)) == chain.declared_shape


def test_the_mutations_make_both_kinds(path):
    """Otherwise the property above would be vacuous."""
    results = []
    for seed in range(200):
        path.write_text(mutated(seed))
        results.append(outcome(path))
    refused = [result for result in results if isinstance(result, SpecError)]
    messages = {error["message"].split(",")[0][:25] for result in refused for error in result.errors}
    assert 20 <= len(refused) <= 190
    assert len(messages) > 30


SECONDS = 30
"""Of a processor a third as fast as the one on which the budget of a document takes its ten seconds."""


def test_a_hostile_document_is_built_or_refused_before_it_costs_much():
    """In a process of its own, whose memory is measured, weights of large models excepted."""
    command = [sys.executable, "-m", "tests.spec.hostile", "0", str(HOSTILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == HOSTILE
    for one in found:
        assert one["seconds"] < SECONDS, one
        assert one["bytes"] < 2**31, one
    assert {"built", "counted"} < {one["outcome"] for one in found}
