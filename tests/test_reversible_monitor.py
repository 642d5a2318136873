"""The monitor: a reconstruction that is wrong is never silent, and a right one never noisy."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed.nn
from torch import nn

import invflow
from invflow import Inverse, Sequential
from invflow.bijections import AdditiveCoupling, AffineCoupling, Linear1x1, Merge, Psi, Split
from invflow.diagnostics.reconstruction import reconstruction_errors
from invflow.errors import ReconstructionError, ReconstructionWarning
from invflow.reversible import Reconstruction, tolerance
from invflow.reversible import monitor as monitoring
from invflow.reversible.monitor import CHANNELS, SAMPLES, Fingerprint, _places, errors_of, relative_errors, set_back

GRADIENT = 1e-5
"""Relative, float32: what gradients may lose before the monitor must warn."""
CHANNELS_OF_CHAIN = 16


def normalised(channels=8):
    """A conditioner that divides each channel by its deviation first, as i-RevNet's do."""
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, channels, 3, padding=1),
    )  # fmt: skip


def chain_of(depth=8, monitor="warn", **options):
    torch.manual_seed(1)
    couplings = (AdditiveCoupling(normalised()) for _ in range(depth))
    return Sequential(Split(), *couplings, Merge(), backprop="reversible", monitor=monitor, **options)


def images(batch=8):
    return torch.randn(batch, CHANNELS_OF_CHAIN, 6, 6, generator=torch.Generator().manual_seed(0))


def padded():
    """Injective padding: dead channels, which batch norm divides by the root of its eps alone."""
    x = images()
    x[:, 3:] = 0
    return x


def faint():
    """Channels whose spread is no larger than the noise with which they come back."""
    x = images()
    x[:, 3:] *= 1e-7
    return x


def ill_conditioned(monitor="warn"):
    torch.manual_seed(1)
    couplings = (AffineCoupling(nn.Conv2d(8, 16, 3, padding=1)) for _ in range(24))
    return Sequential(Split(), *couplings, Merge(), backprop="reversible", monitor=monitor)


class Reading(nn.Module):
    """A conditioner that begins with any function, which may be no module."""

    def __init__(self, read, channels=8):
        super().__init__()
        self.read = read
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(self.read(x))


def couplings(make_net, depth=6, monitor="warn"):
    torch.manual_seed(0)
    layers = (AdditiveCoupling(make_net()) for _ in range(depth))
    return Sequential(Split(), *layers, Merge(), backprop="reversible", monitor=monitor)


class Unsound(invflow.Bijection):
    volume_preserving = True
    cheap_inverse = True

    def forward(self, x, context=None):
        return x * 1.0

    def inverse(self, y, context=None):
        return y + 1e-2


