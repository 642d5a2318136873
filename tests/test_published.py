"""Published networks as documents: as many parameters as the official code has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import invflow

FOLDER = Path(__file__).parent.parent / "specs" / "published"

GLOW_TOP_PRIOR = 96 * 96 * 9 + 96 * 9 + 96 + 96
"""Of the official top prior: weights that convolve zeros, the mark's, biases and scales; this one is a normal one."""

PARAMETERS = {
    "ffjord_mnist": 800_646,
    "glow_cifar10": 44_603_604 - GLOW_TOP_PRIOR,
    "glow_cifar10_additive": 38_395_668 - GLOW_TOP_PRIOR,
    "irevnet_cifar10": 6_274_826,
    "irevnet_imagenet": 125_120_356,
    "irevnet_imagenet_1x1": 29_201_092,
    "revnet110_cifar10": 1_729_194,
    "revvit_cifar10": 1_227_146,
    "tarflow_imagenet64": 460_142_784,
    "tarflow_mnist": 3_227_776,
}
"""Those that the official code counts, less what no number depends on."""


def test_each_is_counted():
    assert {path.stem for path in FOLDER.glob("*.json")} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    with torch.device("meta"):  # where the large ones take no memory
        model = invflow.build_model(FOLDER / f"{name}.json")
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]
    assert invflow.load_spec(FOLDER / f"{name}.json").document["note"]
