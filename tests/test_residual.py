"""Residual blocks: inverses and their gradients, warnings, refusals, training, checkpoints in constant memory."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import invflow
from invflow import InvflowError, ShapeError, SpecError
from invflow.bijections import ActNorm, Inverse, Psi, Residual
from invflow.bijections.implicit import NotConverged
from invflow.log_det import Roulette
from invflow.nets import Conv, LipschitzConv, LipschitzMLP
from invflow.testing import check_bijection

DECLARED = 1.001
ERROR = {torch.float32: 1e-6, torch.float64: 1e-12}
GRADIENT = 1e-6


def at_the_limit(block, factor=20.0):
    """Makes the weights of a block so large that every layer is normalised."""
    with torch.no_grad():
        for layer in block.net.maps:
            layer.weight.mul_(factor)
    return block.train()


def jacobian(function, x):
    return torch.func.jacrev(lambda x: function(x[None])[0].flatten())(x).flatten(1).detach()


def identity_like(block):
    """Weights near multiples of the identity, so that g contracts as little as is allowed, in all directions."""
    with torch.no_grad():
        for layer in block.net.maps:
            layer.weight.add_(10 * torch.eye(*layer.weight.shape))
    return block.train()


@pytest.mark.parametrize("c", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2,), (30,), (3, 8, 8)])
@pytest.mark.parametrize("solver", ["anderson", "picard"])
@pytest.mark.parametrize("prepare", [lambda block: block, at_the_limit, "identity"])
def test_the_inverse_is_exact_or_a_warning_names_the_samples(c, dtype, shape, solver, prepare):
    torch.manual_seed(0)
    if prepare == "identity":
        net = LipschitzMLP(shape, shape, hidden=[torch.Size(shape).numel()], activation="relu")
        block = identity_like(Residual(net, c, solver)).to(dtype)
    else:
        block = prepare(Residual(coefficient=c, solver=solver, shape=shape)).to(dtype)
    x = torch.randn(16, *shape, dtype=dtype)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = block(x)
        back = block.inverse(y)
    # The exact inverse of this y, in double precision: y itself has been rounded.
    exact = copy.deepcopy(block).double().solve(y.double()).x
    error = (back.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    wrong = (error > ERROR[dtype]).nonzero().flatten().tolist()
    if wrong:
        assert len(caught) == 1
        assert caught[0].category is NotConverged
    if dtype == torch.float64:
        assert not wrong


def test_a_solver_that_stops_short_warns_with_the_samples_or_raises(monkeypatch):
    monkeypatch.setattr("invflow.solvers.MOST_EVALUATIONS", 3)
    block = at_the_limit(Residual(shape=(5,), coefficient=0.97))
    y = torch.randn(4, 5)
    y[2] = float("nan")
    with pytest.warns(NotConverged, match=r"did not converge for 3 of 4 samples \(0, 1, 3\).*evaluations"):
        block.inverse(y)
    block.on_failure = "raise"
    with pytest.raises(InvflowError, match=r"\(0, 1, 3\)"):
        block.inverse(y)
    assert block.solve(y).convergence.failed == [0, 1, 2, 3]  # solve only reports


@given(c=st.sampled_from([0.5, 0.9, 0.97]), seed=st.integers(0, 99), image=st.booleans())
def test_g_contracts_by_the_coefficient(c, seed, image):
    torch.manual_seed(seed)
    shape = (2, 4, 3) if image else (6,)
    block = at_the_limit(Residual(coefficient=c, shape=shape)).double()
    x = torch.randn(shape, dtype=torch.float64)
    g = jacobian(lambda x: block(x) - x, x)
    assert float(torch.linalg.matrix_norm(g, 2)) <= c * DECLARED


def test_g_contracts_after_training_and_reload(tmp_path):
    torch.manual_seed(0)
    chain = invflow.build({"input": {"shape": [2, 4, 4]}, "layers": [{"type": "residual", "coefficient": 0.9}] * 2})
    optimizer = torch.optim.Adam(chain.parameters(), lr=0.3)
    for _ in range(10):
        x = torch.randn(8, 2, 4, 4)
        y, log_det = chain.forward_and_log_det(x)
        (y.square().flatten(1).sum(1) - 20 * log_det).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (
            float((chain.inverse(chain(x)) - x).detach().abs().max()) < 1e-5
        )  # in train mode, between two training steps
    invflow.save(chain, tmp_path)
    x = torch.randn(2, 4, 4)
    for model in (chain, chain.eval(), invflow.load(tmp_path)):
        norms = [float(torch.linalg.matrix_norm(jacobian(lambda x, b=b: b(x) - x, x), 2)) for b in model]
        assert max(norms) <= 0.9 * DECLARED
        assert max(norms) > 0.1  # training has increased them


def inverse_of_everything(block, y, given):
    """The inverse as a function of y, the context and the weights, and these."""
    inputs = (y,) if given is None else (y, given)
    names, weights = zip(*block.named_parameters(), strict=True)

    def inverse(*values):
        state = {f"layer.{name}": value for name, value in zip(names, values[len(inputs) :], strict=True)}
        return torch.func.functional_call(Inverse(block), state, values[: len(inputs)])

    return inverse, (*inputs, *(weight.detach().requires_grad_() for weight in weights))


@pytest.mark.parametrize("c", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("context", [None, 2])
def test_gradients_of_the_inverse_are_those_of_finite_differences(c, context):
    torch.manual_seed(0)
    given_shape = None if context is None else (context,)
    net = LipschitzMLP((3,), (3,), given_shape, hidden=[4])
    block = at_the_limit(Residual(net, coefficient=c)).double()
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    given = None if context is None else torch.randn(2, context, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(*inverse_of_everything(block, y, given), atol=GRADIENT, rtol=GRADIENT)


@pytest.mark.parametrize("context", [None, 1])
def test_second_derivatives_of_the_inverse(context):
    """By y, the context and the weights, in all pairs; a norm that is divided by has first derivatives only."""
    torch.manual_seed(0)
    given_shape = None if context is None else (context,)
    net = LipschitzMLP((2,), (2,), given_shape, hidden=[2], activation="tanh")
    block = at_the_limit(Residual(net), factor=0.2).double()
    y = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    given = None if context is None else torch.randn(2, context, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(*inverse_of_everything(block, y, given), atol=GRADIENT, rtol=GRADIENT)


@pytest.mark.parametrize(
    "field",
    [
        *({"coefficient": value} for value in (1, 1.5, 0, -0.5)),
        *({"tolerance": value} for value in (0, -1e-6, 1)),
        {"solver": "newton"},
        {"on_failure": "ignore"},
        {"log_det": {"type": "guess"}},
        {"log_det": {"type": "power_series", "terms": 0}},
        {"log_det": {"type": "auto", "probes": 0}},
        {"net": {"type": "conv"}},
        {"coefficient": 0.9, "log_det": {"type": "roulette", "continuation": 0.81}},
        {"coefficient": None},
        {"coefficient": None, "net": {"type": "lipschitz_conv", "bound": 1.5}},
    ],
)
def test_what_has_no_inverse_is_refused_at_its_line(tmp_path, field):
    document = {
        "input": {"shape": [2, 4, 4]},
        "layers": [{"type": "psi", "block_size": 2}, {"type": "residual", **field}],
    }
    text = json.dumps(document, indent=1)
    path = tmp_path / "spec.json"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        invflow.build(path)
    (error,) = caught.value.errors
    lines = text.splitlines()
    assert error["path"].startswith("layers.1")
    named = error["path"].removeprefix("layers.1").lstrip(".").rpartition(".")[2]
    assert f'"{named}"' in lines[error["line"] - 1] if named else "{" in lines[error["line"] - 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (Residual, "a net, or the incoming shape"),
        (lambda: Residual(Conv((2, 4, 4), (2, 4, 4))), r"got conv; use lipschitz_conv .* a method lipschitz_bound\(\)"),
        (lambda: Residual(nn.Linear(2, 2)), "got Linear"),
        (lambda: Residual(LipschitzMLP((2,), (3,)))(torch.zeros(1, 2)), "its net to return the shape"),
        (lambda: Residual(shape=((2,), (2,))), "expects one tensor"),
        (lambda: Residual(shape=(2,)).output_shape((3,)), r"expects the shape \(2,\), got \(3,\)"),
        (
            lambda: Residual(coefficient=0.9, log_det=Roulette(type="roulette", continuation=0.8), shape=(2,)),
            "variance of the log-determinant",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises((InvflowError, ShapeError), match=message):
        call()


class Foreign(nn.Linear):
    """A user's net with its own bound."""

    def lipschitz_bound(self):
        return torch.linalg.matrix_norm(self.weight)  # Frobenius: certified, not tight


