"""Checkpoints: loading returns exactly the saved model, or fails."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import invflow
from invflow import CheckpointError, SpecError
from invflow.spec.checkpoint import write_checkpoint

SPEC = {
    "input": {"shape": [1, 4, 4]},
    "layers": [
        {"type": "psi", "block_size": 2},
        {"type": "permute", "seed": 1},
        {"type": "split"},
        {"type": "repeat", "times": 2, "layers": [
            {"type": "additive_coupling", "net": {"type": "conv", "hidden": [3], "norm": "batch"}}
        ]},
        {"type": "merge"},
    ],
}  # fmt: skip
KILLS = 50
CORRUPTIONS = 200


def chain(seed=0, **more):
    torch.manual_seed(seed)
    return invflow.build({**SPEC, **more})


def classifier(seed=0, classes=3):
    torch.manual_seed(seed)
    return invflow.build_model({**SPEC, "head": {"type": "linear", "classes": classes}})


def flow(seed=0):
    torch.manual_seed(seed)
    return invflow.build_model({**SPEC, "prior": {"type": "standard_normal"}})


def same(first, second):
    """Whether two models have the same type and spec, and equal bits in every tensor."""
    one, other = first.state_dict(), second.state_dict()
    return (
        type(first) is type(second)
        and invflow.to_spec(first) == invflow.to_spec(second)
        and list(one) == list(other)
        and all(one[name].dtype == other[name].dtype and one[name].equal(other[name]) for name in one)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [chain, classifier, flow])
def test_what_was_saved_comes_back(make, dtype, tmp_path):
    model = make().to(dtype)
    trunk = getattr(model, "bijection", model)
    trunk(torch.rand(5, 1, 4, 4, dtype=dtype))  # moves the batch norm's statistics
    invflow.save(model, tmp_path / "new" / "folder")
    loaded = invflow.load(tmp_path / "new" / "folder")
    assert same(model, loaded)
    x = torch.rand(2, 1, 4, 4, dtype=dtype)
    again = getattr(loaded, "bijection", loaded)
    assert torch.equal(again.eval()(x), trunk.eval()(x))
    again.train()(x).sum().backward()  # its parameters are its own, and learn


def test_a_chain_composed_in_python_needs_its_shape(tmp_path):
    model = invflow.Sequential(invflow.bijections.Permute(order=[1, 0]))
    with pytest.raises(SpecError, match="name its input"):
        invflow.save(model, tmp_path)
    invflow.save(model, tmp_path, input_shape=(2,))
    assert invflow.load(tmp_path)(torch.tensor([[1, 2]])).tolist() == [[2, 1]]


def test_a_layer_that_stands_twice_is_saved_twice(tmp_path):
    torch.manual_seed(0)
    split, merge, (coupling, *_) = invflow.bijections.Split(), invflow.bijections.Merge(), chain()[3:5]
    shared = invflow.Sequential(split, coupling, coupling, merge)
    invflow.save(shared, tmp_path, input_shape=(4, 2, 2))
    loaded = invflow.load(tmp_path)
    x = torch.rand(1, 4, 2, 2)
    assert torch.equal(loaded.eval()(x), shared.eval()(x))


def test_a_checkpoint_is_replaced_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".weights-0123456789abcdef.safetensors.left_by_a_crash").write_text("")
    for seed in range(3):
        invflow.save(classifier(seed), tmp_path)
        assert same(classifier(seed), invflow.load(tmp_path))
    weights = json.loads((tmp_path / "spec.json").read_text())["checkpoint"]["weights"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["notes.txt", "spec.json", weights])


def test_the_same_model_again_is_the_same_folder(tmp_path):
    before = None
    for _ in range(2):
        invflow.save(chain(), tmp_path)
        after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert before is None or before == after
        before = after


def test_a_checkpoint_s_spec_is_a_spec(tmp_path):
    invflow.save(classifier(), tmp_path)
    assert invflow.load_spec(tmp_path / "spec.json").hash == invflow.load_spec(invflow.to_spec(classifier())).hash
    invflow.build_model(tmp_path / "spec.json")


def rewrite_spec(folder, change):
    path = folder / "spec.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def store(model, weights, folder):
    """A checkpoint with other weights and valid digests."""
    write_checkpoint(invflow.to_spec(model), weights, folder)


def missing_key(folder):
    weights = chain().state_dict()
    del weights["layers.3.net.0.bias"]
    store(chain(), weights, folder)


def other_key(folder):
    store(chain(), {**chain().state_dict(), "layers.9.weight": torch.zeros(1)}, folder)


def other_shape(folder):
    store(chain(), {**chain().state_dict(), "layers.3.net.0.bias": torch.zeros(4)}, folder)


def other_layers(folder):
    rewrite_spec(folder, lambda document: document["layers"][1].update(seed=2))


def truncated(folder):
    (weights,) = folder.glob("weights-*")
    weights.write_bytes(weights.read_bytes()[:-1])


def flipped(folder):
    (weights,) = folder.glob("weights-*")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def no_weights(folder):
    (weights,) = folder.glob("weights-*")
    weights.unlink()


def huge(folder):
    (weights,) = folder.glob("weights-*")
    with weights.open("r+b") as file:
        file.truncate(2**33)  # sparse: it takes no room on the disk, but would in memory


def no_spec(folder):
    (folder / "spec.json").unlink()


def no_block(folder):
    rewrite_spec(folder, lambda document: document.pop("checkpoint"))


def no_safetensors(folder):
    payload = b"anything"
    import hashlib

    digest = hashlib.sha256(payload).hexdigest()
    name = f"weights-{digest[:16]}.safetensors"
    (folder / name).write_bytes(payload)
    rewrite_spec(folder, lambda document: document["checkpoint"].update(weights=name, digest=digest))


REFUSALS = {
    missing_key: "'layers.3.net.0.bias' of the spec's model is missing",
    other_key: "the spec's model has no weight 'layers.9.weight'",
    other_shape: r"'layers.3.net.0.bias' is expected to have shape \(3,\), got \(4,\)",
    other_layers: "spec.json: the layers were changed after the weights were saved; build it instead",
    truncated: r"these are not the saved weights \(their digest differs\); copy them again",
    flipped: r"these are not the saved weights \(their digest differs\); copy them again",
    no_weights: "the weights cannot be read: No such file",
    huge: "larger than the weights of its spec can be",
    no_spec: "no checkpoint here: expected a folder with spec.json, as written by save",
    no_block: "no weights: this spec has no checkpoint block; build it instead of loading it",
    no_safetensors: "not a safetensors file",
}


@pytest.mark.parametrize("damage", REFUSALS, ids=lambda damage: damage.__name__)
def test_what_does_not_belong_together_is_refused(damage, tmp_path):
    invflow.save(chain(), tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=REFUSALS[damage]):
        invflow.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("layers.3.net.0.weight", torch.int64, "float32"),  # the first one of its kind
        ("layers.3.net.0.weight", torch.float8_e4m3fn, "float32"),
        ("layers.3.net.0.bias", torch.float64, "float32"),
        ("layers.3.net.0.bias", torch.bfloat16, "float32"),
        ("layers.3.net.0.bias", torch.bool, "float32"),
        ("layers.3.net.0.bias", torch.complex64, "float32"),
        ("layers.3.net.1.num_batches_tracked", torch.float32, "int64"),
        ("layers.1.order", torch.int32, "int64"),
        ("layers.1.order", torch.float32, "int64"),
    ],
)
def test_weights_of_another_dtype_are_refused(name, dtype, expected, tmp_path):
    weights = chain().state_dict()
    store(chain(), {**weights, name: weights[name].to(dtype)}, tmp_path)
    with pytest.raises(CheckpointError, match=f"{name!r} is expected to have dtype torch.{expected}, got {dtype}$"):
        invflow.load(tmp_path)


def test_a_model_of_two_dtypes_is_not_saved(tmp_path):
    model = chain()
    model[3].double()
    with pytest.raises(CheckpointError, match=r"expected to have dtype torch\.float64, got torch\.float32"):
        invflow.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["layers.3.net.0.bias", "layers.4.net.1.running_var"])
def test_weights_that_are_not_finite_are_loaded_on_request(name, value, tmp_path):
    model = chain()
    with torch.no_grad():
        model.state_dict()[name][1] = value
    invflow.save(model, tmp_path)
    with pytest.raises(
        CheckpointError, match=rf"{name!r} is NaN or infinite \(1 of 19 weights are\); .*allow_nan=True"
    ):
        invflow.load(tmp_path)
    loaded = invflow.load(tmp_path, allow_nan=True).state_dict()
    torch.testing.assert_close(loaded, model.state_dict(), rtol=0, atol=0, equal_nan=True)


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        invflow.load(tmp_path / "none")


def test_a_spec_cannot_name_a_file_elsewhere(tmp_path):
    invflow.save(chain(), tmp_path)
    rewrite_spec(tmp_path, lambda document: document["checkpoint"].update(weights="../secret.safetensors"))
    with pytest.raises(SpecError, match=r"checkpoint.weights: string should match pattern"):
        invflow.load(tmp_path)


def flip_a_bit(rng, content):
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def cut(rng, content):
    del content[rng.randrange(len(content)) :]


def zero_a_block(rng, content):
    start = rng.randrange(len(content))
    content[start : start + 16] = bytes(len(content[start : start + 16]))


def lose_a_byte(rng, content):
    del content[rng.randrange(len(content))]


def repeat_a_block(rng, content):
    start = rng.randrange(len(content))
    content[start:start] = content[start : start + 8]


DAMAGES = [flip_a_bit, flip_a_bit, flip_a_bit, cut, zero_a_block, lose_a_byte, repeat_a_block]


def test_random_corruptions_are_refused_or_change_nothing(tmp_path):
    model = classifier()
    invflow.save(model, tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    harmless = 0
    for seed in range(CORRUPTIONS):
        rng = random.Random(seed)
        path = rng.choice(sorted(files))
        content = bytearray(files[path])
        while content == files[path]:
            rng.choice(DAMAGES)(rng, content)
        path.write_bytes(content)
        try:
            loaded = invflow.load(tmp_path)
        except (CheckpointError, SpecError):
            pass
        else:
            assert path.name == "spec.json", "any change of the weights must be refused"
            assert same(model, loaded)
            harmless += 1
        path.write_bytes(files[path])
    assert same(model, invflow.load(tmp_path))
    assert harmless < CORRUPTIONS / 10  # white space, mostly


KILLED_WHILE_SAVING = """
import os, random, signal, sys, time
import torch
from tests.spec.test_checkpoint import classifier, same
import invflow

