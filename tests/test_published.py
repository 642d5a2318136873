"""Published networks as documents: as many parameters as the official code has, and proved on a smaller scale."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import invflow
from invflow.bijections import Linear1x1
from invflow.diagnostics.memory import activation_memory
from invflow.errors import SpecError
from invflow.spec.training import MultiStep
from invflow.state import flat_size, flatten
from invflow.testing import check_bijection

FOLDER = Path(__file__).parent.parent / "specs" / "published"
PAGE = Path(__file__).parent.parent / "docs" / "published.md"

GLOW_TOP_PRIOR = 96 * 96 * 9 + 96 * 9 + 96 + 96
"""Of the official top prior: weights that convolve zeros, the mark's, biases and scales; this one is a normal one."""

REALNVP_DIRECTIONS = 3 * 3 + 3 * 6 + 4 * 6
"""Its scales of a tanh are weight-normed single numbers, whose directions are signs; these are numbers."""

IRESNET_HEAD = 48 * 2 + 48 * 10 + 10
"""Of i-ResNet's density: a class head that it does not use."""

ESTIMATORS = 2 * 52
"""Of Residual Flow: two settings of its estimator in each block, which are no weights."""

PARAMETERS = {
    "cinn": 20 * 2 * ((392 + 10) * 512 + 512 + 512 * 784 + 784),  # two nets of one hidden layer in each block
    "ffjord_mnist": 800_646,
    "glow_cifar10": 44_603_604 - GLOW_TOP_PRIOR,
    "glow_cifar10_additive": 38_395_668 - GLOW_TOP_PRIOR,
    "idf_cifar10": 58_458_052,
    "iresnet_cifar10": 4_873_178,
    "iresnet_density_cifar10": 25_029_130 - IRESNET_HEAD,
    "irevnet_cifar10": 6_274_826,
    "irevnet_imagenet": 125_120_356,
    "irevnet_imagenet_1x1": 29_201_092,
    "maf_tabular": 10 * (6 * 100 + 100 + 100 * 100 + 100 + 2 * (100 * 6 + 6) + 2 * 6),  # MADEs, and a batch norm each
    "nice_mnist": 19_158_352,
    "nsf_cifar10": 11_835_054,
    "realnvp_cifar10": 19_631_640 - REALNVP_DIRECTIONS,
    "residual_flow_cifar10": 25_174_233 - ESTIMATORS,
    "residual_flow_mnist": 16_608_693 - ESTIMATORS,
    "revnet110_cifar10": 1_729_194,
    "revvit_cifar10": 1_227_146,
    "tarflow_imagenet64": 460_142_784,
    "tarflow_mnist": 3_227_776,
}
"""Those that the official code counts, less what no number depends on."""

PROVED = ("round trip", "inverse round trip", "shapes")
"""What is measured of each on a smaller scale."""

PROVED_OF_DENSITIES = (*PROVED, "log det", "inverse log det")
"""Of those with a prior; i-RevNets of 5 scales are too large for a Jacobian, and nothing asks for it."""

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


