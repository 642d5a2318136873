"""Neural ODEs as bijections: solutions, inverses at any step, log-determinants, the time, refusals, training."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import invflow
from invflow import InvflowError, ShapeError, SpecError
from invflow.bijections import Continuous, Inverse
from invflow.bijections.implicit import NotConverged
from invflow.log_det import EVAL_PROBES, trace_estimate
from invflow.nets import MLP, LipschitzMLP
from invflow.testing import check_bijection

SPECS = Path(__file__).parent.parent / "specs"

ROUNDINGS = 64
"""Of a round trip of a few steps whose Jacobian is far from singular, in units of eps."""

STANDARD_ERRORS = 4
"""A mean of independent numbers is further from its expectation than this once in 16,000 seeds; the seed is fixed."""

ORDERS = {"euler": 1, "midpoint": 2, "rk4": 4}


def field(shape=(2,), context_shape=None, **fields):
    """A smooth net, in float64, from the state and the time."""
    torch.manual_seed(0)
    net = MLP((shape[0] + 1,), shape, context_shape, hidden=[16, 16], activation="tanh")
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(2)
    return Continuous(net, shape, context_shape, **fields).double()


def linear_ode(a, **fields):
    """dx/dt = A x + b t + c."""
    size = len(a)
    layer = Continuous(MLP((size + 1,), (size,)), (size,), trained_time=False, **fields).double()
    with torch.no_grad():
        layer.net[0].weight[:, :size] = a
    return layer


def matrix():
    return torch.tensor([[0.3, -1.2, 0.1], [0.8, -0.5, 0.4], [-0.2, 0.6, 0.7]], dtype=torch.float64)


def points(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestSolution:
    @pytest.mark.parametrize("time", [1.0, 0.3])
    def test_of_a_linear_equation_is_the_matrix_exponential(self, time):
        layer = linear_ode(matrix(), steps=200, time=time)
        x = points(5, 3)
        y, log_det = layer.forward_and_log_det(x)
        # d(x, t, 1)/dt = M (x, t, 1)
        augmented = torch.zeros(5, 5, dtype=torch.float64)
        augmented[:3, :4], augmented[:3, 4] = layer.net[0].weight.detach(), layer.net[0].bias.detach()
        augmented[3, 4] = 1
        began = torch.cat([x, torch.zeros(5, 1), torch.ones(5, 1)], dim=1)
        expected = (began @ torch.matrix_exp(time * augmented).T)[:, :3]
        assert (y - expected).abs().max() < 1e-9
        assert (log_det - time * matrix().trace()).abs().max() < 1e-9

    @pytest.mark.parametrize("method", ORDERS)
    @pytest.mark.parametrize("steps", [1, 3])
    def test_the_map_of_a_linear_equation_is_the_method_s_polynomial(self, method, steps):
        """However coarse the steps: the log-determinant is that of the map, not of the equation's solution."""
        layer = linear_ode(matrix(), steps=steps, method=method, time=2.0)
        with torch.no_grad():
            layer.net[0].weight[:, 3:].zero_()
            layer.net[0].bias.zero_()
        z = 2.0 / steps * matrix()
        step = sum(torch.linalg.matrix_power(z, k) / math.factorial(k) for k in range(ORDERS[method] + 1))
        x = points(5, 3)
        y, log_det = layer.forward_and_log_det(x)
        assert torch.allclose(y, x @ torch.linalg.matrix_power(step, steps).T, rtol=1e-13, atol=1e-13)
        assert torch.allclose(log_det, steps * torch.linalg.slogdet(step).logabsdet.expand(5), rtol=1e-12)
        assert (log_det - 2 * matrix().trace()).abs().min() > 1e-4

    @pytest.mark.parametrize("method", ORDERS)
    @pytest.mark.parametrize("trace", ["exact", "hutchinson"])
    def test_it_converges_with_the_order_of_the_method(self, method, trace):
        """The state, and the log-determinant: in eval mode, the probes of all steps are the same."""
        x = points(6, 2)

        def run(steps, method=method):
            layer = field(steps=steps, method=method, trace=trace).eval()
            return torch.cat([one.detach().flatten() for one in layer.forward_and_log_det(x)])

        right = run(256, "rk4")
        coarse, fine = ((run(steps) - right).norm() for steps in (16, 32))
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[method], abs=0.35)

    def test_the_time_is_the_last_channel(self):
        """dx/dt = t + 2 from 0 to T = 3 adds 3^2/2 + 6."""
        layer = linear_ode(torch.zeros(1, 1, dtype=torch.float64), steps=2, time=3.0)
        with torch.no_grad():
            layer.net[0].weight[:, 1].fill_(1)
            layer.net[0].bias.fill_(2)
        assert (layer(points(4, 1)) - points(4, 1) - 10.5).abs().max() < 1e-14


