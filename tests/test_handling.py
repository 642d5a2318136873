"""What people do to a model's tensors: averages, loads, casts, sharding. Nothing becomes silently wrong."""

from __future__ import annotations

import copy

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import invflow
from invflow import InvflowError
from invflow.bijections import ActNorm, Linear1x1, Permute
from invflow.nets.spectral import SpectralLinear

SHAPE = (16, 2, 2)
LAYERS = [
    {"type": "actnorm"},
    {"type": "permute", "seed": 0},
    {"type": "linear_1x1"},
    {"type": "split"},
    {"type": "affine_coupling", "net": {"type": "conv", "hidden": [4], "norm": "batch"}},
    {"type": "merge"},
]
RULES = {
    "equal": {},
    "foreach": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "lightning's": {"avg_fn": get_ema_avg_fn(0.9)},
}


def make_flow():
    spec = {"input": {"shape": SHAPE}, "layers": LAYERS, "prior": {"type": "standard_normal"}}
    return invflow.build_model(spec).eval()


def images(seed=0):
    return 3 * torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(seed)) + 1


def set_up():
    flow = make_flow()
    flow.bijection.initialize(images())
    return flow


def on_meta():
    with torch.device("meta"):
        return make_flow()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("rule", RULES)
class TestAverages:
    def average(self, flow, rule, use_buffers):
        return AveragedModel(flow, use_buffers=use_buffers, **RULES[rule])

    def test_of_equal_models_is_that_model(self, rule, use_buffers):
        flow = set_up()
        average = self.average(flow, rule, use_buffers)
        for _ in range(30):
            average.update_parameters(flow)
        close(average.module.log_prob(images()), flow.log_prob(images()))
        close(average.module.bijection.inverse(average.module.bijection(images())), images())
        for at, name in ((1, "order"), (2, "order"), (2, "sign")):
            assert torch.equal(getattr(average.module.bijection[at], name), getattr(flow.bijection[at], name))

    def test_that_begins_before_initialize_is_refused_by_whatever_uses_it(self, rule, use_buffers):
        flow = make_flow()
        average = self.average(flow, rule, use_buffers)
        average.update_parameters(flow)
        flow.bijection.initialize(images())
        for _ in range(2):
            average.update_parameters(flow)
        for use in (
            lambda model: model.log_prob(images()),
            lambda model: model.sample(2),
            lambda model: model.train(),
            lambda model: model.eval(),
            lambda model: model.state_dict(),
            lambda model: model.bijection.awaits_data,
            lambda model: model.bijection.initialize(images()),
        ):
            with pytest.raises(InvflowError, match="actnorm is a copy made before initialize that was averaged"):
                use(average.module)
        flow.log_prob(images())

    def test_made_before_initialize_and_begun_after_it_is_right(self, rule, use_buffers):
        flow = make_flow()
        average = self.average(flow, rule, use_buffers)
        flow.bijection.initialize(images())
        average.update_parameters(flow)
        assert torch.equal(average.module.log_prob(images()), flow.log_prob(images()))
        assert not average.module.bijection.awaits_data

    def test_of_layers_that_await_data_awaits_data(self, rule, use_buffers):
        flow = make_flow()
        average = self.average(flow, rule, use_buffers)
        for _ in range(2):
            average.update_parameters(flow)
        assert average.module.bijection.awaits_data
        average.module.bijection.initialize(images())
        assert not average.module.bijection.awaits_data


class Learner(lightning.LightningModule):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def training_step(self, batch, _):
        return -self.flow.log_prob(batch).mean()

    def validation_step(self, batch, _):
        start = self.flow.bijection.inverse(self.flow.bijection(batch))
        assert (start - batch).abs().max() < 1e-3

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.cat([images(seed) for seed in range(5)]), batch_size=8)

    val_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers and devices