def rows(name):
    """Those of the page about a network: its parameters, what is exact, its memory."""
    return re.findall(rf"^\| `{name}` \|.*$", PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_page_has_it(name):
    counted, exact, memory = rows(name)
    assert f"| {PARAMETERS[name]:,} |" in counted
    assert exact.endswith("| no |") == (
        "Not trained here." in invflow.load_spec(FOLDER / f"{name}.json").document["note"]
    )
    assert memory.count("|") == 5


@pytest.mark.parametrize("name", ["maf_tabular", "nice_mnist", "revvit_cifar10", "tarflow_mnist"])  # the quick ones
def test_the_page_has_its_memory(name):
    spec = invflow.load_spec(FOLDER / f"{name}.json")
    with torch.device("meta"):
        found = activation_memory(invflow.build(spec), 64, log_det=spec.prior is not None)
    sizes = " | ".join(f"{found.peak[policy] / 2**20:,.1f}" for policy in ("stored", "reversible", "checkpoint"))
    assert rows(name)[2] == f"| `{name}` | {sizes} |"


WITHOUT_RECIPE = {"irevnet_imagenet_1x1", "maf_tabular"}
"""Whose notes say why."""

SAMPLES = {"cifar10": 50_000, "mnist": 60_000, "image_folder": 1_281_167}
"""Of training; the folders are ImageNet's."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_its_recipe_fits_its_data(name):
    spec = invflow.load_spec(FOLDER / f"{name}.json")
    training, note = spec.training, spec.document["note"]
    if name in WITHOUT_RECIPE:
        assert training is None
        assert "recipe" in note
        return
    assert "The training block is" in note
    held_out = training.data.validation_size or 0
    samples = SAMPLES[training.data.name]
    samples -= round(held_out * samples) if held_out < 1 else held_out
    batches = math.ceil(samples / training.batch_size)
    steps = training.planned_steps(batches)
    assert training.unfit(steps, batches) is None
    if isinstance(training.schedule, MultiStep):
        assert training.schedule.milestones[-1] < (training.epochs or steps)


def smaller(node, widest=4, most=2):
    """A document, or a part of one: few channels in nets, few repetitions, blocks and steps, exact log-determinants."""
    if isinstance(node, list):
        return [smaller(one) for one in node]
    if not isinstance(node, dict):
        return node
    made = {key: smaller(value) for key, value in node.items()}
    for key in ("times", "blocks", "heads", "block_size"):
        if isinstance(made.get(key), int):
            made[key] = min(made[key], most)
        elif isinstance(made.get(key), list):  # the items of a repeat
            made[key] = [min(one, most) for one in made[key]]
    if made.get("type") == "repeat":
        made["with"] = {name: shorter(items, most) for name, items in made.get("with", {}).items()}
    if isinstance(made.get("channels"), int) and made["type"] != "pad":
        made["channels"] = min(made["channels"], widest)
    if isinstance(made.get("hidden"), list):
        made["hidden"] = [min(width, widest) for width in made["hidden"][:most]]
    if made.get("type") == "continuous":
        made |= {"steps": 1, "method": "euler", "trace": "exact"}
    if made.get("type") == "residual" and "parts" not in made:
        made["log_det"] = {"type": "exact"}
    return made


def shorter(items, most):
    """A list, and those in it, cut to as many items; anything else as it is."""
    return [shorter(one, most) for one in items[:most]] if isinstance(items, list) else items


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
    document = smaller(json.loads((FOLDER / f"{name}.json").read_text()))
    chain = chain_of(document)
    with torch.no_grad():  # what starts at zero would hide its faults
        for weight in chain.parameters():
            weight.add_(NOISE * torch.randn_like(weight))
    shape, context_shape = chain.declared_shape, chain.declared_context_shape
    proved = PROVED_OF_DENSITIES if "prior" in document else PROVED
    found = check_bijection(
        chain, shape, context_shape=context_shape, examples=2, kinds=["normal"], perturb=False, only=proved
    )
    assert len(found.findings) == len(proved) or not chain.surjective


class Official(NamedTuple):
    """What the official code returns, computed by it in float64 with the weights of `formula` copied into it.

    Glow's, which runs in TensorFlow 1 alone, is computed by its equations in NumPy.

    Attributes:
        changes: what to write in place of what in the document, so that few numbers are enough.
        stride: the distance between the numbers of z that are compared.
        z: the first ones of these.
        log_dets: the log-determinants; of a model on a grid, the log-probabilities.
    """

    changes: dict[str, str]
    stride: int
    z: list[float]
    log_dets: list[float]


GLOW_CHANGES = {"3, 32, 32": "3, 8, 8", '"times": 32': '"times": 2', "512": "4"}

OFFICIAL = {
    "cinn": Official(
        {"1, 28, 28": "1, 4, 4", "512": "4", '"times": 20': '"times": 2', ", ".join(map(str, range(20))): "0, 1"},
        5,
        [-2.5291215545012413, -3.6191552665599027, -1.697850657417601, 0.25870516953748224, 3.9878603816788742],
        [18.96835336795066, 19.194592914218195],
    ),
    "glow_cifar10": Official(
        GLOW_CHANGES,
        31,
        [-2.071011423780654, -0.47721110245799336, -0.05789536902724167, 0.5852756800091138, 2.8710890173287447],
        [-63.75797602374041, -77.60358441046628],
    ),
    "glow_cifar10_additive": Official(
        GLOW_CHANGES,
        31,
        [-2.1795449104002653, -0.5288700481750405, -0.5784252841365756, 0.9243973127541446, 3.8964712524671983],
        [-3.7026488251412957, -5.497942435224104],
    ),
    "idf_cifar10": Official(  # without the 1e-8 that it adds to each probability
        {
            "3, 32, 32": "3, 8, 8",
            '"channels": 512, "blocks": 12': '"channels": 6, "blocks": 2',
            '"times": 8': '"times": 1',
            "[[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]": "[[0], [1]]",
            "[16, 17, 18, 19, 20, 21, 22, 23]": "[2]",
        },
        31,
        [0.42578125, 0.53125, 0.6328125, 0.6640625, 0.03125, 0.61328125, 0.19921875, 0.12109375],
        [-1380.9048620105466, -1376.5798023728019],
    ),
    "nsf_cifar10": Official(
        {
            "3, 32, 32": "3, 4, 4",
            '"times": 3, "with"': '"times": 1, "with"',
            '"times": 3, "parts"': '"times": 1, "parts"',
            '"times": 7': '"times": 2',
            "[[0, 1, 2, 3, 4, 5, 6], [8, 9, 10, 11, 12, 13, 14], [16, 17, 18, 19, 20, 21, 22]]": "[[0, 1]]",
            "[7, 15, 23]": "[7]",
            '"channels": 96': '"channels": 4',
            "9.797958971132712": "2",
        },
        11,
        [-0.9463249416963657, -0.6595464592333669, 0.6085176858592486, -0.4334161075904792, 0.5990934930708235],
        [-54.174161825705355, -51.95053275649302],
    ),
    "realnvp_cifar10": Official(
        {
            "3, 32, 32": "3, 8, 8",
            '"times": 8': '"times": 1',
            '"channels": 64': '"channels": 2',
            '"channels": 128': '"channels": 4',
        },
        29,
        [1.3007136237747885, -0.22114112444925949, 1.4511734538477443, 0.2440904032352558, -0.6390664902654208],
        [272.01932105006756, 272.0499214266329],
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_smaller_one_returns_what_the_official_code_does(name):
    official = OFFICIAL[name]
    text = (FOLDER / f"{name}.json").read_text()
    for old, new in official.changes.items():
        assert old in text
        text = text.replace(old, new)
    model = formula(invflow.build_model(json.loads(text)).double().eval())
    chain = model.bijection
    shape, context_shape = chain.declared_shape, chain.declared_context_shape
    x = torch.cos(torch.arange(2 * flat_size(shape), dtype=torch.float64)).reshape(2, *shape)
    context = None if context_shape is None else torch.eye(*context_shape, dtype=torch.float64)[:2]
    x = x / 3 + 0.5 if chain[0].domain == "unit" else x
    with torch.no_grad():
        if chain.numerics.on_grid:
            z, log_det = model.features_and_log_prob(torch.round((x / 2 + 0.5) * 255) / 256)
        else:
            z, log_det = chain.forward_and_log_det(x, context)
    found = flatten(z).flatten()[:: official.stride][: len(official.z)]
    torch.testing.assert_close(found, torch.tensor(official.z, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(log_det, torch.tensor(official.log_dets, dtype=torch.float64), rtol=1e-10, atol=0)


def formula(model):
    """A model whose weights and running statistics are those of a formula, so that no file has to hold them."""
    statistics = [(name, buffer) for name, buffer in model.named_buffers() if "running" in name]
    with torch.no_grad():
        for index, (name, tensor) in enumerate([*model.named_parameters(), *statistics]):
            wave = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) + index).reshape(tensor.shape)
            tensor.copy_(wave.square() + 0.5 if name.endswith("running_var") else 0.3 * wave)
        for layer in model.modules():
            if isinstance(layer, Linear1x1) and layer.parametrization == "plain":  # waves alone are singular
                layer.weight.add_(torch.eye(layer.channels))
    return model