class TestInverse:
    @pytest.mark.parametrize("method", ORDERS)
    @pytest.mark.parametrize("steps", [1, 2, 8])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_it_is_exact_to_rounding_however_coarse_the_steps(self, method, steps, dtype):
        layer = field(steps=steps, method=method, time=0.5).to(dtype)
        x = points(200, 2).to(dtype)
        y = layer(x)
        assert (y - x).abs().max() > 0.1
        eps = torch.finfo(dtype).eps
        assert (layer.inverse(y) - x).abs().max() < ROUNDINGS * eps * x.abs().max()
        assert (layer(layer.inverse(x)) - x).abs().max() < ROUNDINGS * eps * x.abs().max()

    def test_a_small_state_comes_back_to_the_roundings_of_a_large_image(self):
        layer = field(steps=2, time=0.5)
        x = 1e-9 * points(100, 2)
        y = layer(x)
        assert (layer.inverse(y) - x).abs().max() < ROUNDINGS * 2.3e-16 * y.abs().max()

    @pytest.mark.parametrize("on_failure", ["warn", "raise"])
    def test_steps_that_are_too_long_are_reported(self, on_failure):
        """Those in which two points have one image, or the corrections diverge."""
        layer = field(steps=1, time=40.0, on_failure=on_failure)
        y = points(3, 2)
        y[1] = math.nan  # is no failure
        said = r"the inverse of continuous did not converge for 2 of 3 samples \(0, 2\).*evaluations"
        if on_failure == "warn":
            with pytest.warns(NotConverged, match=said):
                layer.inverse(y)
        else:
            with pytest.raises(InvflowError, match=said):
                layer.inverse(y)

    @pytest.mark.parametrize("context_shape", [None, (2,)])
    def test_its_derivatives_are_those_of_differences_twice(self, context_shape):
        """By y, the context, the weights and the time."""
        torch.manual_seed(0)
        net = MLP((3,), (2,), context_shape, hidden=[2], activation="tanh")
        layer = Inverse(Continuous(net, (2,), context_shape, steps=2)).double()
        names, weights = zip(*layer.named_parameters(), strict=True)
        assert any("root_time" in name for name in names)
        inputs = [points(2, 2)] + ([] if context_shape is None else [points(2, 2, seed=2)])

        def inverse(*values):
            state = dict(zip(names, values[len(inputs) :], strict=True))
            return torch.func.functional_call(layer, state, values[: len(inputs)])

        given = tuple(one.detach().requires_grad_() for one in (*inputs, *weights))
        options = {"atol": 1e-6, "rtol": 1e-6, "fast_mode": True}
        assert torch.autograd.gradcheck(inverse, given, **options)
        assert torch.autograd.gradgradcheck(inverse, given, **options)

    def test_a_lipschitz_net_bounds_the_map_and_its_inverse(self):
        torch.manual_seed(0)
        net = LipschitzMLP((3,), (2,), hidden=[8])
        with torch.no_grad():
            for weight in net.parameters():
                weight.mul_(20)
        layer = Continuous(net, (2,), steps=8, time=2.0).double()
        forward, backward = layer.lipschitz_bounds()
        x = points(200, 2).requires_grad_()
        rows = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0] for column in layer(x).unbind(1)]
        sizes = torch.linalg.svdvals(torch.stack(rows, dim=1))
        assert 1.2 < sizes.max() <= forward < math.exp(2.01)
        assert (1 / sizes).max() <= backward < 15
        assert Continuous(net, (2,), steps=1, time=2.0).lipschitz_bounds()[1] == math.inf
        assert field().lipschitz_bounds() == (math.inf, math.inf)


