"""`fully_shard` on the layers of a chain: what two processes train is what one trains on the whole batch."""

import copy
import functools

import pytest
import torch
import torch.distributed
from torch import nn

import invflow
from invflow.bijections import ActNorm, Affine, Linear1x1
from invflow.models import Flow, StandardNormal

COUPLING = {"type": "affine_coupling", "net": {"type": "conv", "hidden": [4]}}
LAYERS = [
    {"type": "psi", "block_size": 2},
    {"type": "actnorm"},
    {"type": "linear_1x1"},
    {"type": "split"},
    COUPLING,
    {"type": "merge"},
    {"type": "factor_out", "net": {"type": "conv", "hidden": [3]}},
    {
        "type": "on",
        "layers": [
            {"type": "actnorm"},
            {"type": "inverse", "layer": {"type": "linear_1x1"}},
            {"type": "residual", "net": {"type": "lipschitz_conv", "hidden": [3]}},
        ],
    },
    {"type": "parallel", "layers": [{"type": "affine"}, {"type": "sequential", "layers": [{"type": "affine"}]}]},
    {"type": "each", "layer": {"type": "affine"}},
]
STEPS, BATCH = 5, 4
TRAINED = [
    ("flow", "layers", "stored"),
    ("flow", "layers", "checkpoint"),
    ("flow", "inner", "checkpoint"),
    ("flow", "chain", "reversible"),
    ("classifier", "layers", "stored"),
    ("classifier", "layers", "checkpoint"),
    ("own", "layers", "stored"),
    ("own", "layers", "checkpoint"),
]


class CallsItself(Affine):
    """A layer whose calls make others of the same layer, and need the weights afterwards."""

    def forward_and_log_det(self, x, context=None):
        y = self(x)
        assert torch.equal(self.inverse(y), (y - self.shift) * torch.exp(-self.log_scale))
        return y, self.log_scale.sum().expand(len(x))

    def inverse_and_log_det(self, y, context=None):
        x = self.inverse(y)
        return x, -self.forward_and_log_det(x)[1]


def made(kind):
    return copy.deepcopy(built(kind))


@functools.cache
def built(kind):
    torch.manual_seed(0)
    if kind == "own":
        model = Flow(invflow.Sequential(ActNorm((4,)), CallsItself((4,)), Linear1x1((4,))), StandardNormal((4,)))
    else:
        top = {"prior": {"type": "gaussian_mixture", "components": 2}}
        top = top if kind == "flow" else {"head": {"type": "linear", "classes": 3}}
        model = invflow.build_model({"input": {"shape": [1, 4, 4]}, "layers": LAYERS, **top})
    model.double().bijection.initialize(batches(kind)[0][0])
    return model


def batches(kind):
    generator = torch.Generator().manual_seed(1)
    shape = (STEPS, BATCH, *((4,) if kind == "own" else (1, 4, 4)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(3, (STEPS, BATCH), generator=generator), strict=True))


def trained(model, kind, rows):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, labels in batches(kind):
        optimizer.zero_grad()
        made = model(x[rows])
        loss = nn.functional.cross_entropy(made, labels[rows]) if kind == "classifier" else -made.mean()
        loss.backward()
        optimizer.step()
    return model


def outcome(model, kind):
    """All weights, and what the methods return that run the chain in either direction."""
    weights = model.eval().named_parameters()
    found = {name: getattr(weight, "full_tensor", weight.clone)() for name, weight in weights}
    x = batches(kind)[0][0]
    with torch.no_grad():
        if kind == "classifier":
            state = model.features(x)
        else:
            state, found["log_prob"] = model.features_and_log_prob(x)
            torch.manual_seed(2)
            found["samples"], found["of samples"] = model.sample_with_log_prob(3)
        found["back"], found["back by the chain"] = model.inverse(state), model.bijection.inverse(state)
    return {name: tensor.detach() for name, tensor in found.items()}


def sharded(model, which):
    """The model with its layers, these and the bijections inside them, or its chain sharded by themselves."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    chain = model.bijection
    inside = [part for part in reversed([*chain.modules()][1:]) if isinstance(part, invflow.Bijection)]
    for part in {"layers": chain, "inner": inside, "chain": [chain]}[which]:
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model


def refusals():
    """What is refused, by name."""
    found, x = {}, batches("own")[0][0]
    reversible, nested = made("own"), made("own")
    reversible.bijection.backprop = "reversible"
    nested.bijection = invflow.Sequential(invflow.Sequential(*nested.bijection, backprop="reversible"))
    late = Flow(invflow.Sequential(ActNorm((4,)).double()), StandardNormal((4,)))
    calls = {
        "reversible": sharded(reversible, "layers"),
        "nested": sharded(nested, "inner"),
        "late": sharded(late, "layers").bijection.initialize,
    }
    for name, call in calls.items():
        with pytest.raises(invflow.InvflowError) as raised:
            call(x)
        found[name] = str(raised.value)
    return found


def train_in_a_process(rank, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/group", rank=rank, world_size=2)
    try:
        half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
        found = {"refusals": refusals()}
        for kind, which, policy in TRAINED:
            model = sharded(made(kind), which)
            assert repr(model).startswith("FSDP")
            model.bijection.backprop = policy
            found[kind, which, policy] = outcome(trained(model, kind, half), kind)
        if rank == 0:
            torch.save(found, f"{path}/found.pt")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharding")
    torch.multiprocessing.spawn(train_in_a_process, (str(path),), nprocs=2)
    return torch.load(path / "found.pt")


@pytest.mark.parametrize(("kind", "which", "policy"), TRAINED)
def test_training_is_that_of_one_process(found, kind, which, policy):
    right = outcome(trained(made(kind), kind, slice(None)), kind)
    begun = outcome(made(kind), kind)
    assert found[kind, which, policy].keys() == right.keys()
    for name, expected in right.items():
        torch.testing.assert_close(found[kind, which, policy][name], expected, rtol=0, atol=1e-8, msg=name)
    assert all(not torch.equal(begun[name], right[name]) for name, weight in made(kind).named_parameters())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("reversible", 'layers.0, actnorm: .* sharded layer .* set backprop to "checkpoint"'),
        ("nested", 'sharded layer .* set backprop to "checkpoint"'),
        ("late", "actnorm is sharded already; initialize the chain, then"),
    ],
)
def test_what_is_refused(found, name, says):
    with pytest.raises(invflow.InvflowError, match=says):
        raise invflow.InvflowError(found["refusals"][name])
