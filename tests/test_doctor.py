"""``invflow doctor`` names what a machine lacks, with the fix, and ends 1 if that is a problem."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import pytest

from invflow import registry
from invflow.data import vision
from invflow.diagnostics import doctor

COMPILED = doctor._compiled
FILES = tuple(f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))


@pytest.fixture(autouse=True)
def no_compilation(monkeypatch):
    monkeypatch.setattr(doctor, "_compiled", lambda device: "in 3 s")


def idx(*extents):
    """A file of zeros as those of MNIST."""
    content = bytes([0, 0, 8, len(extents)]) + b"".join(extent.to_bytes(4) for extent in extents)
    return content + bytes(extents[0] * (28 * 28 if extents[1:] else 1))


@pytest.fixture
def root(tmp_path):
    """A data root with two small images for MNIST."""
    folder = tmp_path / "root" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(idx(2, 28, 28) if "images" in name else idx(2))
    return tmp_path / "root"


@pytest.fixture
def install(monkeypatch, tmp_path, forget_what_a_test_registers):
    """Installs a package that advertises layers."""

    def package(name, text, *points):
        site = tmp_path / "site"
        information = site / f"{name}-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text("\n".join(["[invflow.bijections]", *points]))
        (site / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return package


def without(monkeypatch, *distributions):
    """Hides packages, by the names of their distributions."""
    found = importlib.metadata.Distribution.from_name

    def from_name(name):
        if name in distributions:
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", from_name)


def without_the_train_extra(monkeypatch):
    without(monkeypatch, "lightning", "scikit-learn", "scipy", "tensorboard")
    for module in ("lightning", "sklearn", "sklearn.datasets", "scipy", "tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)


def line(out, name):
    """The line about something."""
    (found,) = (line for line in out.splitlines() if line[2:].split(" ")[0] == name)
    return found


def problems(out):
    return [line[2:].split(" ")[0] for line in out.splitlines() if line.startswith("!")]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_whole_machine(call, mnist_root, monkeypatch):
    monkeypatch.setattr(doctor, "_compiled", COMPILED)
    status, out, err = call("doctor", "--data-root", mnist_root)
    assert (status, err) == (0, ""), out
    assert out.splitlines()[-1] == "ok: nothing that is needed is missing"
    assert problems(out) == []
    assert "torch.compile compiles a chain in " in out
    assert line(out, "mnist") == "  mnist          found"
    assert importlib.metadata.version("lightning") in line(out, "train")


def test_a_machine_that_lacks_everything(call, tmp_path, monkeypatch, install):
    without_the_train_extra(monkeypatch)
    install("acme_broken", "raise RuntimeError('no\\nlicence')", "acme.broken = acme_broken:Nothing")
    (tmp_path / "mine.py").write_text("def f(:\n")
    plugins = ("--plugin", "mine.py", "--plugin", "absent.py")
    status, out, err = call("doctor", "--data-root", tmp_path, *plugins)
    assert (status, err) == (1, "")
    assert out.splitlines()[-1] == "6 problems, marked with !"
    assert problems(out) == ["train", "digits", "mnist", "mine.py", "absent.py", "acme.broken"]
    assert line(out, "train").startswith("! train          lightning not installed, scikit-learn not installed")
    for name in ("train", "digits"):
        assert line(out, name).endswith("; fix: pip install 'invflow[train]'")
    mnist = "not found; fix: set INVFLOW_DATA to the folder that holds MNIST/raw, or train with --download"
    assert line(out, "mnist") == f"! mnist          {mnist}"
    assert "the plug-in does not load: SyntaxError" in line(out, "mine.py")
    assert line(out, "mine.py").endswith("; fix: repair it, or leave out --plugin")
    assert "no such plug-in" in line(out, "absent.py")
    assert "does not load: RuntimeError: no licence; fix: " in line(out, "acme.broken")
    assert line(out, "acme.broken").endswith("pip install --upgrade acme_broken, or pip uninstall acme_broken")


def test_installed_plug_ins(call, root, install):
    text = "import invflow\nclass Mine(invflow.bijections.Haar): pass\n"
    install("acme_mine", text, "acme.mine = acme_mine:Mine", "psi = acme_mine:Mine")
    (root / "mine.py").write_text("")
    status, out, _ = call("doctor", "--data-root", root, "--plugin", root / "mine.py")
    assert (status, problems(out)) == (1, ["psi"])
    assert line(out, "acme.mine") == "  acme.mine      layer of acme_mine"
    assert line(out, "mine.py") == "  mine.py        loads"
    assert line(out, "psi").endswith("layer type 'psi' is built in; fix: pip uninstall acme_mine")
    assert "acme.mine" in registry.bijections.registered()


def test_extras_of_development_are_no_problem(call, root, monkeypatch):
    without(monkeypatch, "sphinx", "pyarrow")
    status, out, _ = call("doctor", "--data-root", root)
    assert status == 0
    assert line(out, "docs").endswith("; fix: pip install 'invflow[docs]'")
    assert line(out, "table") == "  table          pyarrow not installed; fix: pip install 'invflow[table]'"


@pytest.mark.parametrize("found", ["2.13.0", "2.13.0+cpu", "2.9.1"])
def test_a_torch_that_must_not_be_used(call, root, monkeypatch, found):
    version = importlib.metadata.version
    monkeypatch.setattr(doctor, "version", lambda name: found if name == "torch" else version(name))
    status, out, _ = call("doctor", "--data-root", root)
    assert (status, problems(out)) == (1, ["torch"])
    expected = f"{found}, expected !=2.13.0,>=2.11; fix: pip install --upgrade 'torch!=2.13.0,>=2.11' torchvision"
    assert line(out, "torch") == f"! torch          {expected}"
    assert out.splitlines()[-1] == "1 problem, marked with !"


def test_a_malicious_lightning(call, root, monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(doctor, "version", lambda name: "2.6.2" if name == "lightning" else version(name))
    _, out, _ = call("doctor", "--data-root", root)
    assert problems(out) == ["train"]
    assert "lightning 2.6.2, expected " in line(out, "train")


def test_a_torchvision_that_does_not_import(call, root, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    status, out, _ = call("doctor", "--data-root", root)
    assert status == 1
    (found,) = (line for line in out.splitlines() if line.startswith("! torchvision"))
    assert "does not import: " in found
    assert found.endswith("; fix: pip install --upgrade torch torchvision")


@pytest.mark.parametrize("size", [0, 3, 12, 20])
@pytest.mark.parametrize("name", [FILES[0], FILES[3]])
def test_a_truncated_file(call, root, name, size):
    path = root / "MNIST" / "raw" / name
    path.write_bytes(path.read_bytes()[: min(size, path.stat().st_size - 1)])
    status, out, _ = call("doctor", "--data-root", root)
    assert (status, problems(out)) == (1, ["mnist"])
    fix = "delete what is damaged, then train with --download, or copy it again"
    assert line(out, "mnist") == f"! mnist          MNIST/raw/{name} is damaged; fix: {fix}"


def test_a_data_set_that_is_there_in_part(call, root):
    (root / "MNIST" / "raw" / FILES[1]).unlink()
    (root / "train_32x32.mat").write_bytes(b"half a download")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"half a download")
    status, out, _ = call("doctor", "--data-root", root)
    assert (status, problems(out)) == (1, ["mnist", "cifar10", "svhn"])
    assert f"MNIST/raw/{FILES[1]} is missing; fix: " in line(out, "mnist")
    assert "cifar-10-batches-py/data_batch_1 is damaged, cifar-10-batches-py/data_batch_2 is missing" in out
    assert "train_32x32.mat is damaged, test_32x32.mat is missing" in line(out, "svhn")


def test_a_file_that_may_not_be_read(root, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    assert set(vision.MNIST.faults(root).values()) == {"unreadable: Permission denied"}


def test_what_does_not_compile_is_no_problem(call, root, monkeypatch):
    monkeypatch.setattr(doctor, "_compiled", COMPILED)
    monkeypatch.setattr(doctor, "COMPILE_SECONDS", 0.01)
    status, out, _ = call("doctor", "--data-root", root)
    assert (status, problems(out)) == (0, [])
    assert "torch.compile fails, and nothing else needs it: no end after 0.01 s; fix: apt install g++" in out


def test_sums_that_are_not_exact(call, root, monkeypatch):
    def distrust(x):
        raise doctor.NumericsError("exact numerics expect exact sums, but they are not; switch off TF32")

    monkeypatch.setattr(doctor, "trust", distrust)
    status, out, _ = call("doctor", "--data-root", root)
    assert status == 1
    assert "! cpu            exact numerics expect exact sums, but they are not; fix: switch off TF32\n" in out


def test_a_topic_that_breaks_hides_no_other(call, root, monkeypatch):
    def broken(finding):
        raise OSError("no driver")
        yield

    monkeypatch.setattr(doctor, "_devices", broken)
    status, out, _ = call("doctor", "--data-root", root)
    assert status == 1
    assert "OSError: no driver; fix: repair what raises this" in out
    assert line(out, "mnist") == "  mnist          found"


def test_json(call, root, tmp_path):
    (tmp_path / "mine.py").write_text("print('printed')\nraise ValueError('no')")
    status, out, _ = call("doctor", "--data-root", root, "--plugin", "mine.py", "--json")
    answer = json.loads(out)
    assert (status, answer["ok"], answer["problems"]) == (1, False, 1)
    (problem,) = (one for one in answer["findings"] if one["problem"])
    found = "mine.py: the plug-in does not load: ValueError: no"
    fix = "repair it, or leave out --plugin"
    assert problem == {"topic": "plug-ins", "name": "mine.py", "found": found, "fix": fix, "problem": True}
    assert list(dict.fromkeys(one["topic"] for one in answer["findings"])) == [
        "versions", "extras", "devices", "numerics", "compiler", "data", "plug-ins",
    ]  # fmt: skip