class TestLogDet:
    def test_a_trace_by_probes_along_the_axes_is_the_trace(self):
        a = matrix()
        axes = math.sqrt(3) * torch.eye(3, dtype=torch.float64)[:, None]
        x = points(4, 3).requires_grad_()
        found = trace_estimate(lambda x, context: (x @ a.T) ** 2, x, None, axes)
        expected = (2 * (x @ a.T) * a.diagonal()).sum(1)
        assert torch.allclose(found, expected, rtol=1e-13)
        both = (torch.autograd.grad(one.sum(), x, retain_graph=True)[0] for one in (found, expected))
        assert torch.allclose(*both, rtol=1e-13)

    @pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
    def test_hutchinson_s_estimate_and_its_gradient_are_unbiased(self, probe):
        exact, estimated = field(trace="exact"), field(trace="hutchinson", probe=probe).train()
        x = points(1, 2)
        right = exact.forward_and_log_det(x)[1]
        slopes = torch.cat([one.flatten() for one in torch.autograd.grad(right.sum(), exact.parameters())])
        count = 4000
        found = estimated.forward_and_log_det(x.expand(count, 2))[1]  # of probes of its own for each sample
        spread = found.std() / math.sqrt(count)
        assert spread > 1e-3
        assert (found.mean() - right).abs() < STANDARD_ERRORS * spread
        means = [estimated.forward_and_log_det(x.expand(100, 2))[1].mean() for _ in range(40)]
        found = torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(one, estimated.parameters())]) for one in means]
        )
        off = (found.mean(0) - slopes).abs() / (found.std(0) / math.sqrt(40))
        assert off.max() < 1.5 * STANDARD_ERRORS  # of some hundred weights, most of which are off together

    def test_more_probes_have_less_variance(self):
        x = points(1, 2).expand(1000, 2)
        one, many = (
            field(trace="hutchinson", probes=n).train().forward_and_log_det(x)[1].detach().var() for n in (1, 16)
        )
        assert float(one / many) == pytest.approx(16, rel=0.5)

    def test_in_eval_mode_an_estimate_is_a_function_and_the_inverse_s_is_its_negative(self):
        layer = field(trace="hutchinson").eval()
        x = points(5, 2)
        y, log_det = layer.forward_and_log_det(x)
        assert torch.equal(log_det, layer.forward_and_log_det(x)[1])
        assert torch.allclose(layer.forward_and_log_det(x[2:3])[1], log_det[2:3], rtol=1e-13)
        assert torch.allclose(layer.inverse_and_log_det(y)[1], -log_det, rtol=1e-12)
        assert layer.train().forward_and_log_det(x)[1].ne(log_det).all()

    def test_auto_is_exact_up_to_64_numbers(self):
        for size, estimated in ((64, False), (65, True)):
            assert Continuous(MLP((size + 1,), (size,)), (size,)).log_det_is_estimated is estimated
        assert EVAL_PROBES == 8  # as the docstring says

    def test_no_log_det_in_inference_mode(self):
        layer = field()
        with torch.inference_mode():
            assert layer(points(2, 2)).shape == (2, 2)
            with pytest.raises(InvflowError, match="continuous differentiates for its log-determinant; use no_grad"):
                layer.forward_and_log_det(points(2, 2))


class TestContext:
    @pytest.mark.parametrize("shape", [(2,), (1, 2, 2)])
    def test_a_conditional_map_keeps_its_promises(self, shape):
        part = {"type": "conv" if len(shape) > 1 else "linear"}
        parts = [{"type": "carry", "channels": 4, "parts": [{**part, "channels": 3}, {"type": "tanh"}]}, part]
        layer = {"type": "continuous", "steps": 2, "net": {"type": "stack", "parts": parts}}
        document = {"input": {"shape": list(shape), "context_shape": [3]}, "layers": [layer]}
        chain = invflow.build(document)
        promises = ["context", "round trip", "log det", "inverse log det", "gradients", "inverse gradients"]
        check_bijection(chain, shape, context_shape=(3,), examples=2, only=promises)
        x, context = torch.randn(2, *shape), torch.randn(2, 3)
        assert (chain(x, context) - chain(x, context.flip(0))).abs().max() > 1e-3

    def test_each_carried_layer_sees_the_time(self):
        parts = [{"type": "carry", "parts": [{"type": "linear", "channels": 3}, {"type": "tanh"}]}, {"type": "linear"}]
        layer = {"type": "continuous", "net": {"type": "stack", "parts": parts}}
        (layer,) = invflow.build({"input": {"shape": [2]}, "layers": [layer]})
        assert [one.weight.shape[1] for one in layer.net.modules() if isinstance(one, nn.Linear)] == [3, 4]
        with torch.no_grad():
            layer.net[0][0].weight[:, 2].zero_()
            x = torch.zeros(1, 2)
            early, late = (layer.net(torch.cat([x, torch.full((1, 1), t)], dim=1)) for t in (0.0, 1.0))
        assert (late - early - layer.net[1].weight[:, 3]).abs().max() < 1e-6