def test_lightnings_average_trains_a_model_that_is_one(tmp_path):
    flow = set_up()
    order = flow.bijection[1].order.clone()
    learner = Learner(flow)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.9)], default_root_dir=tmp_path, **options
    )
    trainer.fit(learner)
    assert torch.equal(flow.bijection[1].order, order)
    flow.eval()
    close(flow.bijection.inverse(flow.bijection(images())), images())
    [path] = tmp_path.rglob("*.ckpt")
    weights = torch.load(path, weights_only=True)["state_dict"]
    other = Learner(make_flow())
    other.load_state_dict(weights)
    assert not other.flow.bijection.awaits_data
    close(other.flow.eval().log_prob(images()), flow.log_prob(images()))


class TestLoads:
    def test_on_the_meta_device(self):
        flow = set_up()
        weights = flow.state_dict()
        assigned, emptied = on_meta(), on_meta().to_empty(device="cpu")
        assigned.load_state_dict(weights, assign=True)
        emptied.load_state_dict(weights)
        for other in (assigned, emptied):
            assert torch.equal(other.eval().log_prob(images()), flow.log_prob(images()))
            assert other.sample(3).device == torch.device("cpu")
            assert torch.isfinite(other.sample(3)).all()

    def test_assigned_weights_bring_their_dtype(self):
        weights = set_up().double().state_dict()
        flow = make_flow()
        flow.load_state_dict(weights, assign=True)
        assert flow.sample(2).dtype == torch.float64

    def test_nothing_holds_what_the_memory_held(self):
        flow = on_meta().to_empty(device="cpu")
        assert all(tensor.isnan().all() for tensor in flow.parameters())
        assert torch.equal(flow.bijection[1].order, make_flow().bijection[1].order)

    @pytest.mark.parametrize(
        ("make", "options"),
        [(on_meta, {"assign": True}), (lambda: on_meta().to_empty(device="cpu"), {})],
        ids=["assign", "to_empty"],
    )
    def test_what_was_left_out_is_named(self, make, options):
        weights = {key: value for key, value in set_up().state_dict().items() if "0.shift" not in key}
        with pytest.raises(InvflowError, match=r"ActNorm expects a state_dict with all of its weights.* 'shift'"):
            make().load_state_dict(weights, strict=False, **options)
        assert make_flow().load_state_dict(weights, strict=False).missing_keys == ["bijection.layers.0.shift"]

    def test_a_constant_that_was_left_out_is_made_again(self):
        flow = set_up()
        weights = {key: value for key, value in flow.state_dict().items() if "order" not in key}
        other = on_meta()
        other.load_state_dict(weights, strict=False, assign=True)
        assert torch.equal(other.eval().log_prob(images()), flow.log_prob(images()))
        with pytest.raises(RuntimeError, match=r'Missing key.*"bijection.layers.1.order", "bijection.layers.2.order"'):
            make_flow().load_state_dict(weights)

    def test_an_order_that_is_none_is_refused_and_changes_nothing(self):
        layer = Permute(order=[2, 0, 1])
        for bad in ([0, 0, 1], [1.2, 0.4, 0.4], [-1, 0, 1]):
            with pytest.raises(InvflowError, match=r"permute expects an order that holds each of 0 .. 2 once"):
                layer.load_state_dict({"order": torch.tensor(bad)})
        with pytest.raises(RuntimeError, match="size mismatch for order"):
            layer.load_state_dict({"order": torch.tensor([1, 0])})
        assert layer.order.tolist() == [2, 0, 1]
        layer.load_state_dict({"order": torch.tensor([0.9999, 2.0001, 0.0])})  # an average of equal ones
        assert layer.order.tolist() == [1, 2, 0]

    def test_a_sign_that_is_none_is_refused(self):
        layer = Linear1x1((3,))
        with pytest.raises(InvflowError, match="linear_1x1 expects signs of 1 and -1"):
            layer.load_state_dict(layer.state_dict() | {"sign": torch.tensor([1.0, 0.0, 1.0])})

    def test_a_spectral_norm_is_that_of_the_loaded_weights(self):
        torch.manual_seed(0)
        layer, other = SpectralLinear(4, 4), SpectralLinear(4, 4)
        with torch.no_grad():
            other.weight.mul_(10)
        for each in (layer, other):
            each.eval()
        layer.load_state_dict({key: other.state_dict()[key] for key in ("weight", "fingerprint")}, strict=False)
        assert torch.linalg.matrix_norm(layer.normalized_weight().detach(), 2) == pytest.approx(1, abs=1e-5)