def test_anybodys_net_that_knows_its_bound_will_do():
    torch.manual_seed(0)
    net = Foreign(4, 4)
    for factor in (1e-3, 1e3):
        with torch.no_grad():
            net.weight.mul_(factor)
        block = Residual(net, coefficient=0.9, shape=(4,)).double()
        x = torch.randn(3, 4, dtype=torch.float64)
        norm = torch.linalg.matrix_norm(jacobian(lambda x, block=block: block(x) - x, x[0]), 2)
        assert float(norm) <= 0.9
    assert check_bijection(block, (4,), examples=5).ok
    block(x).sum().backward()
    assert net.weight.grad.isfinite().all()


def test_without_a_coefficient_g_is_the_net():
    torch.manual_seed(0)
    net = LipschitzMLP((6,), (6,), hidden=[8, 8], bound=0.9)
    block = at_the_limit(Residual(net, coefficient=None)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(block(x), x + net(x))
    assert block.contraction == net.lipschitz_bound() == pytest.approx(0.9**3)
    assert block.lipschitz_bounds() == pytest.approx((1 + 0.9**3, 1 / (1 - 0.9**3)))
    assert check_bijection(block, (6,), examples=5).ok


def test_without_a_coefficient_a_net_that_need_not_contract_is_refused():
    for net in (LipschitzMLP((2,), (2,)), Foreign(2, 2).requires_grad_(False)):
        if isinstance(net, Foreign):
            net.weight.fill_(2.0)
        with pytest.raises(InvflowError, match=r"Lipschitz constant is below 1, got .*; give it a coefficient"):
            Residual(net, coefficient=None)
    net.weight.fill_(0.1)
    block = Residual(net, coefficient=None, shape=(2,))
    block.inverse(torch.zeros(1, 2))
    net.weight.fill_(2.0)  # after it was built
    for call in (block, block.inverse, block.forward_and_log_det):
        with pytest.raises(InvflowError, match="Lipschitz constant is below 1"):
            call(torch.zeros(1, 2))


def test_contexts_reach_both_nets():
    nets = [LipschitzMLP((3,), (3,), (2,), hidden=[4]), LipschitzConv((2, 3, 2), (2, 3, 2), (2,), hidden=[4])]
    for net, shape in zip(nets, [(3,), (2, 3, 2)], strict=True):
        assert check_bijection(Residual(net), shape, context_shape=(2,), examples=5, only=["context", "gradients"]).ok
        assert Residual(shape=shape, context_shape=(2,)).net.context_shape == (2,)


def test_blocks_are_checkpointed_in_constant_memory_training_and_mixed_chains_work():
    torch.manual_seed(0)
    layers = [
        {"type": "psi", "block_size": 2},
        {"type": "residual"},
        {"type": "actnorm"},
        {"type": "split"},
        {"type": "additive_coupling", "net": {"type": "conv"}},
        {"type": "merge"},
        {"type": "residual"},
    ]
    document = {"input": {"shape": [1, 4, 4]}, "layers": layers}
    plain = invflow.build(document).double()
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    found = {}
    for policy in ("stored", "checkpoint", "reversible"):
        chain = invflow.build({**document, "backprop": policy}).double()
        chain.load_state_dict(plain.state_dict())
        count = counted(chain[1].net)
        start = x.clone().requires_grad_()
        y, log_det = chain.forward_and_log_det(start)
        before = count[0]
        (y.square().sum() + log_det.sum()).backward()
        # Recomputed once, not inverted, which would take as many evaluations as the solver does.
        assert count[0] - before <= (0 if policy == "stored" else before)
        found[policy] = [start.grad, *(weight.grad for weight in chain.parameters())]
    for policy in ("checkpoint", "reversible"):
        for a, b in zip(found["stored"], found[policy], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def counted(net):
    """The number of times that a net is evaluated, in a list of one."""
    count = [0]
    evaluate = net._evaluate

    def counting(*args):
        count[0] += 1
        return evaluate(*args)

    net._evaluate = counting
    return count


def test_a_spec_of_i_resnet_trains_inverts_and_comes_back(tmp_path):
    torch.manual_seed(0)
    document = {"input": {"shape": [1, 8, 8]},
                "layers": [{"type": "psi", "block_size": 2},
                           {"type": "repeat", "times": 2, "layers": [{"type": "actnorm"},
                                                                     {"type": "residual", "coefficient": 0.9}]}],
                "head": {"type": "linear", "classes": 3}}  # fmt: skip
    model = invflow.build_model(document)
    x = torch.rand(6, 1, 8, 8)
    model.bijection.initialize(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        nn.functional.cross_entropy(model(x), torch.arange(6) % 3).backward()
        optimizer.step()
    z = model.features(x)
    assert float((model.bijection.inverse(z) - x).detach().abs().max()) <= 1e-5
    invflow.save(model, tmp_path)
    assert torch.equal(invflow.load(tmp_path)(x), model(x))
    assert invflow.to_spec(model)["layers"][2] == {"type": "residual"}


def test_the_chain_of_an_inverted_block():
    chain = invflow.Sequential(Psi(2), ActNorm(shape=(4, 2, 2)), Residual(shape=(4, 2, 2)))[::-1].double()
    y = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    x, log_det = chain.forward_and_log_det(y)
    back, negative = chain.inverse_and_log_det(x)
    torch.testing.assert_close(back, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det, -negative, rtol=1e-10, atol=1e-10)


def test_the_compiler_breaks_the_graph_and_gives_the_same_numbers():
    torch.manual_seed(0)
    block = Residual(LipschitzMLP((3,), (3,), hidden=[4]), coefficient=0.5)
    x = torch.randn(2, 3)
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager")
    for factor in (1, 20):  # a compiled graph sees changed weights
        with torch.no_grad():
            block.net.maps[0].weight.mul_(factor)
            torch.testing.assert_close(compiled(x), block(x))
    torch.compiler.reset()


class Orthogonal(nn.Linear):
    def lipschitz_bound(self):
        return 1.0


def orthogonal(size, coefficient, solver):
    """A block whose g contracts all distances by the coefficient."""
    torch.manual_seed(0)
    block = Residual(Orthogonal(size, size, bias=False), coefficient, solver)
    nn.init.orthogonal_(block.net.weight)
    return block


@pytest.mark.parametrize("solver", ["anderson", "picard"])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float32, (1e-36, 1e-22, 1e20, 1e37)),
        (torch.float64, (1e-300, 1e-170, 1e160, 1e300)),
        (torch.bfloat16, (1e-36, 1e37)),
    ],
    ids=str,
)
def test_the_inverse_of_small_and_large_numbers(solver, dtype, sizes):
    block = orthogonal(4, 0.9, solver).to(dtype)
    x = torch.randn(5, 4, dtype=torch.float64)
    for size in sizes:
        y = block((x * size).to(dtype))
        y = y.detach().requires_grad_()
        back = block.inverse(y)  # a warning is an error here
        tolerance = 1000 * torch.finfo(dtype).eps  # about 10 for each number, over 1 - 0.9, and its share of underflow
        torch.testing.assert_close(back.double() / size, x, rtol=0, atol=tolerance)
        (gradient,) = torch.autograd.grad(back, y, y.detach())
        jacobian = torch.eye(4) + 0.9 * block.net.weight.detach().double()
        expected = torch.linalg.solve(jacobian.T, y.detach().double().T / size).T
        torch.testing.assert_close(gradient.double() / size, expected, rtol=0, atol=100 * tolerance)


@pytest.mark.parametrize("solver", ["anderson", "picard"])
@torch.no_grad()
def test_the_default_tolerance_is_what_rounding_errors_permit(solver):
    block = orthogonal(64, 0.97, solver)
    x = torch.randn(100, 64)
    back = block.inverse(block(x))  # a warning is an error here
    assert float((back - x).abs().max()) <= 1e-4
    assert float(block.solve(block(x)).convergence.error.max()) > ERROR[torch.float32]
    block.tolerance = 1e-6  # who asks for more is told
    with pytest.warns(NotConverged):
        block.inverse(block(x))
