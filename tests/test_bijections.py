"""What every registered bijection promises. A new one is tested here by being registered."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import invflow
from invflow.state import leaves, map_state, shape_of, zeros
from invflow.testing import cases, chain_cases, states
from tests.tolerances import ONE_CHAIN, ONE_LAYER, round_trip_error

TAGS = sorted(invflow.registered())
DTYPES = [torch.float64, torch.float32]
every_bijection = pytest.mark.parametrize("tag", TAGS)


def prepared(draw, case, *, batch=None, dtype=None, training=None):
    """A drawn chain in a drawn dtype and mode, an input for it, and its context."""
    dtype = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    training = draw(st.booleans()) if training is None else training
    chain = case.chain(seed=draw(st.integers(0, 99))).to(dtype).train(training)
    if training and any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in chain.modules()):
        batch = 5  # batch statistics of one number are none: torch refuses
    x = draw(states(case.shape, batch=batch, dtype=dtype))
    size = next(leaves(x)).shape[0]
    context = None if case.context_shape is None else torch.randn(size, *case.context_shape).to(dtype)
    return chain, x, context


def copied(state):
    return map_state(torch.Tensor.clone, state)


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(leaves(a), leaves(b), strict=True))


def check_round_trips(chain, x, context, tolerance):
    before = copied(x)
    with torch.no_grad():
        met = chain.trace(x, context)
        y = met[-1]
        assert round_trip_error(x, chain.inverse(y, context), met) <= tolerance
        z = chain.inverse(x, context) if shape_of(x) == shape_of(y) else None
        if z is not None:
            back = invflow.Sequential(*chain)[::-1].trace(x, context)
            assert round_trip_error(x, chain(z, context), back) <= tolerance
    assert equal(x, before), "the caller's input was changed"


@every_bijection
@given(data=st.data())
def test_round_trip_and_shapes(tag, data):
    case = data.draw(cases(tag))
    chain, x, context = prepared(data.draw, case)
    layer = chain[0]
    with torch.no_grad():
        y = layer(x, context)
        z = layer.inverse(y, context)
        again = layer(z, context)
    assert round_trip_error(x, z, [x, y]) <= ONE_LAYER
    assert round_trip_error(y, again, [x, y]) <= ONE_LAYER
    assert layer.output_shape(case.shape) == shape_of(y)
    assert layer.input_shape(shape_of(y)) == case.shape
    if context is None:
        assert invflow.Bijection.input_shape(layer, shape_of(y)) == case.shape, "the default of the base class"
    assert all(leaf.dtype == next(leaves(x)).dtype for leaf in leaves(y))


@given(data=st.data())
def test_chains_round_trip_both_ways(data):
    case = data.draw(chain_cases())
    chain, x, context = prepared(data.draw, case)
    check_round_trips(chain, x, context, ONE_CHAIN)
    assert chain.shapes(case.shape) == [shape_of(state) for state in chain.trace(x, context)]
    assert chain.input_shape(chain.output_shape(case.shape)) == case.shape


@every_bijection
@given(data=st.data())
def test_log_det_is_that_of_the_jacobian(tag, data):
    case = data.draw(cases(tag))
    chain, x, context = prepared(data.draw, case, batch=2, dtype=torch.float64, training=False)
    layer = chain[0]
    y, log_det = layer.forward_and_log_det(x, context)
    z, back = layer.inverse_and_log_det(y, context)
    assert log_det.shape == back.shape == (2,)
    assert log_det.dtype == back.dtype == torch.float64
    assert equal(layer(x, context), y), "a plain call differs from the call with the log-determinant"
    assert equal(layer.inverse(y, context), z)
    torch.testing.assert_close(back, -log_det, rtol=0, atol=1e-10)  # the same sum, at most a few hundred terms
    expected = torch.stack([jacobian_log_det(layer, sample(x, i), sample(context, i)) for i in range(2)])
    torch.testing.assert_close(log_det, expected, rtol=1e-10, atol=1e-10)  # LU of a small float64 matrix


def sample(state, i):
    return None if state is None else map_state(lambda leaf: leaf[i : i + 1], state)


def jacobian_log_det(layer, x, context):
    from invflow.state import flatten, unflatten

    shape = shape_of(x)
    jacobian = torch.func.jacrev(lambda flat: flatten(layer(unflatten(flat[None], shape), context))[0])(flatten(x)[0])
    return torch.linalg.slogdet(jacobian).logabsdet


@every_bijection
@given(data=st.data())
def test_evaluating_leaves_no_trace(tag, data):
    """Determinism, no hidden state, no random numbers consumed, and samples do not mix."""
    case = data.draw(cases(tag))
    chain, x, context = prepared(data.draw, case, batch=3, training=False)
    layer = chain[0]
    state_before = copy.deepcopy(layer.state_dict())
    generator_before = torch.get_rng_state()
    with torch.no_grad():
        y = layer(x, context)
        layer.inverse(y, context)
        assert equal(layer(x, context), y)
        moved = map_state(lambda leaf: leaf.clone().index_fill(0, torch.tensor([2]), float("nan")), x)
        assert equal(sample(layer(moved, context), 0), sample(y, 0)), "a NaN in one sample reached another"
    assert torch.equal(torch.get_rng_state(), generator_before)
    assert all(torch.equal(value, state_before[key]) for key, value in layer.state_dict().items())


@every_bijection
@given(data=st.data())
def test_modules_copy_pickle_and_load(tag, data):
    case = data.draw(cases(tag))
    chain, x, context = prepared(data.draw, case, training=False)
    y = chain(x, context)
    assert equal(pickle.loads(pickle.dumps(chain))(x, context), y)
    assert equal(copy.deepcopy(chain)(x, context), y)
    other = case.chain(seed=1234).to(next(leaves(x)).dtype).eval()
    assert list(other.state_dict()) == list(chain.state_dict())
    other.load_state_dict(chain.state_dict())
    assert equal(other(x, context), y)
    assert equal(chain[::-1].inverse(x, context), y)


@every_bijection
@given(data=st.data())
def test_meta_device(tag, data):
    case = data.draw(cases(tag))
    with torch.device("meta"):
        layer = case.bijection()
        context = None if case.context_shape is None else torch.zeros(2, *case.context_shape)
        y = layer.eval()(zeros(case.shape, 2), context)
    assert all(leaf.device.type == "meta" for leaf in leaves(y))
    assert shape_of(y) == layer.output_shape(case.shape)


@every_bijection
def test_examples_are_there_and_build(tag):
    examples = invflow.registered()[tag].examples
    assert examples, "a bijection without examples is neither documented nor tested"
    for fields, shape in examples:
        invflow.build({"input": {"shape": shape}, "layers": [{"type": tag, **fields}]})


@every_bijection
def test_compiles_both_ways(tag):
    fields, shape = invflow.registered()[tag].examples[-1]
    layer = invflow.build({"input": {"shape": shape}, "layers": [{"type": tag, **fields}]})[0].eval()
    x = map_state(torch.randn_like, zeros(shape, 2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inverse = torch.compile(layer.inverse, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y = layer(x)
        assert equal(compiled(x), y)
        assert equal(inverse(y), layer.inverse(y))