def test_a_checkpoint_whose_order_is_none_is_refused(tmp_path):
    chain = invflow.build({"input": {"shape": [3]}, "layers": [{"type": "permute", "seed": 0}, {"type": "affine"}]})
    chain[0].order = torch.tensor([0, 0, 1])
    invflow.save(chain, tmp_path)
    with pytest.raises(invflow.CheckpointError, match="these weights are refused: permute expects an order"):
        invflow.load(tmp_path)


def test_an_exact_chain_stays_exact_in_averages_and_on_the_meta_device():
    coupling = {"type": "additive_coupling", "net": {"type": "mlp", "hidden": [8], "activation": "tanh"}}
    layers = [{"type": "split"}, coupling, {"type": "merge"}]
    spec = {"input": {"shape": [6]}, "numerics": {"mode": "exact"}, "layers": layers}
    chain = invflow.build(spec).eval()
    model = torch.nn.ModuleList([chain, torch.nn.Linear(1, 1)])  # an average needs a weight
    average = AveragedModel(model, use_buffers=True, **RULES["lightning's"])
    for _ in range(30):
        average.update_parameters(model)
    emptied = copy.deepcopy(chain).to("meta").to_empty(device="cpu")
    emptied.load_state_dict(chain.state_dict())
    x = torch.randint(-(2**17), 2**17, (50, 6)) / 2**16
    for other in (average.module[0], emptied):
        assert torch.equal(other(x), chain(x))
        assert torch.equal(other.inverse(other(x)), x)


def test_a_state_dict_has_copies_of_constants():
    layer = Permute(order=[2, 0, 1])
    layer.state_dict()["order"].zero_()  # as averages of state_dicts do
    assert layer.order.tolist() == [2, 0, 1]


def test_casts_keep_integers():
    flow = set_up()
    flow.type(torch.float64)
    assert flow.bijection[1].order.dtype == torch.int64
    assert flow.bijection[2].sign.dtype == torch.float64
    close(flow.bijection.inverse(flow.bijection(images().double())), images().double())


def test_processes_of_other_seeds_construct_the_same_constants():
    layers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        layers.append(Linear1x1((5,)))
    first, second = layers
    assert torch.equal(first.order, second.order)
    assert torch.equal(first.sign, second.sign)
    for layer in layers:
        matrix = layer(torch.eye(5)).T
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(5))


@pytest.mark.filterwarnings("ignore")
def test_state_dicts_under_sharding(tmp_path):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def sharded(flow):
        for layer in (*flow.bijection, flow):
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        return flow

    def gathered(weights):
        return {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in weights.items()}

    whole = StateDictOptions(full_state_dict=True)
    flow = set_up()
    weights = copy.deepcopy(flow.state_dict())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        assert not sharded(flow).bijection.awaits_data
        found = gathered(get_model_state_dict(flow, options=whole))
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], value) for key, value in weights.items())
        other = sharded(on_meta()).to_empty(device="cpu")
        set_model_state_dict(other, dict(found), options=whole)
        again = gathered(other.state_dict())
        assert all(torch.equal(again[key], value) for key, value in weights.items())
        assigned = sharded(on_meta())
        assigned.load_state_dict(other.state_dict(), assign=True)
        again = gathered(assigned.state_dict())
        assert all(torch.equal(again[key], value) for key, value in weights.items())
    finally:
        torch.distributed.destroy_process_group()


def test_a_process_gets_the_initialized_layers_of_another():
    first, second = ActNorm(SHAPE), ActNorm(SHAPE)
    first.initialize(images())
    with torch.no_grad():  # as DistributedDataParallel broadcasts: weights once, buffers before each call too
        for one, other in zip(second.parameters(), first.parameters(), strict=True):
            one.detach().copy_(other)
        for _ in range(3):
            second.initialized.copy_(first.initialized)
    assert not second.awaits_data
    assert torch.equal(second(images()), first(images()))
