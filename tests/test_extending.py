"""Every file in docs/extending.md is complete: it is written, loaded, used in specs, and property-tested."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import invflow
from invflow import registry
from invflow.plugins import load_plugin
from invflow.state import leaves, make_state
from invflow.testing import property_tests

TEXT = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))
MODULES = sorted(name for name in FILES if name.endswith(".py") and not name.startswith("test"))
MOST_LINES = 40


@pytest.fixture(autouse=True)
def forget_what_a_test_registers(monkeypatch):
    for one in registry.REGISTRIES:
        monkeypatch.setattr(one, "_classes", dict(one._classes))
        monkeypatch.setattr(one, "_fields", dict(one._fields))


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_there_is_a_file_of_each_kind():
    kinds = {"register", "register_net", "register_part", "register_head", "register_prior", "register_data"}
    found = {kind for name in MODULES for kind in re.findall(r"@invflow\.(\w+)\(", FILES[name])}
    assert found == kinds
    assert {"pyproject.toml", "test_acme.py"} <= FILES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_it_is_short(name):
    lines = [line for line in FILES[name].splitlines() if line.strip()]
    assert len(lines) <= MOST_LINES


@pytest.mark.parametrize("name", [name for name in MODULES if "@invflow.register(" in FILES[name]])
def test_a_bijection_is_sound(name, folder):
    load_plugin(folder / name)
    (tag,) = re.findall(r"@invflow\.register\(\"([\w.]+)\"\)", FILES[name])
    property_tests(tag)(tag)
    for fields, shape in registry.bijections.find(tag).examples:
        chain = invflow.build({"input": {"shape": json.loads(json.dumps(shape))}, "layers": [{"type": tag, **fields}]})
        x = make_state(lambda leaf: torch.randn((2, *leaf)), shape)
        for before, after in zip(leaves(x), leaves(chain.inverse(chain(x))), strict=True):
            torch.testing.assert_close(before, after)
        assert invflow.to_spec(invflow.build(invflow.to_spec(chain))) == invflow.to_spec(chain)


def test_a_wrapper_keeps_what_it_holds(folder):
    load_plugin(folder / "twice.py")
    coupling = {"type": "additive_coupling", "net": {"type": "mlp", "hidden": [4]}}
    inner = {"type": "sequential", "layers": [{"type": "split"}, *[coupling] * 3, {"type": "merge"}]}
    document = {"input": {"shape": [4]}, "layers": [{"type": "acme.twice", "layer": inner}], "backprop": "reversible"}
    chain = invflow.build(document)
    names = [step.name for step in chain.steps()]
    assert names == [f"layers.0.layer@{time}.layers.{layer}" for time in (0, 1) for layer in range(5)]
    x = torch.randn(5, 4)
    y = chain(x)
    assert torch.equal(y, chain[0].layer(chain[0].layer(x)))
    y.square().sum().backward()
    found = [weight.grad.clone() for weight in chain.parameters()]
    chain.zero_grad()
    chain.backprop = "stored"
    chain(x).square().sum().backward()
    for one, other in zip(found, chain.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad)


def document(**top):
    coupling = {"type": "affine_coupling", "net": {"type": "acme.gated", "width": 5}}
    squeezed = {"type": "stack", "zero_last": True, "parts": [{"type": "conv"}, {"type": "acme.squeeze", "width": 3}]}
    second = {"type": "additive_coupling", "net": squeezed}
    third = {"type": "acme.shear", "net": {"type": "mlp"}}
    layers = [{"type": "split"}, coupling, second, third, {"type": "merge"}]
    return {"input": {"shape": [4, 3, 3], "context_shape": [2]}, "layers": [{"type": "acme.scale"}, *layers], **top}


def test_all_together(folder):
    for name in MODULES:
        load_plugin(folder / name)
    x, context = torch.randn(5, 4, 3, 3), torch.randn(5, 2)
    model = invflow.build_model(document(head={"type": "acme.pooled", "classes": 3}))
    assert model(x, context).shape == (5, 3)
    assert model.linear_head
    flow = invflow.build_model(document(prior={"type": "acme.laplace"}))
    assert flow.sample(2, context).shape == (2, 5, 4, 3, 3)
    assert flow.log_prob(x, context).shape == (5,)
    assert not torch.allclose(flow.log_prob(x, context), flow.log_prob(x, context + 1))
    invflow.save(flow, folder / "saved")
    torch.testing.assert_close(invflow.load(folder / "saved").log_prob(x, context), flow.log_prob(x, context))


def test_the_package(folder):
    """An installed package is found by its entry points, and its one-line test module passes."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    information = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir()
    named = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (information / "METADATA").write_text(named)
    groups = [
        f"[{group}]\n" + "".join(f"{tag} = {place}\n" for tag, place in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (information / "entry_points.txt").write_text("\n".join(groups))
    (folder / "conftest.py").write_text(
        "from hypothesis import settings\n\n"
        'settings.register_profile("few", max_examples=3)\nsettings.load_profile("few")\n'
    )
    (folder / "test_models.py").write_text(
        "import invflow\n\n\ndef test_it_builds():\n"
        f"    invflow.build_model({document(head={'type': 'acme.pooled', 'classes': 3})!r})\n"
        f"    invflow.build_model({document(prior={'type': 'acme.laplace'})!r})\n"
        "\n\ndef test_it_trains(tmp_path):\n"
        "    from invflow.training.run import train\n"
        f"    run = train(invflow.load_spec({TRAINED!r}), tmp_path / 'run', progress=False)\n"
        "    assert run.record['status'] == 'finished'\n"
    )
    command = [
        sys.executable,
        "-B",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
        str(folder),
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


TRAINED = {
    "input": {"shape": [2]},
    "layers": [{"type": "affine"}],
    "prior": {"type": "standard_normal"},
    "training": {"data": {"name": "acme.spiral", "count": 200}, "epochs": 1},
}


class TestCommandLine:
    @staticmethod
    def run(capsys, *arguments):
        from invflow.cli import main

        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code, *capsys.readouterr()

    @pytest.fixture
    def spec(self, folder):
        path = folder / "spec.json"
        path.write_text(json.dumps({"input": {"shape": [4]}, "layers": [{"type": "acme.scale"}, {"type": "split"}]}))
        return path

    @pytest.mark.parametrize("verb", ["check", "show"])
    def test_a_file_is_named(self, verb, spec, folder, capsys):
        assert self.run(capsys, verb, spec)[0] == 2
        status, out, err = self.run(capsys, verb, spec, "--plugin", folder / "scale.py")
        assert (status, err) == (0, "")
        assert "Scale" in out

    def test_several_files_and_a_diff(self, spec, folder, capsys):
        plugins = ("--plugin", folder / "scale.py", "--plugin", folder / "pad.py")
        assert self.run(capsys, "diff", spec, spec, *plugins)[0] == 0
        assert "acme.pad" in registry.bijections.registered()

    def test_a_data_set_trains(self, folder, capsys):
        path = folder / "flow.json"
        path.write_text(json.dumps(TRAINED))
        command = ("train", path, "--out", folder / "run")
        status, _, err = self.run(capsys, *command)
        assert status == 2
        assert "unknown data set 'acme.spiral'" in err
        status, _, err = self.run(capsys, *command, "--plugin", folder / "spiral.py")
        assert status == 0, err

    def test_the_schema_knows_them(self, folder, capsys):
        _, out, _ = self.run(capsys, "schema", "--plugin", folder / "scale.py")
        assert "layer.acme.scale" in json.loads(out)["$defs"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "no such plug-in; expected a Python file"),
            ("def f(:\n", "the plug-in does not load: SyntaxError"),
            ("raise RuntimeError('no licence')\n", "the plug-in does not load: RuntimeError: no licence"),
            ("import absent\n", "the plug-in does not load: ModuleNotFoundError: No module named 'absent'"),
        ],
    )
    def test_a_file_that_is_no_plug_in(self, text, message, spec, folder, capsys):
        path = folder / "mine.py"
        if text is not None:
            path.write_text(text)
        status, out, err = self.run(capsys, "check", spec, "--plugin", path)
        assert (status, out) == (2, "")
        assert len(err.strip().splitlines()) == 1
        assert message in err

    def test_every_verb_takes_one(self):
        import click
        import typer

        from invflow.cli import app

        group = typer.main.get_command(app)
        for name, command in group.commands.items():
            assert any("--plugin" in option.opts for option in command.params), name
        del click
