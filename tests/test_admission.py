"""A model refuses what it was not built for: in one line, by name, at every entry point."""

from __future__ import annotations

import copy
import functools
import operator
from pathlib import Path

import numpy as np
import pytest
import torch

import invflow
from invflow import Classifier, Flow, InvflowError, Sequential, ShapeError
from invflow.diagnostics.images_back import images_back
from invflow.diagnostics.interpolation import interpolate
from invflow.diagnostics.reconstruction import reconstruction_errors
from invflow.diagnostics.rounding import condition_number
from invflow.diagnostics.roundtrip import errors_on_the_way_back, round_trip, round_trips
from invflow.diagnostics.solver_plot import inverse_errors
from invflow.models import StandardNormal
from invflow.models.freezing import freeze
from invflow.numerics import Snap
from invflow.state import leaves, map_state, shape_of, zeros

SHIPPED = {path.name: path for path in sorted((Path(__file__).parents[1] / "specs").glob("*.json"))}
PAIR = {"type": "affine_coupling", "net": {"type": "mlp", "hidden": [4]}}
CONTEXT = {
    "input": {"shape": [4], "context_shape": [2]},
    "layers": [{"type": "split"}, PAIR, {"type": "sequential", "layers": [PAIR]}, {"type": "merge"}],
    "prior": {"type": "standard_normal"},
}
OTHERS = {
    "context": CONTEXT,
    "pair": {"input": {"shape": [[2], [3]]}, "layers": [PAIR], "prior": {"type": "standard_normal"}},
    "reversible": {**CONTEXT, "backprop": "reversible"},
}
MODELS = {**SHIPPED, **OTHERS}


@functools.cache
def built(name):
    torch.manual_seed(0)
    return invflow.build_model(MODELS[name]).eval()


def batches(model, count=3):
    """A valid input, features and a context."""
    chain = model.bijection
    shape = chain.declared_context_shape
    return (
        zeros(chain.declared_shape, count),
        zeros(chain.declared_output_shape, count),
        None if shape is None else torch.zeros(count, *shape),
    )


# Each calls a model with a state and a context, from the front or from the back.
FORWARD = {
    "the chain": lambda model, x, c: model.bijection(x, c),
    "forward": lambda model, x, c: model.bijection.forward(x, c),
    "forward_and_log_det": lambda model, x, c: model.bijection.forward_and_log_det(x, c),
    "trace": lambda model, x, c: model.bijection.trace(x, c),
    "initialize": lambda model, x, c: model.bijection.initialize(x, c),
    "the model": lambda model, x, c: model(x, c),
    "features": lambda model, x, c: model.features(x, c) if isinstance(model, Classifier) else model.log_prob(x, c),
    "freeze": lambda model, x, c: freeze(model, x, Snap(mode="snap"), c),
    "round_trip": lambda model, x, c: round_trip(model.bijection, x, c),
    "errors_on_the_way_back": lambda model, x, c: errors_on_the_way_back(model.bijection, x, c),
    "reconstruction_errors": lambda model, x, c: reconstruction_errors(model.bijection, x, c),
    "condition_number": lambda model, x, c: condition_number(model.bijection, x, c),
}
CONVERTING = {  # these convert to the dtypes that they measure in
    "round_trips": lambda model, x, c: round_trips(model.bijection, x, c),
    "inverse_errors": lambda model, x, c: inverse_errors(model.bijection, x, c),
}
ALONE = {  # without a context, on one tensor
    "images_back": lambda model, x, c: images_back(model.bijection, x),
    "interpolate": lambda model, x, c: interpolate(model.bijection, x, x, 2),
}
BACKWARD = {
    "inverse": lambda model, z, c: model.bijection.inverse(z, c),
    "inverse_and_log_det": lambda model, z, c: model.bijection.inverse_and_log_det(z, c),
    "the model's inverse": lambda model, z, c: model.inverse(z, c),
}


def mapped(change):
    return lambda state: map_state(change, state)