READERS = {
    "batch norm": normalised,
    "a ReLU": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
    "a function": lambda: Reading(nn.functional.relu),
    "a function that normalises": lambda: Reading(lambda x: nn.functional.batch_norm(x, None, None, training=True)),
    "group norm": lambda: nn.Sequential(nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
}


def gradients(chain, x, policy):
    chain = copy.deepcopy(chain)
    chain.backprop = policy
    x = x.clone().requires_grad_()
    chain(x).square().mean().backward()
    return torch.cat([leaf.grad.flatten().double() for leaf in (x, *chain.parameters())])


def angle(a, b):
    """In degrees."""
    a, b = a / a.norm(), b / b.norm()
    return float(torch.rad2deg(2 * torch.atan2((a - b).norm(), (a + b).norm())))


class TestWhatItSays:
    @pytest.mark.parametrize("depth", [4, 8, 16])
    def test_faint_channels_under_batch_norm(self, depth):
        chain = chain_of(depth)
        with pytest.warns(ReconstructionWarning, match=r"layers\.\d+, AdditiveCoupling.* here it began"):
            wrong = gradients(chain, faint(), "reversible")
        assert angle(wrong, gradients(chain, faint(), "stored")) > 10  # it is right to speak

    @pytest.mark.parametrize("read", [nn.functional.relu, lambda x: nn.functional.layer_norm(x, x.shape[1:])])
    def test_faint_channels_read_by_functions(self, read):
        with pytest.warns(ReconstructionWarning, match="relative error"):
            gradients(couplings(lambda: Reading(read)), faint(), "reversible")

    @pytest.mark.parametrize("exponent", [3, 4, 5])
    def test_how_far_the_gradients_may_be_off(self, exponent):
        chain, x = chain_of(4), images()
        x[:, 3:] *= 10.0**-exponent
        right = gradients(chain, x, "stored")
        with pytest.warns(ReconstructionWarning, match="before it are wrong, perhaps by") as spoken:
            wrong = gradients(chain, x, "reversible")
        message = str(spoken[0].message)
        if "by any amount" in message:  # the variance is near that of rounding, which differs between processors
            assert exponent == 5
        else:
            said = message.split("by about ")[1].split(" ", maxsplit=1)[0]
            assert (wrong - right).norm() <= float(said) * right.norm()

    def test_a_channel_that_comes_back_with_more_than_rounding(self):
        layers = Unsound(), Psi(1), Linear1x1(shape=(16, 6, 6))
        chain = Sequential(*layers, backprop="reversible", monitor="warn")
        message = "layers.0, Unsound.*constant in this batch and came back with noise.*by any amount"
        with pytest.warns(ReconstructionWarning, match=message):
            gradients(chain, padded(), "reversible")

    def test_dead_channels_are_invisible_in_eval_mode(self):
        chain = chain_of().eval()
        right = gradients(chain, padded(), "stored")
        with warnings.catch_warnings():  # whether or not it speaks, no gradient is wrong here
            warnings.simplefilter("ignore", ReconstructionWarning)
            assert angle(gradients(chain, padded(), "reversible"), right) < 1

    @pytest.mark.parametrize("mean", [0.0, 1.0])
    @pytest.mark.parametrize("exponent", range(0, -13, -2))
    def test_gradients_are_right_or_it_speaks(self, mean, exponent):
        """Two channels of the input lose their variance by and by."""
        x = images()
        x[:, [0, 8]] = mean + x[:, [0, 8]] * 10.0 ** (exponent / 2)
        chain = chain_of()
        right = gradients(chain, x, "stored")
        with warnings.catch_warnings(record=True) as spoken:
            warnings.simplefilter("always")
            found = gradients(chain, x, "reversible")
        if not spoken:
            assert (found - right).norm() <= GRADIENT * right.norm()
        assert exponent < -2 or not spoken  # a variance of 1e-2 is nothing to speak of

    def test_ill_conditioned_affine_couplings(self):
        with pytest.warns(
            ReconstructionWarning, match=r"layers\.\d+, AffineCoupling.* came back with a relative error"
        ):
            gradients(ill_conditioned(), images(), "reversible")

    def test_silent_on_a_deep_chain_whose_gradients_are_right(self):
        chain = chain_of(64)  # warnings are errors here
        found, right = gradients(chain, images(), "reversible"), gradients(chain, images(), "stored")
        assert (found - right).norm() <= GRADIENT * right.norm()
        assert angle(found, right) < 0.1

    def test_a_conditioner_that_is_no_function_of_its_input(self):
        class Counting(nn.Conv2d):
            calls = 0

            def forward(self, x):
                self.calls += 1
                return super().forward(x) * self.calls

        chain = Sequential(Split(), *(AdditiveCoupling(Counting(8, 8, 1)) for _ in range(3)))
        chain.backprop, chain.monitor = "reversible", "warn"
        with pytest.warns(ReconstructionWarning, match="came back"):
            sum(half.square().sum() for half in chain(images())).backward()

    @pytest.mark.parametrize("value", [0.0, 3.0])
    def test_a_constant_feature_is_nothing_to_speak_of_where_no_spread_divides(self, value):
        chain = Sequential(Split(), *(AdditiveCoupling(nn.Linear(3, 3)) for _ in range(4)), Merge(), monitor="raise")
        x = torch.randn(9, 6)
        x[:, [1, 4]] = value
        found, right = gradients(chain, x, "reversible"), gradients(chain, x, "stored")
        assert (found - right).norm() <= GRADIENT * right.norm()

    def test_once_a_layer(self):
        chain = chain_of()
        with warnings.catch_warnings(record=True) as spoken:
            warnings.simplefilter("always")
            for _ in range(4):
                chain(faint()).square().mean().backward()
        assert len(spoken) == len(chain.reconstruction.reported) <= 2

    def test_a_run_within_a_chain_is_named_by_its_place(self):
        chain = Sequential(
            Sequential(*chain_of()[:3]), Sequential(*chain_of()[3:]), backprop="reversible", monitor="warn"
        )
        with pytest.warns(ReconstructionWarning, match=r"layers\.[01]\.layers\.\d, "):
            chain(faint()).square().mean().backward()

    def test_backwards_too(self):
        chain = chain_of()
        with pytest.warns(ReconstructionWarning, match=r"layers\.\d, the inverse of AdditiveCoupling"):
            chain.inverse(faint()).square().mean().backward()


class TestConstantChannels:
    """They come back as they were, so that nothing behind them sees noise; warnings are errors here."""

    @pytest.mark.parametrize("reader", READERS)
    @pytest.mark.parametrize("value", [0.0, 0.25, 0.3, 1.3, -1e-6])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, GRADIENT), (torch.float64, 1e-12)])
    def test_whoever_reads_them(self, reader, value, dtype, tolerance):
        chain, x = couplings(READERS[reader]).to(dtype), padded().to(dtype)
        x[:, 3:] = value
        for coupling in list(chain)[1:-1]:  # half of the channels stay as they were, as if their last layer were zero
            with torch.no_grad():
                last = [part for part in coupling.net.modules() if isinstance(part, nn.Conv2d)][-1]
                last.weight[4:] = last.bias[4:] = 0
        found, right = gradients(chain, x, "reversible"), gradients(chain, x, "stored")
        assert (found - right).norm() <= tolerance * right.norm()

    def test_in_a_wide_state(self):
        torch.manual_seed(0)
        nets = (nn.Sequential(nn.BatchNorm2d(150), nn.ReLU(), nn.Conv2d(150, 150, 1)) for _ in range(3))
        chain = Sequential(Split(), *map(AdditiveCoupling, nets), Merge(), monitor="warn").double()
        x = torch.randn(4, 300, 3, 3, dtype=torch.float64)
        x[:, 1::2] = 0
        found, right = gradients(chain, x, "reversible"), gradients(chain, x, "stored")
        assert (found - right).norm() <= 1e-12 * right.norm()

    def test_numbers_that_the_samples_missed_stay(self):
        before = torch.zeros(4, 2, 100, 100)
        before[2, 1, 3, 5] = 7.0
        numbers = before[0, :, 0]
        found = set_back(before + 1e-7, numbers, numbers + 1e-7, tolerance(torch.float32))
        assert torch.equal(found, before + (before > 0) * 1e-7)

    @pytest.mark.parametrize("batch", [2, 5, 32])
    @pytest.mark.parametrize("monitor", ["warn", "repair"])
    def test_small_states_are_known(self, batch, monitor):
        torch.manual_seed(0)
        nets = (nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(64))
        chain = Sequential(Split(), *map(AdditiveCoupling, nets), Merge(), backprop="reversible", monitor=monitor)
        x = torch.randn(batch, 16)
        x[:, 0], x[:, 1], x[:, 2:5], x[:, 9] = 0.0, 1.0, nn.functional.one_hot(torch.arange(batch) % 3, 3), 0.3
        found, right = gradients(chain, x, "reversible"), gradients(chain, x, "stored")
        assert (found - right).norm() <= GRADIENT * right.norm()
        chain(x).sum().backward()
        assert not chain.reconstruction.anchors

    def test_noise_beyond_the_tolerance(self):
        """64 layers that normalise: the constants come back with noise of 1e-4, and are known all the same."""
        torch.manual_seed(0)
        nets = [normalised() for _ in range(64)]
        chain = Sequential(Split(), *map(AdditiveCoupling, nets), Merge(), backprop="reversible", monitor="warn")
        found, right = gradients(chain, padded(), "reversible"), gradients(chain, padded(), "stored")
        assert (found - right).norm() <= 1e-3 * right.norm()

    def test_double_backward(self):
        chain, x = couplings(lambda: Reading(torch.tanh)).double(), padded().double()
        slopes = []
        for chain.backprop in ("stored", "reversible"):
            (slope,) = torch.autograd.grad(chain(x.requires_grad_()).pow(3).sum(), x, create_graph=True)
            slopes.append(torch.autograd.grad(slope.square().sum(), x)[0])
        assert (slopes[0] - slopes[1]).norm() <= 1e-12 * slopes[0].norm()