torch.set_num_threads(1)
folder, kills = sys.argv[1], int(sys.argv[2])
models = [classifier(seed, classes=500) for seed in (1, 2)]
start = time.monotonic()
invflow.save(models[0], folder)
one_save = time.monotonic() - start
met = []
for seed in range(kills):
    running, started = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            for model in models[:: 1 if seed % 2 else -1]:
                invflow.save(model, folder)
                os.write(started, b".")
    os.read(running, 1)  # the child is at work: what follows meets it anywhere in its next two saves
    time.sleep(random.Random(seed).uniform(0, 2 * one_save))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(running), os.close(started)
    loaded = invflow.load(folder)
    met.append([same(loaded, model) for model in models].index(True))
print(met.count(0), met.count(1), len(os.listdir(folder)))
"""


def test_a_kill_while_saving_leaves_the_old_or_the_new_checkpoint(tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path / "run"), str(KILLS)],
        cwd=root, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second, files = map(int, done.stdout.split())
    assert first + second == KILLS
    assert min(first, second) > 0, "the kills all met the same moment"
    assert files < 10, "what interrupted saves leave behind piles up"


TWO_SAVERS = """
import os, sys
import torch
from tests.spec.test_checkpoint import classifier, same
import invflow

torch.set_num_threads(1)
folder, saves = sys.argv[1], int(sys.argv[2])
models = [classifier(seed, classes=200) for seed in (1, 2)]
invflow.save(models[0], folder)
savers = []
for first in (0, 1):
    savers.append(os.fork())
    if savers[-1] == 0:
        for position in range(saves):
            invflow.save(models[(first + position) % 2], folder)
        os._exit(0)
while savers:
    loaded = invflow.load(folder)
    assert any(same(loaded, model) for model in models)
    process, status = os.waitpid(savers[0], os.WNOHANG)
    assert status == 0, "a saver failed"
    savers = savers[1:] if process else savers
loaded = invflow.load(folder)
assert any(same(loaded, model) for model in models)
print(len(os.listdir(folder)))
"""


def test_two_savers_overwrite_one_another_and_a_reader_always_finds_a_checkpoint(tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", TWO_SAVERS, str(tmp_path / "run"), "40"],
        cwd=root, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2, "only the spec and the weights of the last save stay"


def test_nothing_is_pickled(tmp_path):
    invflow.save(classifier(), tmp_path)
    (weights,) = tmp_path.glob("weights-*")
    assert safetensors.torch.load_file(weights).keys() == classifier().state_dict().keys()