class TestPublished:
    """FFJORD: softplus nets of `concat` layers, two flows at each resolution, one trained time for each flow."""

    @staticmethod
    def ffjord(shape, scales):
        convolution = {"type": "carry", "parts": [{"type": "conv", "channels": 64}, {"type": "softplus"}]}
        net = {"type": "stack", "parts": [{"type": "repeat", "times": 3, "parts": [convolution]}, {"type": "conv"}]}
        two = {"type": "repeat", "times": 2, "layers": [{"type": "continuous", "net": net}]}
        scale = [two, {"type": "psi", "block_size": 2}, two]
        layers = [{"type": "repeat", "times": scales - 1, "layers": [
            {"type": "on", "layers": scale}, {"type": "factor_out"}]}, {"type": "on", "layers": [two]}]  # fmt: skip
        return {"input": {"shape": list(shape)}, "layers": layers}

    @pytest.mark.parametrize(
        ("shape", "scales", "parameters"), [((1, 28, 28), 3, 800_646), ((3, 32, 32), 4, 1_358_882)]
    )
    def test_it_has_the_published_number_of_parameters(self, shape, scales, parameters):
        chain = invflow.build(self.ffjord(shape, scales))
        assert sum(weight.numel() for weight in chain.parameters()) == parameters

    def test_a_fixed_time_is_no_parameter(self):
        trained, fixed = (Continuous(MLP((3,), (2,)), (2,), trained_time=trained) for trained in (True, False))
        count = [sum(weight.numel() for weight in one.parameters()) for one in (trained, fixed)]
        assert count[0] == count[1] + 1


class TestRefusals:
    @pytest.mark.parametrize("part", [{"type": "batch_norm"}, {"type": "dropout"}])
    def test_a_net_that_is_another_function_each_time(self, part):
        net = {"type": "stack", "parts": [{"type": "linear", "channels": 4}, part, {"type": "linear"}]}
        with pytest.raises(SpecError, match="continuous expects a net that is the same function in every step"):
            invflow.build({"input": {"shape": [2]}, "layers": [{"type": "continuous", "net": net}]})

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"trace": "exact", "probes": 2}, 'draws probes for "auto" and "hutchinson" only, got 2 rademacher ones'),
            ({"steps": 10**9}, "less than or equal to 1000"),
            ({"time": 0.0}, "greater than 0"),
            ({"method": "dopri5"}, "'euler', 'midpoint' or 'rk4'"),
        ],
    )
    def test_fields(self, fields, said):
        layer = {"type": "continuous", "net": {"type": "mlp"}, **fields}
        with pytest.raises(SpecError, match=said):
            invflow.build({"input": {"shape": [2]}, "layers": [layer]})

    def test_a_net_of_another_shape_and_a_state_of_another_shape(self):
        with pytest.raises(ShapeError, match=r"expects its net to return the shape \(4, 2\), got \(4, 1\)"):
            Continuous(nn.Linear(3, 1), (2,))(torch.zeros(4, 2))
        with pytest.raises(ShapeError, match=r"continuous expects the shape \(2,\), got \(3,\)"):
            field().inverse(points(4, 3))
        carry = {"type": "carry", "channels": 4, "parts": [{"type": "linear"}]}
        layer = {"type": "continuous", "net": {"type": "stack", "parts": [carry, {"type": "linear"}]}}
        with pytest.raises(SpecError, match=r"parts\.0: carry expects at least 4 channels to carry, got \(3,\)"):
            invflow.build({"input": {"shape": [2]}, "layers": [layer]})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The shipped flow of the circles, trained for a few seconds."""
    document = json.loads((SPECS / "ffjord_circles.json").read_text())
    del document["$schema"]
    document["training"] |= {"epochs": 6, "evaluate_every": 6, "batch_size": 128}
    document["training"]["data"] |= {"train_size": 1024, "test_size": 256}
    run = invflow.train(document, tmp_path_factory.mktemp("runs") / "run", progress=False)
    return run.load().eval().double()


class TestTraining:
    def test_the_time_is_trained_too(self, trained):
        (layer,) = (one for one in trained.bijection if isinstance(one, Continuous))
        assert abs(layer.root_time.item() ** 2 - layer.time) > 0.01

    def test_the_density_integrates_to_1(self, trained):
        side = torch.linspace(-3, 3, 121, dtype=torch.float64)
        with torch.no_grad():
            density = trained.log_prob(torch.cartesian_prod(side, side)).exp()
        assert float(density.sum() * (side[1] - side[0]) ** 2) == pytest.approx(1, abs=0.01)

    def test_a_sample_has_the_log_prob_that_it_was_drawn_with(self, trained):
        with torch.no_grad():
            x, log_prob = trained.sample_with_log_prob(500)
            assert (trained.log_prob(x) - log_prob).abs().max() < 1e-10

    @pytest.mark.parametrize("steps", [2, 16])
    def test_it_comes_back_in_any_number_of_steps(self, trained, steps):
        chain, x = copy.deepcopy(trained.bijection), points(500, 2)
        for layer in chain:
            if isinstance(layer, Continuous):
                layer.steps = steps
        assert (chain.inverse(chain(x)) - x).abs().max() < 16 * ROUNDINGS * 2.3e-16