KINDS = {
    "numpy": (mapped(lambda leaf: leaf.numpy()), "got ndarray; convert it with torch.from_numpy"),
    "list": (mapped(lambda leaf: leaf.tolist()), "got list; pass a tensor"),
    "list of tensors": (lambda state: list(leaves(state)), "got list; pass a tuple of tensors"),
    "None": (lambda state: None, "got NoneType"),
    "empty": (lambda state: (), "expects a"),
    "scalar": (lambda state: torch.tensor(0.0), "got a tensor without a batch"),
    "unbatched": (mapped(lambda leaf: leaf[0]), "expects a|interpolate"),
    "wider": (mapped(lambda leaf: torch.cat([leaf, leaf], -1)), "got shape"),
    "narrower": (mapped(lambda leaf: leaf[..., :-1]), "got shape"),
    "more dimensions": (mapped(lambda leaf: leaf[..., None]), "got shape"),
    "as many": (lambda state: (next(leaves(state)),) * len(shape_of(state)), "got shape|got tuple|expects a"),
    "nested": (lambda state: (state, state), "got shape|got tuple"),
}
DTYPES = {
    name: (mapped(operator.methodcaller("to", getattr(torch, name))), rf"got torch\.{name}")
    for name in ("int64", "uint8", "bool", "float64", "float16", "bfloat16", "complex64")
}


def refused(call, *given, match=None):
    with pytest.raises(InvflowError, match=match) as found:
        call(*given)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", MODELS)
def test_other_states_are_refused(name):
    model = built(name)
    x, z, context = batches(model)
    entries = {**FORWARD, **CONVERTING, **(ALONE if context is None and isinstance(x, torch.Tensor) else {})}
    if model.bijection.exactness == "exact":  # frozen as it is
        del entries["freeze"]
    for change, match in KINDS.values():
        for call in entries.values():
            refused(call, model, change(x), context, match=None if call in ALONE.values() else match)
        for call in BACKWARD.values():
            refused(call, model, change(z), context, match=match)


@pytest.mark.parametrize("name", MODELS)
def test_other_dtypes_are_refused(name):
    model = built(name)
    x, z, context = batches(model)
    # A chain without weights only moves numbers, of any dtype; the head on it is a network.
    entries = FORWARD if any(True for _ in model.bijection.parameters()) else {"the model": FORWARD["the model"]}
    for change, match in DTYPES.values():
        for call in entries.values():
            refused(call, model, change(x), context, match=match)
        for call in BACKWARD.values() if len(entries) > 1 else ():
            refused(call, model, change(z), context, match=match)


def test_an_exact_chain_knows_the_dtype_of_its_constants():
    model = built("irevnet_mnist_exact.json")
    assert not list(model.bijection.parameters())
    double = copy.deepcopy(model).double()
    x, _, _ = batches(double)
    refused(double, x, match="expects torch.float64, which its weights have, got torch.float32")
    assert double(x.double()).dtype == torch.float64


