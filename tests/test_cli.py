"""The command line: results, mistakes, exit statuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer
from PIL import Image

import invflow
from invflow.cli import app, main
from invflow.errors import UnfinishedWarning
from invflow.training.run_folder import Run, new_folder
from tests.test_density_training import images, points
from tests.test_training import fill_the_disk, tiny

SPECS = Path(__file__).parent.parent / "specs"
DIGITS = str(SPECS / "irevnet_digits.json")


@pytest.fixture
def spec_file(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(tiny(epochs=1).document))
    return path


@pytest.fixture
def trained(call, spec_file, tmp_path):
    status, out, _ = call("train", spec_file, "--out", tmp_path / "run", "--json")
    assert status == 0
    return tmp_path / "run", json.loads(out)


def test_a_missing_extra_is_one_line(spec_file):
    hidden = "import sys; sys.modules['lightning'] = None; from invflow.cli import main; main()"
    command = [sys.executable, "-c", hidden, "train", str(spec_file)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    message = "invflow: lightning is not installed; training needs it: pip install 'invflow[train]'\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", message)


def test_train_writes_a_run_and_its_pictures(trained):
    run, answer = trained
    assert answer["run"] == str(run)
    assert 0 <= answer["test_accuracy"] <= 1
    assert set(answer["round_trips"]) == {"float32 eval", "float32 train", "float64 eval", "float64 train"}
    assert {Path(picture).name for picture in answer["pictures"]} == {
        "samples.png", "curves.png", "reconstructions.png", "psi.png", "interpolation.png", "interpolation.gif",
    }  # fmt: skip
    for picture in answer["pictures"]:
        with Image.open(picture) as image:
            image.verify()


def test_train_ends_with_the_path_of_its_report(call, spec_file, tmp_path):
    status, out, _ = call("train", spec_file, "--out", "run")
    assert (status, out.splitlines()[-1]) == (0, "open run/report.html")
    assert "<title>tiny - invflow report</title>" in (tmp_path / "run" / "report.html").read_text()
    status, out, _ = call("train", spec_file, "--out", "other", "--no-report")
    assert status == 0
    assert "report" not in out
    assert not Path("other", "report.html").exists()
    status, out, _ = call("report", "run", "other", "--out", "both.html")
    assert (status, out) == (0, "wrote both.html\n")
    assert "A: tiny and B: tiny" in Path("both.html").read_text()


def test_a_report_that_fails_does_not_lose_the_training(call, spec_file, monkeypatch):
    from invflow.errors import RunError

    def fail(*_):
        raise RunError("the page is too long")

    monkeypatch.setattr("invflow.report.write.write_report", fail)
    status, _, err = call("train", spec_file, "--out", "run")
    assert status == 0
    assert err.splitlines()[-1] == "invflow: no report: the page is too long; try 'invflow report run'"
    assert json.loads(Path("run", "run.json").read_text())["status"] == "finished"


def test_evaluate_agrees_with_train(trained, call):
    run, answer = trained
    status, out, _ = call("evaluate", run, "--json")
    assert status == 0
    found = json.loads(out)
    assert found["test_accuracy"] == answer["test_accuracy"]
    assert found["round_trips"] == answer["round_trips"]
    assert call("evaluate", run)[1].splitlines()[1].startswith("  test accuracy ")


def test_interpolate_writes_strip_and_gif(trained, call, tmp_path):
    run, _ = trained
    status, out, _ = call("interpolate", run, "--pairs", 2, "--steps", 3, "--out", tmp_path / "walk")
    assert status == 0
    names = [Path(line.split()[-1]).name for line in out.splitlines() if line.startswith("wrote ")]
    assert names == ["interpolation.png", "interpolation.gif"]
    with Image.open(tmp_path / "walk" / "interpolation.gif") as gif:
        assert gif.n_frames >= 3


def test_overrides_are_recorded(call, spec_file, tmp_path):
    options = ("--lr", 0.5, "--train-size", 32, "--seed", 7, "--batch-size", 8)
    call("train", spec_file, "--out", tmp_path / "run", *options)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["overrides"] == {
        "seed": 7, "lr": 0.5, "train_size": 32, "batch_size": 8,
    }  # fmt: skip
    training = invflow.load_spec(tmp_path / "run" / "spec.json").training
    found = (training.seed, training.optimizer.lr, training.data.train_size, training.batch_size)
    assert found == (7, 0.5, 32, 8)


def test_a_full_disk_is_one_line_with_the_way_to_resume(call, spec_file, monkeypatch):
    fill_the_disk(monkeypatch, "last.ckpt")
    status, out, err = call("train", spec_file, "--out", "run")
    assert (status, out) == (2, "")
    assert err.splitlines()[-2:] == [
        "interrupted; resume with: invflow train --resume run",
        "invflow: run/resume/last.ckpt: No space left on device",
    ]


def test_two_default_folders_differ():
    assert new_folder("digits") != new_folder("digits"), "two trainings of one second would share a folder"


@pytest.mark.parametrize(
    ("device", "accelerator", "devices"),
    [("auto", "auto", 1), ("cpu", "cpu", 1), ("cuda", "cuda", 1), ("cuda:1", "cuda", [1]), ("mps", "mps", 1)],
)
@pytest.mark.parametrize("verb", ["train", "compare"])
def test_the_trainer_is_told_the_device(call, spec_file, monkeypatch, verb, device, accelerator, devices):
    import lightning

    class Told(Exception):
        pass

    def trainer(**options):
        raise Told(options["accelerator"], options["devices"])

    monkeypatch.setattr(lightning, "Trainer", trainer)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    with pytest.raises(Told) as told:
        main([verb, str(spec_file), "--device", device])
    assert told.value.args == (accelerator, devices)


def test_a_run_is_trained_and_resumed_on_the_cpu(call, spec_file, tmp_path):
    assert call("train", spec_file, "--out", tmp_path / "run", "--device", "cpu")[0] == 0
    assert call("train", "--resume", tmp_path / "run", "--device", "cpu")[0] == 0


@pytest.fixture
def flow(call, tmp_path):
    path = tmp_path / "points.json"
    path.write_text(json.dumps(points(epochs=1).document))
    status, out, _ = call("train", path, "--out", tmp_path / "flow", "--json")
    assert status == 0
    return tmp_path / "flow", json.loads(out)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"status": "training"}, "training was interrupted, or goes on; the weights are those after 1 of 1 epochs"),
        (
            {"status": "diverged", "why": "the loss is nan"},
            "the loss is nan; the weights are those after 1 of 1 epochs",
        ),
    ],
)
def test_whatever_reads_a_run_says_that_it_is_unfinished(trained, entries, said):
    run, _ = trained
    Run.open(run).update(**entries)
    root = Path(__file__).parent.parent
    for verb in ("evaluate", "check"):
        command = [sys.executable, "-c", "from invflow.cli import main; main()", verb, str(run), "--json"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
        assert ended.returncode == 0
        assert verb == "check" or json.loads(ended.stdout)["unfinished"] == said
        assert ended.stderr == f"invflow: {run}: {said}\n"
    with pytest.warns(UnfinishedWarning, match=re.escape(said)):
        invflow.load(run)


def test_compare_refuses_two_data_sets(call, tmp_path):
    for name, data in (("a", {"name": "moons"}), ("b", {"name": "circles"}), ("c", {"name": "moons", "noise": 0.2})):
        (tmp_path / f"{name}.json").write_text(json.dumps(points(epochs=1, data=data).document))
    for other, found in (("b", '{"name":"circles"}'), ("c", '{"name":"moons","noise":0.2}')):
        status, _, err = call("compare", "a.json", f"{other}.json", "--out", "both")
        said = f'the same test samples: a.json has {{"name":"moons"}}, {other}.json has {found}'
        assert (status, err) == (2, f"invflow: compare expects specs with {said}\n")
    assert not (tmp_path / "both").exists()


def test_train_and_evaluate_a_flow(flow, call):
    run, answer = flow
    assert answer["test_bits_per_dim"] is None
    assert answer["invertible"]
    assert {Path(picture).name for picture in answer["pictures"]} == {"density.png", "curves.png"}
    status, out, _ = call("evaluate", run)
    assert status == 0
    assert f"  test negative log-likelihood {answer['test_nll']:.3f} nats, " in out
    assert call("interpolate", run)[0] == 2, "between points there is no strip of images"


def test_sample_draws_a_picture_or_prints_numbers(flow, call, tmp_path):
    run, _ = flow
    status, out, _ = call("sample", run, "--count", 5, "--json")
    assert status == 0
    found = json.loads(out)
    assert [len(found["samples"]), len(found["samples"][0]), len(found["log_prob"])] == [5, 2, 5]
    assert json.loads(call("sample", run, "--count", 5, "--json")[1]) == found
    assert json.loads(call("sample", run, "--count", 5, "--seed", 1, "--json")[1]) != found
    status, out, _ = call("sample", run, "--out", tmp_path / "few.png")
    assert (status, out) == (0, f"wrote {tmp_path / 'few.png'}\n")
    with Image.open(tmp_path / "few.png") as image:
        image.verify()


def test_a_flow_of_images_draws_images(call, tmp_path):
    path = tmp_path / "images.json"
    path.write_text(json.dumps(images(epochs=1).document))
    status, out, _ = call("train", path, "--out", tmp_path / "run", "--json")
    assert status == 0
    answer = json.loads(out)
    assert answer["test_bits_per_dim"] > 0
    assert {Path(picture).name for picture in answer["pictures"]} == {
        "samples.png", "curves.png", "reconstructions.png", "psi.png", "interpolation.png", "interpolation.gif",
    }  # fmt: skip
    assert call("sample", tmp_path / "run", "--temperature", 0.5)[0] == 0
    assert (tmp_path / "run" / "pictures" / "drawn.png").is_file()


def test_a_classifier_has_no_samples(trained, call):
    status, _, err = call("sample", trained[0])
    assert status == 2
    assert "expects the run of a flow" in err


def test_compare_flows(call, tmp_path):
    path = tmp_path / "points.json"
    path.write_text(json.dumps(points(epochs=1).document))
    status, out, _ = call("compare", path, "--seeds", 2, "--out", tmp_path / "both")
    assert status == 0
    assert "test negative" in out
    assert "nats" in out
    diverging = tmp_path / "diverging.json"
    hot = {"type": "sgd", "lr": 1e30}
    diverging.write_text(json.dumps(points(optimizer=hot).document))
    status, out, _ = call("compare", path, diverging, "--seeds", 1, "--out", tmp_path / "hot", "--json")
    assert status == 0
    diverged = json.loads(out)[1]
    assert (diverged["test_nll"], diverged["diverged"]) == ([None], 1)
    assert diverged["parameters"] == json.loads(out)[0]["parameters"]
    _, out, _ = call("compare", diverging, "--seeds", 1, "--out", tmp_path / "again")
    assert "1 diverged" in out
    assert "not invertible" not in out, "nothing is known of a model that was not trained"
    status, out, err = call("train", diverging)
    assert status == 2
    assert out == ""
    assert "training diverged in epoch" in err.splitlines()[-1]


def test_compare_gives_a_row_a_spec(call, spec_file, tmp_path):
    baseline = tmp_path / "baseline.json"
    head = {"type": "convnet", "classes": 10, "hidden": [4]}
    baseline.write_text(json.dumps({**tiny(epochs=1).document, "layers": [], "head": head}))
    status, out, _ = call("compare", spec_file, baseline, "--seeds", 2, "--out", tmp_path / "both", "--json")
    assert status == 0
    rows = json.loads(out)
    assert [row["spec"] for row in rows] == [str(spec_file), str(baseline)]
    assert all(len(row["test_accuracy"]) == 2 for row in rows)
    assert rows[0]["round_trip_error"] <= 1e-6
    assert rows[1]["round_trip_error"] is None
    assert rows[0]["parameters"] == sum(w.numel() for w in invflow.build_model(spec_file).parameters())
    assert (tmp_path / "both" / "comparison.png").is_file()


def test_compare_says_what_is_not_invertible(call, spec_file, tmp_path):
    head = {"type": "convnet", "classes": 10, "hidden": [4]}
    spec_file.write_text(json.dumps({**tiny(epochs=1).document, "head": head}))
    status, out, _ = call("compare", spec_file, "--seeds", 1, "--out", tmp_path / "one")
    assert status == 0
    assert "not" in out
    assert "invertible" in out


HIDDEN = "not invertible: only psi is, because the head has layers of its own"
BOTH_HIDDEN = HIDDEN.replace("psi is", "psi, pad are")
IMAGE_ONLY = "inverse on its image only, because it adds dimensions: pad"


@pytest.mark.parametrize(
    ("layers", "head", "caveat"),
    [
        ([], {"type": "convnet", "hidden": [4]}, HIDDEN),
        ([{"type": "pad", "channels": 2}], {"type": "linear"}, IMAGE_ONLY),
        (
            [{"type": "pad", "channels": 2}],
            {"type": "convnet", "hidden": [4]},
            f"{BOTH_HIDDEN}; {IMAGE_ONLY}",
        ),
    ],
    ids=["a head with layers", "an injection", "both"],
)
def test_what_is_not_invertible_is_never_called_so(call, spec_file, tmp_path, layers, head, caveat):
    top = {"layers": [{"type": "psi", "block_size": 2}, *layers], "head": {"classes": 10, **head}}
    spec_file.write_text(json.dumps({**tiny(epochs=1).document, **top}))
    run = tmp_path / "run"
    status, out, _ = call("train", spec_file, "--out", run)
    assert (status, out.splitlines()[0]) == (0, caveat)
    assert {path.name for path in (run / "pictures").iterdir()} == {"samples.png", "curves.png", "psi.png"}
    hidden = head["type"] == "convnet"
    for verb in (["evaluate"], ["freeze", "--out", tmp_path / "exact"], ["check"]):
        status, out, _ = call(*verb, run)
        assert (status, out.splitlines()[0]) == (0, caveat), verb
        assert not (hidden and "come back" in out)
        assert "ok: invertible" not in out
    status, out, _ = call("compare", spec_file, "--seeds", 1, "--out", tmp_path / "both")
    assert (status, out.splitlines()[0]) == (0, f"{spec_file}: {caveat}")
    status, out, err = call("interpolate", run)
    assert (status, out, err) == (2, "", f"invflow: interpolate expects an invertible model, got this: {caveat}\n")
    for verb in (["evaluate", run], ["check", run], ["freeze", run, "--out", tmp_path / "json"]):
        assert json.loads(call(*verb, "--json")[1])["caveat"] == caveat


@pytest.mark.parametrize("spec", sorted(SPECS.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_spec_passes_the_check(call, spec):
    status, out, _ = call("check", spec, "--json")
    report = json.loads(out)
    assert status == 0
    assert report["ok"]
    assert report["round_trip_error"]["float64 train"] <= 1e-13
    assert call("check", spec)[0] == 0


def test_a_chain_that_does_not_run_backwards_fails_the_check(call, tmp_path, monkeypatch):
    monkeypatch.setattr(invflow.bijections.AdditiveCoupling, "inverse", lambda self, y, context=None: (y[1], y[0]))
    status, out, _ = call("check", DIGITS)
    assert status == 1
    assert "failed" in out


def test_show_prints_layers_or_the_expansion(call):
    status, out, _ = call("show", DIGITS)
    assert status == 0
    assert "Psi(block_size=2)" in out
    status, out, _ = call("show", DIGITS, "--expanded")
    layers = json.loads(out)["layers"]
    assert "repeat" not in {layer["type"] for layer in layers}


def test_diff_is_silent_about_what_decides_nothing(call, tmp_path):
    other = tmp_path / "other.json"
    document = json.loads(Path(DIGITS).read_text())
    other.write_text(json.dumps({**document, "name": "another", "note": "nothing"}, indent=1))
    assert call("diff", DIGITS, other) == (0, "", "")
    document["layers"][2]["block_size"] = 4
    other.write_text(json.dumps(document))
    status, out, _ = call("diff", DIGITS, other)
    assert status == 1
    assert "block_size" in out


def test_the_schema_is_the_one_in_the_docs(call):
    status, out, _ = call("schema")
    assert status == 0
    assert json.loads(out) == json.loads((SPECS.parent / "docs" / "spec.schema.json").read_text())


def test_plot_psi(call, tmp_path):
    assert call("plot-psi", DIGITS, "--images", 2)[0] == 0
    with Image.open(tmp_path / "psi.png") as image:
        assert image.width > 200


MNIST = str(SPECS / "irevnet_mnist.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace('"type": "psi"', '"type" "psi"'),
            ":10:13: not JSON: expected a colon after the key",
        ),
        (lambda text: text.replace("additive_coupling", "additive_copling"), "did you mean 'additive_coupling'?"),
        (lambda text: text.replace('"block_size": 2', '"block_size": 3'), "that 3 divides, got 8 x 8"),
        (lambda text: text.replace(', "classes": 10', ""), "linear needs 'classes'"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "train", "show"])
def test_a_fault_in_a_spec_is_one_line(call, tmp_path, change, message, verb):
    broken = tmp_path / "broken.json"
    text = Path(DIGITS).read_text()
    broken.write_text(change(text))
    assert broken.read_text() != text
    status, out, err = call(verb, broken)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"invflow: {broken}:")
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "absent.json"), "absent.json: no such file"),
        (("train", "absent.json"), "absent.json: no such file"),
        (("evaluate", "."), "no run here"),
        (("interpolate", "absent"), "no run here"),
        (("train", "--resume", "."), "no run here"),
        (("train",), "expects a SPEC, or --resume RUN"),
        (("train", DIGITS, "--resume", "."), "not both"),
        (("train", "--resume", ".", "--epochs", "3"), "no --out, --seed"),
        (("train", MNIST, "--data-root", "."), "mnist is not in . and may not be downloaded"),
        (("train", DIGITS, "--epochs", "-1"), "training.epochs: input should be greater than 0, got -1"),
        (("train", DIGITS, "--epochs", "many"), "Invalid value for '--epochs': Input should be a valid integer"),
        (("train", DIGITS, "--batch-size", "0"), "training.batch_size: input should be greater than 0, got 0"),
        (("train", DIGITS, "--batch-size", "few"), "Invalid value for '--batch-size'"),
        (("compare", DIGITS, "--batch-size", "-3"), "training.batch_size: input should be greater than 0, got -3"),
        (("show", DIGITS, "--memory", "--batch-size", "0"), "Invalid value for '--batch-size'"),
        (("train", DIGITS, "--resume", ".", "--batch-size", "3"), "not both"),
        (("train", "--resume", ".", "--batch-size", "3"), "no --out, --seed"),
        (("train", DIGITS, "--device", "tpu"), "device 'tpu' is not available; expected auto or one of: cpu"),
        (("train", DIGITS, "--device", "cuda:99"), "device 'cuda:99' is not available"),
        (("train", DIGITS, "--devices", "0"), "training.hardware.devices: input should be greater than 0, got 0"),
        (("train", DIGITS, "--strategy", "dp"), "training.hardware.strategy: input should be 'ddp' or 'fsdp'"),
        (("train", DIGITS, "--precision", "16"), "training.precision: input should be 32, 64 or 'bf16-mixed', got 16"),
        (("train", DIGITS, "--accumulate", "0"), "training.accumulate: input should be greater than 0, got 0"),
        (("train", DIGITS, "--profile", "deep"), "training.profile: input should be 'simple', 'advanced' or 'pytorch'"),
        (("train", DIGITS, "--train-size", "99999"), "digits has 1348 training samples"),
        (("plot-psi", DIGITS, "--images", "0"), "Invalid value for '--images'"),
        (("shwo",), "No such command 'shwo'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(call, arguments, message):
    status, out, err = call(*arguments)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert message in err


@pytest.mark.parametrize("verb", sorted(typer.main.get_command(app).commands))
def test_help_says_what_a_verb_does(call, verb):
    status, out, _ = call(verb, "--help")
    assert status == 0
    assert "Usage" in out


def test_import_does_not_load_what_only_training_needs():
    script = (
        "import sys, invflow, invflow.cli\n"
        "late = {'lightning', 'torchvision', 'matplotlib', 'sklearn', 'hypothesis'} & set(sys.modules)\n"
        "assert not late, late"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_override_keeps_the_place_of_a_fault(call, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text(Path(DIGITS).read_text().replace('"shape": [1, 8, 8]', '"shape": [1, 6, 6]'))
    status, _, err = call("train", broken, "--epochs", 1)
    assert status == 2
    assert err.startswith(f"invflow: {broken}:6:")
    assert "input.shape: digits has images of shape (1, 8, 8), the spec expects (1, 6, 6)" in err


@pytest.mark.parametrize("rate", ["nan", "inf", "-1"])
def test_a_learning_rate_that_is_none(call, rate):
    status, _, err = call("train", DIGITS, "--lr", rate)
    assert status == 2
    assert "training.optimizer.lr: input should be" in err


def test_an_inverse_that_does_not_converge_is_said_in_one_line(call, tmp_path, monkeypatch):
    monkeypatch.setattr("invflow.solvers.MOST_EVALUATIONS", 2)
    path = tmp_path / "block.json"
    path.write_text(json.dumps({"input": {"shape": [3]}, "layers": [{"type": "residual"}]}))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        status, _, err = call("check", path)
    assert status == 1
    assert err
    for line in err.splitlines():
        assert line.startswith("invflow: the inverse of residual did not converge for 16 of 16 samples")
