"""The analyses by depth: numbers that can be computed by hand, and what does not apply is said."""

from __future__ import annotations

import json
import math

import matplotlib as mpl
import pytest
import torch
from PIL import Image
from torch import nn

import invflow
from invflow import measures
from invflow.bijections import AdditiveCoupling, Affine, Duplicate, Merge, Permute, Psi, Split
from invflow.diagnostics.analysis import chosen_depths, separations, spectra
from invflow.errors import DataError, InvflowError
from invflow.samples import Batch, DataSet, InMemory
from invflow.training import analysing
from tests.test_density_training import images, points
from tests.test_public import CLASSIFIER, CONDITIONAL, FLOW
from tests.test_public import images as pixels_and_labels
from tests.test_training import tiny

EXACT = 1e-12
"""Relative, in float64: a few eps, times the condition numbers of these chains, below 100."""
ITERATED = 1e-6
"""Relative: the accuracy that the iteration is asked for."""


def scale(*factors):
    layer = Affine(shape=(len(factors),)).double()
    with torch.no_grad():
        layer.log_scale.copy_(torch.tensor(factors, dtype=torch.float64).log())
    return layer


class Square(nn.Module):
    def forward(self, a):
        return a.square()


def couplings(**options):
    torch.manual_seed(0)
    coupling = {"type": "additive_coupling", "net": {"type": "conv", "hidden": [8]}}
    layers = [{"type": "psi", "block_size": 2}, {"type": "split"}, coupling, coupling, coupling, {"type": "merge"}]
    return invflow.build({"input": {"shape": [1, 8, 8]}, "layers": layers, **options})


def numbers(found):
    return torch.tensor([spectrum.values for spectrum in found], dtype=torch.float64)