class TestModes:
    def test_raise(self):
        with pytest.raises(ReconstructionError, match=r"layers\.\d, AdditiveCoupling"):
            chain_of(monitor="raise")(faint()).square().mean().backward()

    def test_off_keeps_nothing(self):
        chain = chain_of(monitor="off")
        chain(faint()).square().mean().backward()
        assert chain.reconstruction.errors == {}

    def test_anchors_bring_the_gradients_back(self):
        chain = chain_of(monitor="anchor")
        with pytest.warns(ReconstructionWarning, match="from now on this input is kept"):
            chain(faint()).square().mean().backward()
        for _ in range(len(chain)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ReconstructionWarning)
                chain(faint().requires_grad_()).square().mean().backward()
        assert chain.reconstruction.anchors
        right = gradients(chain, faint(), "stored")
        found = gradients(chain, faint(), "reversible")  # silent now: warnings are errors
        assert (found - right).norm() <= GRADIENT * right.norm()

    def test_anchors_change_no_value_and_travel_with_the_chain(self):
        chain = chain_of(monitor="anchor")
        before = copy.deepcopy(chain)(images())
        chain.reconstruction.anchors.add("layers.3")
        assert torch.equal(copy.deepcopy(chain)(images()), before)
        for other in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
            assert other.reconstruction.anchors == {"layers.3"}
            assert other.reconstruction is not chain.reconstruction
        assert list(chain.state_dict()) == list(before_state := chain_of().state_dict()), before_state
        assert [step.reversible for step in chain.steps()].count(False) == 1
        chain.reconstruction.reset()
        assert all(step.reversible for step in chain.steps())

    def test_in_a_spec(self):
        coupling = {"type": "additive_coupling", "net": {"type": "mlp"}}
        inner = {"type": "sequential", "layers": [coupling], "monitor": "off"}
        spec = {"input": {"shape": [4]}, "layers": [{"type": "split"}, inner], "monitor": "raise"}
        chain = invflow.build(spec)
        assert (chain.monitor, chain[1].monitor) == ("raise", "off")
        assert invflow.build(invflow.to_spec(chain)).monitor == "raise"
        plain = {**spec, "layers": [{"type": "split"}, {"type": "sequential", "layers": [coupling]}]}
        plain.pop("monitor")
        assert invflow.load_spec(spec).hash == invflow.load_spec(plain).hash
        with pytest.raises(
            invflow.SpecError, match="monitor: input should be 'off', 'warn', 'raise', 'anchor' or 'repair'"
        ):
            invflow.build({**spec, "monitor": "loud"})
        assert chain[::-1].monitor == chain[:1].monitor == "raise"