def test_a_load_that_assigns_other_dtypes_is_known(tmp_path):
    single = copy.deepcopy(built("realnvp_moons.json"))
    model = copy.deepcopy(single).double()
    invflow.save(model, tmp_path)
    x, _, _ = batches(model)
    for chain in (invflow.load(tmp_path).bijection, single.bijection):
        chain.load_state_dict(model.bijection.state_dict(), assign=True)
        refused(chain, x.float(), match="expects torch.float64, which its weights have, got torch.float32")
        assert chain(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", OTHERS)
def test_contexts(name):
    model = built(name)
    x, z, context = batches(model)
    every = [(call, x) for call in (*FORWARD.values(), *CONVERTING.values())] + [(c, z) for c in BACKWARD.values()]
    if context is None:
        for call, state in every:
            refused(call, model, state, torch.zeros(3, 2), match="the chain expects no context, got one|condition")
        refused(model.sample, 3, torch.zeros(3, 2), match="the chain expects no context, got one")
        return
    wrong = {
        None: r"expects a context of shape \(2,\), got none",
        "rows": "expected one row, or one for each of 3 samples, got 2 rows",
        "width": r"the context of the chain expects .* of shape \(2,\), got shape \(3,\)",
        "numpy": "got ndarray",
        "list": "got list",
        "unbatched": "without its batch",
    }
    contexts = {
        None: None,
        "rows": context[:2],
        "width": torch.zeros(3, 3),
        "numpy": np.zeros((3, 2)),
        "list": [[0.0, 0.0]] * 3,
        "unbatched": torch.zeros(2),
    }
    for kind, match in wrong.items():
        for call, state in every:
            converted = call in CONVERTING.values() and kind in ("numpy", "list")
            refused(call, model, state, contexts[kind], match=None if converted else match)
        for call in (model.sample, model.sample_with_log_prob) if kind != "rows" else ():  # any number of rows is right
            refused(call, 3, contexts[kind], match=match)
        if kind not in (None, "rows"):
            refused(model.distribution, contexts[kind], match=match)
    for call, state in every:
        if call not in CONVERTING.values():
            refused(call, model, state, context.double(), match=r"expects torch\.float32.*got torch\.float64")


@pytest.mark.parametrize("name", ["context", "reversible"])
def test_one_row_of_context_is_for_all_samples(name):
    model = built(name)
    x, z = torch.randn(3, 4), torch.randn(3, 4)
    row = torch.randn(1, 2, requires_grad=True)
    for call in (*FORWARD.values(), *CONVERTING.values(), *BACKWARD.values()):
        state = z if call in BACKWARD.values() else x
        found, expected = call(model, state, row), call(model, state, row.expand(3, 2))
        if isinstance(found, torch.Tensor):
            assert torch.equal(found, expected)
    assert model.sample(5, row).shape == (5, 1, 4)
    assert model.log_prob(x[:0], row).shape == (0,)
    model.log_prob(x, row).sum().backward()
    assert row.grad.shape == (1, 2)


def test_halves_of_two_batches_are_refused():
    pair = Sequential(built("pair").bijection[0])
    for chain in (built("pair").bijection, pair):  # built from a spec, and by hand
        for call in (chain, chain.inverse, chain.forward_and_log_det, chain.inverse_and_log_det):
            shape = (2, 3) if call in (chain, chain.forward_and_log_det) else (3, 2)
            state = torch.zeros(1, shape[0]), torch.zeros(4, shape[1])
            refused(call, state, match=r"got tensors with batches of \[1, 4\]")


@pytest.mark.parametrize("count", [-1, 2.0, "3", None, torch.zeros(2)])
def test_the_number_of_samples_is_a_whole_number(count):
    flow = Flow(Sequential(), StandardNormal(shape=(2,)))
    refused(flow.sample, count, match="expects a whole number of samples, at least 0, got")
    assert flow.sample(np.int64(2)).shape == (2, 2)


def test_models_made_by_hand_refuse_what_is_no_state():
    flow = Flow(Sequential(invflow.bijections.Linear1x1(shape=(2,))), StandardNormal(shape=(2,)))
    for kind in (*KINDS, *DTYPES):
        change, _ = {**KINDS, **DTYPES}[kind]
        refused(flow.log_prob, change(torch.zeros(3, 2)))
    refused(flow.log_prob, torch.zeros(3, 2), torch.zeros(2, 2), match="one for each of 3 samples, got 2 rows")


@pytest.mark.parametrize("name", MODELS)
def test_empty_batches(name):
    model = built(name)
    x, z, context = batches(model, 0)
    assert shape_of(model.bijection(x, context)) == model.bijection.declared_output_shape
    assert shape_of(model.bijection.inverse(z, context)) == model.bijection.declared_shape


def test_what_pytorch_does_with_models_still_works():
    model = built("context")
    x, context = torch.randn(3, 4), torch.randn(3, 2)
    expected = model(x, context)
    graphs = []
    backend = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for count in (3, 5, 7):  # one graph for all
        given = torch.randn(count, 4), torch.randn(count, 2)
        torch.testing.assert_close(compiled(*given), model(*given))
    assert len(graphs) == 1
    torch.testing.assert_close(compiled(x, context[:1]), model(x, context[:1]))
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, (x, context), dynamic_shapes=({0: batch}, {0: batch})).module()
    torch.testing.assert_close(exported(*given), model(*given))
    rows = torch.func.vmap(lambda row, given: model(row[None], given[None])[0])(x, context)
    torch.testing.assert_close(rows, expected)
    double = {name: weight.double() for name, weight in model.state_dict().items()}
    found = torch.func.functional_call(model, double, (x.double(), context.double()))
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x, context).isfinite().all()
        assert model.bijection(x.bfloat16(), context.bfloat16()).isfinite().all()
        refused(model, x.double(), context, match=r"got torch\.float64")
    meta = copy.deepcopy(model).to("meta")
    assert meta(x.to("meta"), context.to("meta")).is_meta


def test_a_converted_model_refuses_its_former_dtype():
    model = copy.deepcopy(built("context"))
    x, context = torch.randn(3, 4), torch.randn(3, 2)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.bijection.to(dtype)
        assert model.bijection(x.to(dtype), context.to(dtype)).dtype == dtype
        other = torch.float64 if dtype != torch.float64 else torch.float32
        with pytest.raises(ShapeError, match=rf"expects {dtype}, which its weights have, got {other}; convert it with"):
            model.bijection(x.to(other), context.to(dtype))
