"""The differences of two specs are those that a reader would name."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings

import invflow
from invflow.spec.diff import diff_specs
from invflow.testing.strategies import chain_cases

SPEC = {
    "input": {"shape": [1, 28, 28]},
    "layers": [
        {"type": "psi"},
        {"type": "split"},
        {"type": "repeat", "times": 3, "layers": [{"type": "additive_coupling", "net": {"type": "conv"}}]},
        {"type": "merge"},
    ],
    "head": {"type": "linear", "classes": 10},
    "training": {"epochs": 3, "optimizer": {"type": "sgd", "lr": 0.1}},
}
COUPLING = SPEC["layers"][2]["layers"][0]


def changed(change):
    spec = copy.deepcopy(SPEC)
    change(spec)
    return spec


def expanded(spec):
    spec["layers"][2:3] = [copy.deepcopy(COUPLING) for _ in range(3)]
    return spec["layers"]


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (lambda s: s.update(name="other", note="n", spec_version=1), []),
        (expanded, []),
        (lambda s: s["layers"][0].update(block_size=4, note="the default"), []),
        (lambda s: s["layers"][0].update(block_size=2), ["layers.0.block_size: 4 -> 2"]),
        (lambda s: s["input"].update(shape=[3, 28, 28]), ["input.shape: [1, 28, 28] -> [3, 28, 28]"]),
        (lambda s: s["input"].update(context_shape=[2]), ["input.context_shape: null -> [2]"]),
        (
            lambda s: s["layers"][2].update(times=4),
            ['+ layers.5: {"type": "additive_coupling", "net": {"type": "conv"}}'],
        ),
        (
            lambda s: s["layers"][2].update(times=2),
            ['- layers.4: {"type": "additive_coupling", "net": {"type": "conv"}}'],
        ),
        (
            lambda s: s["layers"][2]["layers"][0]["net"].update(kernel_size=7),
            [f"layers.{i}.net.kernel_size: 3 -> 7" for i in (2, 3, 4)],
        ),
        (
            lambda s: expanded(s)[3].update(net={"type": "mlp"}),
            ['layers.3.net: {"type": "conv"} -> {"type": "mlp"}'],
        ),
        (
            lambda s: (s["layers"].insert(0, {"type": "permute", "seed": 1}), s["layers"][3].update(times=2)),
            [
                '+ layers.0: {"type": "permute", "seed": 1}',
                '- layers.4: {"type": "additive_coupling", "net": {"type": "conv"}}',
            ],
        ),
        (
            lambda s: (s["layers"].insert(0, {"type": "permute", "seed": 1}), s["layers"][1].update(block_size=2)),
            [
                '+ layers.0: {"type": "permute", "seed": 1}',
                "layers.0 (layers.1 of the second).block_size: 4 -> 2",
            ],
        ),
        (
            lambda s: s["layers"].append({"type": "inverse", "layer": {"type": "psi"}}),
            ['+ layers.6: {"type": "inverse", "layer": {"type": "psi"}}'],
        ),
        (lambda s: s["head"].update(classes=2), ["head.classes: 10 -> 2"]),
        (lambda s: s.pop("head"), ['head: {"type": "linear", "classes": 10} -> none']),
        (
            lambda s: s.update(head={"type": "convnet", "classes": 10, "hidden": [8]}),
            ['head: {"type": "linear", "classes": 10} -> {"type": "convnet", "classes": 10, "hidden": [8]}'],
        ),
        (lambda s: s["training"].update(batch_size=64), []),
        (lambda s: s["training"].update(batch_size=32, epochs=3), ["training.batch_size: 64 -> 32"]),
        (lambda s: s["training"]["optimizer"].update(momentum=0.9), ["training.optimizer.momentum: 0.0 -> 0.9"]),
        (lambda s: s["training"].update(schedule={"type": "cosine"}),
         ['training.schedule: null -> {"type": "cosine", "final_lr": 0.0}']),
    ],
)  # fmt: skip
def test_one_change_is_one_line(change, lines):
    assert diff_specs(SPEC, changed(change)) == lines


def test_inside_nested_layers():
    def spec(*inner):
        return {"input": {"shape": [4]}, "layers": [{"type": "sequential", "layers": list(inner)}]}

    permute, other = {"type": "permute", "seed": 1}, {"type": "permute", "seed": 2}
    assert diff_specs(spec(permute), spec(permute, other)) == ['+ layers.0.layers.1: {"type": "permute", "seed": 2}']
    assert diff_specs(spec(permute), spec(other)) == ["layers.0.layers.0.seed: 1 -> 2"]
    wrapped = [{"type": "inverse", "layer": one} for one in (permute, other)]
    assert diff_specs(spec(wrapped[0]), spec(wrapped[1])) == ["layers.0.layers.0.layer.seed: 1 -> 2"]


@settings(max_examples=settings().max_examples // 3)  # to draw two chains takes long
@given(chain_cases(max_depth=5), chain_cases(max_depth=5))
def test_no_difference_is_the_same_hash(first, second):
    one, other = invflow.load_spec(first.spec), invflow.load_spec(second.spec)
    assert diff_specs(one, one) == []
    assert (diff_specs(one, other) == []) is (one.hash == other.hash)
    assert bool(diff_specs(one, other)) is bool(diff_specs(other, one))