class TestSpectra:
    def test_scales_multiply_along_the_chain(self):
        chain = invflow.Sequential(scale(2, 0.5, 1), Permute([1, 2, 0]), scale(3, 1, 5))
        x = torch.randn(2, 3, dtype=torch.float64)
        found = spectra(chain, x, depths=[0, 1, 3])
        assert [(spectrum.depth, spectrum.layer) for spectrum in found] == [(1, "Affine()"), (3, "Affine()")]
        # (2, 0.5, 1) are permuted to (0.5, 1, 2), and each is scaled.
        expected = torch.tensor([[2, 1, 0.5], [10, 1.5, 1]], dtype=torch.float64)[:, None].expand(2, 2, 3)
        torch.testing.assert_close(numbers(found), expected, rtol=EXACT, atol=0)

    def test_at_each_input_its_own(self):
        chain = invflow.Sequential(Split(), AdditiveCoupling(Square()), Merge())
        (found,) = spectra(chain, torch.tensor([[0.0, 1.0], [3.0, 1.0]]), depths=[2])
        # (a, b) -> (a^2 + b, a): the Jacobian [[2a, 1], [1, 0]] is symmetric with eigenvalues a +- sqrt(a^2 + 1).
        expected = [[abs(a + sign * math.sqrt(a * a + 1)) for sign in (1, -1)] for a in (0.0, 3.0)]
        torch.testing.assert_close(found.values, expected, rtol=EXACT, atol=0)

    def test_couplings_preserve_volume(self):
        found = numbers(spectra(couplings(), torch.rand(2, 1, 8, 8), depths=[3, 4, 5]))
        assert found.shape == (3, 2, 64)
        assert (found.log().sum(2).abs() <= 64 * EXACT).all()
        assert (found.diff(dim=2) <= 0).all()
        assert (found[:, :, 0] > 1.01).all(), "a chain that only permutes would pass the test"

    def test_an_injection_has_as_many_as_its_input(self):
        (found,) = spectra(invflow.Sequential(Duplicate()), torch.randn(1, 2, 2, 2), depths=[1])
        torch.testing.assert_close(found.values, [[math.sqrt(2)] * 8], rtol=EXACT, atol=0)

    def test_a_context_conditions_the_derivative(self):
        torch.manual_seed(0)
        chain = invflow.build({key: CONDITIONAL[key] for key in ("input", "layers")}).double()
        x, context = torch.randn(2, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
        (found,) = spectra(chain, x, context, depths=[4])
        for i in range(2):
            dense = torch.autograd.functional.jacobian(lambda one, i=i: chain(one, context[i : i + 1]), x[i : i + 1])
            expected = torch.linalg.svdvals(dense.reshape(2, 2)).tolist()
            torch.testing.assert_close(found.values[i], expected, rtol=EXACT, atol=0)

    @pytest.mark.parametrize("count", [1, 10])
    def test_the_leading_ones_by_iteration(self, count):
        x, depths = torch.rand(2, 1, 8, 8), [3, 5, 6]
        every = numbers(spectra(couplings(), x, depths=depths))
        found = numbers(spectra(couplings(), x, depths=depths, dense=63, leading=count))
        torch.testing.assert_close(found, every[:, :, :count], rtol=ITERATED, atol=0)
        assert torch.equal(numbers(spectra(couplings(), x, depths=depths, dense=63, leading=count)), found)

    def test_an_iteration_among_equal_values(self):
        chain, x = invflow.Sequential(scale(*[2.0] * 10, *[1.0] * 30)), torch.zeros(1, 40, dtype=torch.float64)
        found = spectra(chain, x, depths=[1], dense=0, leading=12)
        torch.testing.assert_close(found[0].values, [[2.0] * 10 + [1.0] * 2], rtol=ITERATED, atol=0)

    def test_rows_of_the_jacobian_are_computed_in_parts(self, monkeypatch):
        x = torch.rand(1, 1, 8, 8)
        whole = numbers(spectra(couplings(), x, depths=[5]))
        monkeypatch.setattr(measures, "ROWS_AT_ONCE", 5)
        torch.testing.assert_close(numbers(spectra(couplings(), x, depths=[5])), whole, rtol=EXACT, atol=0)

    def test_a_grid_counts_as_the_identity(self):
        x = torch.randint(256, (1, 1, 8, 8)) / 256
        plain = numbers(spectra(couplings(), x, depths=[3, 5]))
        on_grid = numbers(spectra(couplings(numerics={"mode": "grid", "frac_bits": 20}), x, depths=[3, 5]))
        # The states differ by 2^-20, which may flip a ReLU: not here.
        torch.testing.assert_close(on_grid, plain, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("backprop", ["stored", "reversible"])
    def test_the_chain_is_left_alone(self, training, backprop):
        chain = couplings(backprop=backprop).train(training)
        before = {name: weight.clone() for name, weight in chain.state_dict().items()}
        spectra(chain, torch.rand(1, 1, 8, 8), depths=[5])
        assert chain.training is training
        assert all(torch.equal(weight, before[name]) for name, weight in chain.state_dict().items())

    @pytest.mark.parametrize("dense", [0, 100])
    def test_a_derivative_that_is_not_finite(self, dense):
        x = torch.full((1, 80), math.inf)
        chain = invflow.Sequential(Split(), AdditiveCoupling(Square()), Merge())
        with pytest.raises(InvflowError, match=r"singular values: the derivative .* is not finite"):
            spectra(chain, x, depths=[2], dense=dense)


def test_few_numbers_behind_a_joint():
    parts = [{"type": "average_pool", "size": 4}, {"type": "conv", "channels": 2, "kernel_size": 1}]
    chain = invflow.build({"input": {"shape": [1, 8, 8]}, "layers": [{"type": "joint", "parts": parts}]}).double()
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    exact, iterated = (spectra(chain, x, depths=[1], dense=dense, leading=16)[0].values[0] for dense in (100, 10))
    assert iterated == pytest.approx(exact, abs=EXACT)


def test_depths_skip_what_only_moves_numbers():
    assert chosen_depths(couplings(), (1, 8, 8), 12) == [0, 3, 4, 5]
    assert chosen_depths(couplings(), (1, 8, 8), 2) == [0, 5]
    assert chosen_depths(invflow.Sequential(Psi(2)), (1, 8, 8), 12) == [0]
    chain = invflow.Sequential(*[Affine(shape=(2,)) for _ in range(100)])
    assert chosen_depths(chain, (2,), 5) == [0, 25, 50, 75, 100]


def labelled(values, labels):
    return [Batch(torch.as_tensor(values, dtype=torch.float64), torch.as_tensor(labels))]


class TestSeparation:
    @staticmethod
    def ring(count, seed):
        """Class 0 near a = 0, class 1 near a = 2 and a = -2; b is noise."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 2
        sign = 1 - 2 * (torch.arange(count) // 2 % 2)
        noise = 0.1 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
        return labelled(noise + torch.stack([2 * labels * sign, 0 * labels], 1), labels)

    def test_a_layer_that_separates_linearly(self):
        chain = invflow.Sequential(scale(1, 2), Split(), AdditiveCoupling(Square()), Merge())
        found, accuracy = separations(chain, self.ring(200, 0), self.ring(200, 1), depths=[0, 1, 3])
        assert [(row.depth, row.layer.partition("(")[0]) for row in found] == [
            (0, "input"),
            (1, "Affine"),
            (3, "AdditiveCoupling"),
        ]
        assert accuracy is None
        before, scaled, after = found
        assert before.linear_accuracy <= 0.8, "one threshold on a gets at most three quarters right, but for the noise"
        assert abs(scaled.linear_accuracy - before.linear_accuracy) <= 0.02, "standardised features know no scale"
        assert after.linear_accuracy == 1
        assert before.nearest_accuracy == 1

    def test_a_layer_that_contracts_noise(self):
        """The class is in a, 0 or 1; b is noise 100 times as large, until a layer divides it by 10,000."""

        def noisy(count, seed):
            b = 100 * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            labels = torch.arange(count) % 2
            return labelled(torch.stack([labels.double(), b], 1), labels)

        chain = invflow.Sequential(scale(1, 1e-4))
        (before, after), _ = separations(chain, noisy(100, 0), noisy(400, 1), depths=[0, 1])
        assert before.nearest_accuracy < 0.65, "the nearest sample has any class"
        assert after.nearest_accuracy == 1
        assert before.linear_accuracy == after.linear_accuracy == 1
        assert before.contraction == pytest.approx(1, abs=0.05)
        assert after.contraction < 0.05

    def test_contraction_by_hand(self):
        test = labelled([[0.0], [1.0], [10.0], [13.0]], [0, 0, 1, 1])
        (row,), _ = separations(invflow.Sequential(), test, test, depths=[0])
        within, between = (1 + 3) / 2, (10 + 13 + 9 + 12) / 4
        assert row.contraction == pytest.approx(within / between, rel=EXACT)

    def test_many_samples_in_parts(self, monkeypatch):
        test = self.ring(50, 1)
        (row,), _ = separations(invflow.Sequential(), self.ring(20, 0), test, depths=[0])
        monkeypatch.setattr("invflow.diagnostics.analysis.ROWS", 7)
        (parts,), _ = separations(invflow.Sequential(), self.ring(20, 0), test, depths=[0])
        assert parts.contraction == pytest.approx(row.contraction, rel=EXACT)
        assert (parts.nearest_accuracy, parts.linear_accuracy) == (row.nearest_accuracy, row.linear_accuracy)

    def test_no_pairs_no_contraction(self):
        (row,), _ = separations(invflow.Sequential(), self.ring(20, 0), labelled([[0.0, 0.0]], [0]), depths=[0])
        assert math.isnan(row.contraction)
        assert row.nearest_accuracy == row.linear_accuracy == 1

    def test_the_logits_are_the_last_depth(self):
        test = labelled([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]], [0, 1, 1])
        found, accuracy = separations(invflow.Sequential(), test, test, depths=[0], scores=lambda features: features)
        assert [(row.depth, row.layer) for row in found] == [(0, "input"), (1, "logits")]
        assert accuracy == pytest.approx(2 / 3)

    @pytest.mark.parametrize(
        ("train", "message"),
        [
            (labelled([[0.0, 1.0], [1.0, 0.0]], [3, 3]), "at least two classes, got one"),
            ([Batch(torch.zeros(2, 2))], "expects samples with labels"),
            (labelled([[math.nan, 1.0], [1.0, 0.0]], [0, 1]), "the features after input are not finite"),
        ],
    )
    def test_mistakes(self, train, message):
        with pytest.raises(InvflowError, match=message):
            separations(invflow.Sequential(), train, self.ring(4, 0), depths=[0])


class TestAnalyse:
    def test_a_classifier(self):
        model = invflow.build_model(CLASSIFIER)
        found = invflow.analyse(model, pixels_and_labels(), inputs=2)
        assert [row.layer.partition("(")[0] for row in found.separations] == ["input", "ActNorm", "logits"]
        assert [len(one.values) for one in found.spectra] == [2]
        assert (found.train_samples, found.test_samples, found.exact, found.notes) == (48, 12, True, [])
        assert found.separations[0].linear_accuracy > 0.9, "the first row of pixels is the class"
        assert len(repr(found)) < 200
        for draw in (invflow.plot.spectra, invflow.plot.separation):
            assert isinstance(draw(found), mpl.figure.Figure)

    def test_it_repeats_itself_and_is_seeded(self):
        model = invflow.build_model(CLASSIFIER)
        first = invflow.analyse(model, pixels_and_labels(), train_samples=20, inputs=1)
        assert invflow.analyse(model, pixels_and_labels(), train_samples=20, inputs=1) == first
        assert invflow.analyse(model, pixels_and_labels(), train_samples=20, inputs=1, seed=1) != first

    def test_a_flow_without_classes(self):
        found = invflow.analyse(invflow.build_model(FLOW), torch.randn(20, 2))
        assert found.notes == [analysing.NO_CLASSES]
        assert (len(found.spectra), found.separations, found.test_samples) == (2, [], 0)
        with pytest.raises(InvflowError, match="picture of separation expects classes, got none"):
            invflow.plot.separation(found)

    @pytest.mark.parametrize("data", ["checkerboard", "rings"])
    def test_every_data_set_by_name(self, data):
        found = invflow.analyse(invflow.build_model(FLOW), data, train_samples=100, test_samples=100)
        assert len(found.spectra) == 2

    def test_one_class_is_none(self):
        found = invflow.analyse(invflow.build_model(FLOW), (torch.randn(20, 2), torch.zeros(20, dtype=torch.long)))
        assert (found.notes, found.separations) == ([analysing.NO_CLASSES], [])

    def test_a_flow_with_classes_has_no_logits(self):
        found = invflow.analyse(invflow.build_model(FLOW), "moons", train_samples=100, test_samples=100)
        assert [row.layer.partition("(")[0] for row in found.separations] == ["input", "Affine", "Linear1x1"]
        assert found.test_accuracy is None

    def test_a_flow_given_a_context(self):
        labels = torch.arange(40) % 3
        context = nn.functional.one_hot(labels).float()
        found = invflow.analyse(invflow.build_model(CONDITIONAL), (torch.randn(40, 2), labels, context))
        assert found.notes == [analysing.OWN_CONTEXT]
        assert (len(found.spectra), len(found.separations)) == (2, 3)

    def test_a_context_net_is_run_first(self):
        spec = {**CONDITIONAL, "context_net": {"type": "mlp", "hidden": [4], "out_shape": [5]}}
        found = invflow.analyse(invflow.build_model(spec), (torch.randn(20, 2), torch.randn(20, 3)))
        assert len(found.spectra) == 2

    def test_a_hybrid(self):
        spec = {**FLOW, "prior": {"type": "gaussian_mixture", "components": 2}, "head": {"type": "bayes"}}
        found = invflow.analyse(invflow.build_model(spec), "moons", train_samples=100, test_samples=100)
        assert found.separations[-1].layer == "logits"
        assert 0 <= found.test_accuracy <= 1

    def test_a_trunk_that_only_moves_numbers(self):
        spec = {**CLASSIFIER, "layers": CLASSIFIER["layers"][:1]}
        found = invflow.analyse(invflow.build_model(spec), pixels_and_labels())
        assert (found.spectra, found.notes) == ([], [analysing.REARRANGES])
        assert [row.layer for row in found.separations] == ["input", "logits"]
        flow = {**FLOW, "layers": [{"type": "permute", "seed": 0}]}
        with pytest.raises(InvflowError, match=r"nothing to analyse: no singular values: .*; no separation"):
            invflow.analyse(invflow.build_model(flow), torch.randn(20, 2))

    def test_numerics(self):
        coupling = {"type": "additive_coupling", "net": {"type": "conv", "hidden": [4]}}
        layers = [{"type": "psi", "block_size": 2}, {"type": "split"}, coupling, {"type": "merge"}]
        of_mode = {}
        for mode in ("grid", "exact"):
            spec = {**CLASSIFIER, "layers": layers, "numerics": {"mode": mode}}
            of_mode[mode] = invflow.analyse(invflow.build_model(spec), pixels_and_labels())
            assert len(of_mode[mode].separations) == 3
        assert (of_mode["grid"].notes, len(of_mode["grid"].spectra)) == ([analysing.ON_GRID], 1)
        assert (of_mode["exact"].notes, of_mode["exact"].spectra) == ([analysing.INTEGER_NETS], [])

    def test_samples_are_drawn_at_random(self):
        """They may be stored class after class."""
        labels = torch.arange(3).repeat_interleave(100)
        samples = InMemory(torch.randn(300, 1, 4, 4), labels)
        data = DataSet("sorted", samples, samples, class_names=("a", "b", "c"))
        found = invflow.analyse(invflow.build_model(CLASSIFIER), data, train_samples=50, test_samples=50)
        assert not math.isnan(found.separations[0].contraction)

    def test_large_states_get_fewer_samples(self, monkeypatch):
        monkeypatch.setattr(analysing, "MOST_FEATURES", 16 * 30)
        found = invflow.analyse(invflow.build_model(CLASSIFIER), pixels_and_labels())
        assert (found.train_samples, found.test_samples) == (30, 12)

    def test_a_loader(self):
        pixels, labels = pixels_and_labels()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pixels / 256, labels), batch_size=7)
        found = invflow.analyse(invflow.build_model(CLASSIFIER), loader, test=(pixels / 256, labels), train_samples=20)
        assert (found.train_samples, found.test_samples) == (20, 60)

    @pytest.mark.parametrize("option", ["depths", "inputs", "train_samples", "test_samples", "leading"])
    def test_options_out_of_range(self, option):
        with pytest.raises(InvflowError, match=f"analyse expects {option} of at least"):
            invflow.analyse(invflow.build_model(FLOW), torch.randn(20, 2), **{option: 0})

    def test_data_that_do_not_fit(self):
        model = invflow.build_model(FLOW)
        with pytest.raises(DataError, match=r"given has samples of shape \(3,\), the model expects \(2,\)"):
            invflow.analyse(model, torch.randn(20, 3))
        with pytest.raises(InvflowError, match="expects data along with a model"):
            invflow.analyse(model)


class TestVerb:
    @staticmethod
    def train(call, path, spec):
        path.with_suffix(".json").write_text(json.dumps(spec.document))
        assert call("train", path.with_suffix(".json"), "--out", path)[0] == 0
        return path

    def test_a_classifier(self, call, tmp_path):
        run = self.train(call, tmp_path / "run", tiny(epochs=2))
        status, out, _ = call("analyse", run, "--inputs", 1, "--test-samples", 100)
        assert status == 0
        lines = out.splitlines()
        assert [line.split()[1] for line in lines if "%" in line and "│" in line] == ["0", "3", "4", "6"]
        assert "singular values at 1 test samples: 64, all, of the Jacobian itself" in lines
        assert "classifiers learned from 64 training samples, measured on 100 test samples" in lines
        assert any(line.startswith("accuracy of the model's own head on these: ") for line in lines)
        for name in ("singular_values", "separation"):
            assert f"wrote {run / 'pictures' / name}.png" in lines
            with Image.open(run / "pictures" / f"{name}.png") as image:
                image.verify()

    def test_json_and_python_agree(self, call, tmp_path):
        run = self.train(call, tmp_path / "run", tiny(epochs=1))
        options = ("--depths", 2, "--dense", 10, "--leading", 5, "--inputs", 2, "--out", tmp_path / "here")
        status, out, _ = call("analyse", run, *options, "--json")
        assert status == 0
        answer = json.loads(out)
        assert [row["depth"] for row in answer["separations"]] == [0, 4, 6]
        assert [[len(values) for values in one["values"]] for one in answer["spectra"]] == [[5, 5]]
        assert answer["exact"] is False
        pictures = [tmp_path / "here" / f"{name}.png" for name in ("singular_values", "separation")]
        assert answer["pictures"] == list(map(str, pictures))
        assert all(picture.is_file() for picture in pictures)
        found = invflow.analyse(run, depths=2, dense=10, leading=5, inputs=2)
        assert [vars(row) for row in found.separations] == answer["separations"]
        assert [vars(row) for row in found.spectra] == answer["spectra"]

    def test_flows(self, call, tmp_path):
        run = self.train(call, tmp_path / "points", points(epochs=1))
        assert call("analyse", run, "--inputs", 1)[0] == 0
        run = self.train(call, tmp_path / "images", images(epochs=1))
        assert call("analyse", run, "--inputs", 1, "--data", "digits")[0] == 0

    def test_an_exact_run_and_the_float_model_that_it_was_made_of(self, call, tmp_path):
        spec = invflow.load_spec({**tiny(epochs=1).document, "numerics": {"mode": "exact"}})
        run = self.train(call, tmp_path / "run", spec)
        status, out, _ = call("analyse", run, "--inputs", 1)
        assert (status, out.splitlines()[0]) == (0, analysing.INTEGER_NETS)
        assert not (run / "pictures" / "singular_values.png").exists()
        answer = json.loads(call("analyse", run / "float", "--inputs", 1, "--json")[1])
        assert (len(answer["spectra"]), answer["notes"]) == (2, [])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("absent",), "absent: no run here"),
            (("absent", "--depths", "1"), "Invalid value for '--depths'"),
            (("absent", "--seed", "-1"), "Invalid value for '--seed'"),
        ],
    )
    def test_a_mistake_is_one_line(self, call, arguments, message):
        status, out, err = call("analyse", *arguments)
        assert (status, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1

    def test_what_does_not_apply_is_said(self, call, tmp_path):
        invflow.save(invflow.build_model({**FLOW, "layers": [{"type": "permute", "seed": 0}]}), tmp_path / "flow")
        status, out, err = call("analyse", tmp_path / "flow", "--data", "moons")
        assert status == 0
        assert out.splitlines()[0] == analysing.REARRANGES
        status, out, err = call("analyse", tmp_path / "flow", "--data", "digits")
        assert (status, out, err.count("\n")) == (2, "", 1)
