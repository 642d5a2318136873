"""Where models compute: `--device` of the verbs, and what moves to a device and back."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from torch import Tensor

from invflow.cli import main
from invflow.errors import DataError
from invflow.models import Flow, StandardNormal
from invflow.numerics import Exact
from invflow.samples import DataSet, InMemory
from invflow.spec import build_model, load_spec
from invflow.spec.training import Augmentation
from invflow.state import leaves
from invflow.training import frozen, illustrate, tasks, walking
from invflow.training import run as runs
from invflow.training.augment import Augment
from invflow.training.classification import Classification
from invflow.training.data import load_data
from invflow.training.run import task_of
from invflow.training.run_folder import Run
from tests.numerics.test_runs import SPEC
from tests.test_density_training import images, points
from tests.test_training import tiny

META = torch.device("meta")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of the runs of a classifier and of a flow."""
    folder = tmp_path_factory.mktemp("runs")
    classifier = load_spec({**SPEC, "training": {**SPEC["training"], "epochs": 1}})
    runs.train(classifier, folder / "classifier", progress=False)
    runs.train(points(epochs=1), folder / "flow", progress=False)
    return {"classifier": folder / "classifier", "flow": folder / "flow"}


VERBS = [
    ("evaluate", "classifier"),
    ("evaluate", "flow"),
    ("sample", "flow"),
    ("interpolate", "classifier"),
    ("freeze", "classifier"),
]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="auto is not the CPU on this machine")
@pytest.mark.parametrize(("verb", "kind"), VERBS)
def test_the_cpu_gives_what_the_default_gives(trained, call, tmp_path, verb, kind):
    answers, files = [], []
    for device in ([], ["--device", "cpu"]):
        out = tmp_path / "out"
        options = device + ([] if verb == "evaluate" else ["--out", out / "drawn.png" if verb == "sample" else out])
        options += ["--pairs", 2, "--steps", 3] if verb == "interpolate" else ["--json"]
        status, answer, _ = call(verb, trained[kind], *options)
        assert status == 0
        answers.append(answer)
        if verb == "sample":
            assert call(*[verb, trained[kind], *options][:-1])[0] == 0
        files.append({path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()})
        shutil.rmtree(out, ignore_errors=True)
    assert answers[0] == answers[1]
    assert files[0] == files[1]
    assert bool(files[0]) == (verb != "evaluate")


