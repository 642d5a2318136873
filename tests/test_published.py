"""Published networks as documents: as many parameters as the official code has, and proved on a smaller scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import invflow
from invflow.errors import SpecError
from invflow.testing import check_bijection

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
    "nice_mnist": 19_158_352,
    "tarflow_imagenet64": 460_142_784,
    "tarflow_mnist": 3_227_776,
}
"""Those that the official code counts, less what no number depends on."""

PROVED = ("round trip", "inverse round trip", "shapes", "log det", "inverse log det")
"""What is measured of each on a smaller scale."""

NOISE = 0.02
"""Added to every weight: those that start at zero then make scales from 0.8 to 1, as in test_glow.py."""


def test_each_is_counted():
    assert {path.stem for path in FOLDER.glob("*.json")} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    with torch.device("meta"):  # where the large ones take no memory
        model = invflow.build_model(FOLDER / f"{name}.json")
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]
    assert invflow.load_spec(FOLDER / f"{name}.json").document["note"]


def smaller(node, widest=4, most=2):
    """A document, or a part of one: few channels in nets, few repetitions, blocks and steps, exact log-determinants."""
    if isinstance(node, list):
        return [smaller(one) for one in node]
    if not isinstance(node, dict):
        return node
    made = {key: smaller(value) for key, value in node.items()}
    for key in ("times", "blocks", "heads", "block_size"):
        if key in made:
            made[key] = min(made[key], most)
    if "times" in made:
        made["with"] = {name: items[:most] for name, items in made.get("with", {}).items()}
    if isinstance(made.get("channels"), int) and made["type"] != "pad":
        made["channels"] = min(made["channels"], widest)
    if "hidden" in made:
        made["hidden"] = [min(width, widest) for width in made["hidden"][:most]]
    if made.get("type") == "continuous":
        made |= {"steps": 1, "method": "euler", "trace": "exact"}
    if made.get("type") == "residual":
        made["log_det"] = {"type": "exact"}
    return made


def chain_of(document):
    """The chain of a document, on the smallest square image of at least 4 x 4 that its layers take."""
    channels, *positions = document["input"]["shape"]
    sides = [4, 8, 16, 32, 64] if positions else [1]
    for side in sides:
        document["input"]["shape"] = [channels, *[side] * len(positions)]
        try:
            return invflow.build(document)
        except SpecError:
            if side == sides[-1]:
                raise
    raise AssertionError


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_smaller_one_is_proved(name):
    torch.manual_seed(0)
    chain = chain_of(smaller(json.loads((FOLDER / f"{name}.json").read_text())))
    with torch.no_grad():  # what starts at zero would hide its faults
        for weight in chain.parameters():
            weight.add_(NOISE * torch.randn_like(weight))
    shape, context_shape = chain.declared_shape, chain.declared_context_shape
    found = check_bijection(
        chain, shape, context_shape=context_shape, examples=2, kinds=["normal"], perturb=False, only=PROVED
    )
    assert len(found.findings) == len(PROVED) or not chain.surjective