class TestMeasure:
    def test_noise_in_a_constant_channel_is_an_infinite_error(self):
        before = torch.zeros(2, 8)
        before[0] = torch.arange(8)
        after = before.clone()
        assert relative_errors(before, after) == 0
        after[1, 3] = 1e-12
        assert relative_errors(before, after) == torch.inf

    def test_what_was_no_number_before_is_no_error(self):
        before = torch.tensor([[0.0, 1.0, torch.nan, torch.inf, -torch.inf]])
        assert relative_errors(before, before + 0.25).item() == 0.25
        assert relative_errors(torch.full((1, 4), torch.nan), torch.full((1, 4), torch.nan)) == 0
        assert relative_errors(torch.zeros(1, 4), torch.full((1, 4), torch.nan)) == torch.inf

    @pytest.mark.parametrize(
        "shape", [(1, 3), (5,), (1, 2, 2, 2), (7, 3), (8, 3), (4, 3, 5, 5), (64, 512), (2, 200, 9)]
    )
    def test_samples_lie_in_their_channels(self, shape):
        x = torch.arange(torch.Size(shape).numel()).reshape(shape)
        places = _places(x.shape, x.device)
        assert places.shape[0] <= CHANNELS
        assert places.shape[1] <= SAMPLES
        assert places.min() >= 0
        assert places.max() < x.numel()
        if places.shape[0] > 1:
            channel = torch.arange(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)
            found = channel.take(places)
            assert bool((found == found[:, :1]).all())
            assert len(found[:, 0].unique()) == places.shape[0]

    def test_states_of_several_shapes_and_dtypes(self):
        first, second, whole = (
            torch.randn(9, 3),
            torch.randn(9, 4, 16, dtype=torch.float64),
            torch.ones(9, 2, dtype=torch.int64),
        )
        fingerprint = Fingerprint(Reconstruction(), "warn")
        fingerprint.keep(0, [first, whole], [second])
        fingerprint.keep(1, [second], [second.clone(), torch.empty(0, 3)])
        fingerprint.begin((first, second), None)
        errors = errors_of([*fingerprint.compare(1, (second + 1e-3,))[1], *fingerprint.compare(0, (first, whole))[1]])
        assert errors[0] == 0
        assert 1e-4 < errors[1] < 1e-2

    @pytest.mark.parametrize("batch", [0, 1])
    def test_batches_of_one_and_of_none(self, batch):
        nets = (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(4))
        chain = Sequential(Split(), *(AdditiveCoupling(net) for net in nets), backprop="reversible", monitor="raise")
        sum(half.square().sum() for half in chain(images(batch))).backward()
        vectors = Sequential(Split(), *(AdditiveCoupling(nn.Linear(8, 8)) for _ in range(4)), backprop="reversible")
        sum(half.square().sum() for half in vectors(torch.randn(batch, 16))).backward()

    def test_nan_and_infinity_that_were_there_already(self):
        for value in (torch.nan, torch.inf):
            chain = chain_of(monitor="raise")
            x = images()
            x[0, 0, 0, 0] = value
            chain(x).square().mean().backward()

    def test_under_autocast_half_the_digits_are_enough(self):
        chain = chain_of(monitor="raise")
        with torch.autocast("cpu", torch.bfloat16):
            loss = chain(images()).square().mean()
        loss.backward()
        assert chain.reconstruction.errors
        assert tolerance(torch.bfloat16) > 100 * tolerance(torch.float32)

    @pytest.mark.parametrize(("precisions", "repaired"), [(("none", "none"), True), (("none", "tf32"), False)])
    def test_tf32_is_judged_by_its_own_digits(self, monkeypatch, precisions, repaired):
        """As on CUDA, where convolutions are computed in TF32 by default; here a conditioner rounds as they do."""

        class Tf32(nn.Conv2d):
            def forward(self, x):
                return self._conv_forward(of_11_bits(x), of_11_bits(self.weight), self.bias)

        def of_11_bits(number):
            mantissa, exponent = torch.frexp(number.detach())
            return number + (torch.ldexp((mantissa * 2**11).round(), exponent - 11) - number).detach()

        monkeypatch.setattr(monitoring, "float32_precisions", lambda _: precisions)
        torch.manual_seed(0)
        nets = [nn.Sequential(Tf32(8, 8, 3, padding=1), nn.ReLU(), Tf32(8, 8, 3, padding=1)) for _ in range(64)]
        chain = Sequential(Split(), *map(AdditiveCoupling, nets), Merge(), backprop="reversible")
        x = torch.randn(8, 16, 8, 8)
        found, expected = gradients(chain, x, "reversible"), gradients(chain, x, "stored")
        chain(x).square().mean().backward()
        assert bool(chain.reconstruction.anchors) == repaired
        assert (found - expected).norm() / expected.norm() < 3e-3, "TF32's own error is 1e-3"

    @pytest.mark.parametrize("precision", ["ieee", "none", "tf32", "bf16"])
    def test_tolerances_follow_the_device(self, monkeypatch, precision):
        monkeypatch.setattr(
            monitoring, "float32_precisions", {"cuda": (precision, "none"), "mkldnn": ("none",) * 2}.get
        )
        cuda, allowed = torch.device("cuda"), {"tf32": 3.9e-3, "bf16": tolerance(torch.bfloat16)}
        assert tolerance(torch.float32, cuda) == pytest.approx(
            allowed.get(precision, tolerance(torch.float32)), rel=0.01
        )
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            assert tolerance(dtype, cuda) == tolerance(dtype)

    def test_errors_by_layer_as_data(self):
        chain = Sequential(Psi(2), Linear1x1(shape=(16, 3, 3)), *chain_of(4), Inverse(Psi(2)), backprop="reversible")
        x = torch.randn(8, 4, 6, 6)
        errors = reconstruction_errors(chain, x)
        assert list(errors) == [f"layers.{position}" for position in range(len(chain))]
        assert 0 < max(errors.values()) < tolerance(torch.float32)
        assert errors["layers.6"] == 0  # the last layer that trains keeps its activations
        chain(x.requires_grad_()).square().mean().backward()
        for name, sampled in chain.reconstruction.errors.items():
            assert sampled <= 2 * max(errors.values()), name

    def test_errors_of_dead_channels_as_data(self):
        assert max(reconstruction_errors(chain_of(), padded()).values()) <= 1e-5
        assert max(reconstruction_errors(chain_of(), faint()).values()) > 0.1
        anchored = chain_of()
        anchored.reconstruction.anchors |= {f"layers.{position}" for position in range(len(anchored))}
        assert set(reconstruction_errors(anchored, faint()).values()) == {0.0}