@pytest.fixture
def cpu_alone(monkeypatch):
    """A machine without an accelerator."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)


@pytest.mark.usefixtures("cpu_alone")
@pytest.mark.parametrize(("verb", "kind"), VERBS)
def test_a_missing_device_is_one_line(trained, call, verb, kind):
    before = sorted(trained[kind].parent.rglob("*"))
    status, out, err = call(verb, trained[kind], "--device", "cuda")
    assert (status, out) == (2, "")
    assert err == "invflow: device 'cuda' is not available; expected auto or one of: cpu\n"
    assert sorted(trained[kind].parent.rglob("*")) == before


@pytest.mark.usefixtures("cpu_alone")
@pytest.mark.parametrize("verb", ["train", "compare"])
def test_training_on_a_missing_device_is_one_line(call, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.json").write_text(json.dumps(tiny().document))
    status, out, err = call(verb, "spec.json", "--device", "cuda")
    assert (status, out) == (2, "")
    assert err.endswith("invflow: device 'cuda' is not available; expected auto or one of: cpu\n")


def test_auto_prefers_the_cpu_to_a_device_without_float64(monkeypatch):
    class OnAMac:
        device = torch.device("mps")

    monkeypatch.setattr(runs, "Fabric", lambda **_: OnAMac)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert runs.device_of("auto").type == "cpu"
    assert runs.device_of("mps").type == "mps"
    assert Classification(None, None, runs.device_of("mps")).float64_device.type == "cpu"


@pytest.mark.parametrize(("verb", "kind"), VERBS)
def test_a_verb_uses_its_device(trained, call, monkeypatch, verb, kind):
    class Used(Exception):
        pass

    def use(module, *arguments, **_):
        if arguments == (META,):
            raise Used
        return module

    monkeypatch.setattr(runs, "device_of", {"cuda:1": META}.__getitem__)
    monkeypatch.setattr(torch.nn.Module, "to", use)
    with pytest.raises(Used):
        main([verb, str(trained[kind]), "--device", "cuda:1", *(["--out", "x"] if verb == "freeze" else [])])


@pytest.fixture
def device(monkeypatch):
    """A second device: the meta device, whose tensors come back to the CPU as zeros.

    PyTorch refuses to compute with tensors of both devices, and to use the values of a meta tensor.
    """
    to = Tensor.to

    def moved(tensor, *arguments, **options):
        if tensor.is_meta and str(*arguments[:1]) == "cpu":
            return torch.zeros_like(tensor, device="cpu")
        return to(tensor, *arguments, **options)

    monkeypatch.setattr(Tensor, "to", moved)
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: moved(tensor, "cpu"))
    return META


def task(spec, device):
    layers = [layer for layer in spec.expanded["layers"] if layer["type"] != "actnorm"]  # which looks at its state
    spec = spec.replace(layers=layers)
    return task_of(build_model(spec), load_data(spec.training.data), device)


def places(model):
    return {tensor.device.type for tensor in model.state_dict().values()}


@pytest.mark.parametrize("spec", [tiny(), points(), images()], ids=["classifier", "points", "images"])
def test_an_evaluation_moves_model_and_data_and_returns_to_the_cpu(device, monkeypatch, spec):
    seen = []
    monkeypatch.setattr(tasks, "round_trips", lambda chain, x, _: seen.append((places(chain), x.device.type)) or {})
    one = task(spec, device)
    found = one.evaluate()
    assert seen == [({"meta"}, "meta")]
    assert all(math.isfinite(value) for value in found.scores.values())
    assert places(one.model) == {"cpu"}
    assert one.model.training


@pytest.mark.parametrize("spec", [points(), images()], ids=["points", "images"])
def test_samples_are_drawn_on_the_cpu_and_inverted_on_the_device(device, monkeypatch, spec):
    drawn, inverted = [], []
    sample, inverse = StandardNormal.sample, Flow.inverse
    monkeypatch.setattr(StandardNormal, "sample", lambda *given: drawn.append(sample(*given)) or drawn[-1])
    monkeypatch.setattr(Flow, "inverse", lambda flow, z, context: inverted.append(leaves(z)) or inverse(flow, z))
    one = task(spec, device)
    x = one.draw(5, seed=3)
    assert (x.shape, x.device.type) == ((5, *one.data.shape), "cpu")
    assert not any(leaf.is_meta for leaf in leaves(drawn[0]))
    assert all(leaf.is_meta for leaf in inverted[0])
    task(spec, torch.device("cpu")).draw(5, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(leaves(drawn[0]), leaves(drawn[1]), strict=True))
    assert one.log_prob(x).device.type == "cpu"
    assert places(one.model) == {"cpu"}


def test_an_interpolation_moves_model_and_images(device, monkeypatch, tmp_path):
    seen = []
    walk = walking.interpolate

    def interpolate(chain, first, last, *rest):
        seen.extend([places(chain), {first.device.type, last.device.type}])
        return walk(chain, first, last, *rest)

    monkeypatch.setattr(walking, "interpolate", interpolate)
    one = task(tiny(), device)
    assert len(illustrate.draw_interpolation(one, 2, 3, tmp_path)[0]) == 2
    assert seen == [{"meta"}, {"meta"}]
    assert places(one.model) == {"cpu"}


def test_freezing_measures_on_the_device_and_writes_the_same_model(trained, monkeypatch, tmp_path):
    run, mode = Run.open(trained["classifier"]), Exact(mode="exact")
    expected, result = frozen.freeze_run(run, tmp_path / "cpu", mode)
    moved, module_to, tensor_to = [], torch.nn.Module.to, Tensor.to

    def to(module, *arguments):
        if arguments != (META,):
            return module_to(module, *arguments)
        moved.append(module.bijection.exactness)
        return module

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(Tensor, "to", lambda x, *given, **more: x if given == (META,) else tensor_to(x, *given, **more))
    monkeypatch.setattr(runs, "device_of", lambda name: META)
    after, found = frozen.freeze_run(run, tmp_path / "device", mode)
    assert set(moved) == {"float", "exact"}
    assert found == result
    wanted, weights = expected.load().state_dict(), after.load().state_dict()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("change", [{"affine": {"degrees": 10}}, {"elastic": {}}, {"stroke": {}}], ids=str)
def test_images_are_augmented_where_they_are(change):
    augment = Augment(Augmentation.model_validate(change))
    assert augment(torch.zeros(4, 1, 8, 8, device=META)).is_meta


def test_few_test_images_make_few_pairs():
    some = InMemory(torch.zeros(7, 1, 8, 8), torch.tensor([0, 0, 1, 1, 2, 3, 3]))
    of_some = Classification(build_model(tiny()), DataSet("some", some, some, class_names=tuple("0123")))
    assert illustrate.first_pairs(of_some, 5) == [(0, 2), (3, 4)]
    assert illustrate.first_pairs(of_some, 1) == [(0, 2)]
    one = task(tiny(data={"name": "digits", "train_size": 64, "test_size": 1}), torch.device("cpu"))
    with pytest.raises(DataError, match="expects test images of different classes, got 1 of one class"):
        illustrate.draw_interpolation(one, 5, 9, None)
