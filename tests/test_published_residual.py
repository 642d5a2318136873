"""i-ResNet and Residual Flow, scaled down, compute what their official code does.

The golden numbers are those of the official code, run in float64 with the same weights and with its power iteration
converged: github.com/jhjacobsen/invertible-resnet (630e886) and github.com/rtqichen/residual-flows (8170138).
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

import invflow
from invflow.bijections import ActNorm, Psi, Residual
from invflow.nets import SpectralConv
from invflow.nets.lipschitz import LipSwish
from invflow.state import leaves

FOLDER = Path(__file__).parent.parent / "specs" / "published"
BATCH = 2
CLOSE = 1e-10
"""Relative to the largest number; singular vectors converge to 4e-11."""

WIDTHS = {32: 4, 64: 5, 128: 6, 512: 6}
SHORTER = {15: 1, 16: 2, 6: 1, 7: 2}


@pytest.fixture(autouse=True)
def _double():
    """So that constants of the documents, such as the mean of the pixels, are not rounded to float32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def wave(shape, start):
    """Weights by formula, the same ones for the official code."""
    size = torch.Size(shape).numel()
    return torch.sin(1.7 * torch.arange(size, dtype=torch.float64) + 0.3 * start).reshape(shape)


def image(shape):
    return 0.5 + 0.45 * wave((BATCH, *shape), 5)


def small(name):
    """The document with 2 blocks a stage of few channels, on 16x16 pixels, with exact log-determinants."""

    def shrink(value, key=None):
        if isinstance(value, dict) and "terms" in value:
            return {"type": "exact"}
        if isinstance(value, dict):
            return {key: shrink(one, key) for key, one in value.items()}
        if key == "hidden" and isinstance(value, list):
            return [5 if width == 128 and "flow" in name else WIDTHS[width] for width in value]
        if key == "widths":
            return [[WIDTHS[width] for width in pair] for pair in value]
        if isinstance(value, list):
            return [shrink(one) for one in value]
        return SHORTER.get(value, value) if key == "times" else value

    document = shrink(json.loads((FOLDER / f"{name}.json").read_text()))
    document["input"]["shape"][1:] = [16, 16]
    return {key: document[key] for key in ("spec_version", "input", "vars", "layers") if key in document}


@torch.no_grad()
def fill_iresnet(chain, wide, extra=1e-5):
    """Waves in every layer, with convolutions divided as the official code does.

    Args:
        chain: the chain.
        wide: whether norms behind a squeeze are those at the size before it, as in the classifier.
        extra: what the official code adds to the divisor of a 3x3 convolution.
    """
    count = itertools.count(step=2)
    squeezed = False
    for layer in chain.modules():
        if isinstance(layer, ActNorm):
            k = next(count)
            layer.log_scale.copy_(0.2 * wave(layer.log_scale.shape, k))
            layer.shift.copy_(0.2 * wave(layer.shift.shape, k + 1))
            layer.initialized.fill_(1)
        elif isinstance(layer, Residual):
            for conv in layer.net.maps:
                k = next(count)
                weight = 0.2 * wave(conv.weight.shape, k)
                conv.weight.copy_(weight)
                conv.bias.copy_(0.2 * wave(conv.bias.shape, k + 1))
                if weight.shape[-1] == 3:
                    sides = tuple((1 + (wide and squeezed)) * side for side in conv.in_shape[1:])
                    norm = norm_at(weight, sides)
                    conv.weight.div_(max(1.0, norm / conv.bound) + extra)
        squeezed = isinstance(layer, Psi) or (squeezed and not isinstance(layer, Residual))


def norm_at(weight, sides):
    conv = SpectralConv(*weight.shape[1::-1], weight.shape[-1], sides)
    conv.weight.copy_(weight)
    return float(conv.norm())


@torch.no_grad()
def fill_flow(chain):
    """Waves in every layer; an actnorm adds its bias first and then scales."""
    count = itertools.count()
    for layer in chain.modules():
        if isinstance(layer, ActNorm):
            log_scale, bias = (0.2 * wave(layer.shift.shape, next(count)) for _ in range(2))
            layer.log_scale.copy_(log_scale)
            layer.shift.copy_(bias * log_scale.exp())
            layer.initialized.fill_(1)
        elif isinstance(layer, Residual):
            for conv, activation in zip(layer.net.maps, layer.net.activations, strict=True):
                if isinstance(activation, LipSwish):
                    activation.beta.copy_(0.5 + 0.3 * wave((), next(count)))
                conv.weight.copy_(0.2 * wave(conv.weight.shape, next(count)))
                conv.bias.copy_(0.2 * wave(conv.bias.shape, next(count)))


GOLDEN = {
    "iresnet_density_cifar10": (
        [0.6610335167489543, -0.4533436347005172, -0.2851042370736405, 0.2482306797233653, -0.1491871498717317],
        53.60881718383618,
        8.6333664886362,
    ),
    "iresnet_cifar10": (
        [2.308758554280743, -0.3011268400652218, -0.01119967354326143, 0.1189427158459029, -0.2996140719768222],
        434.01790300825394,
        None,
    ),
    "residual_flow_mnist": (
        [3.875198156683409, 1.015906910122833, 0.725449411610996, 3.824180927802515, -1.387418173303329],
        152.41648302135724,
        535.3427575013162,
    ),
    "residual_flow_cifar10": (
        [3.023640613624686, 0.229961980760908, -1.963232034825822, 0.8648822171975558, 2.632478757611744],
        385.82361583848683,
        1378.784595703146,
    ),
}
"""Of each network: every sixth of its last states in turn, their sum, and the log-determinant of the first sample, from
the Jacobian of the official forward pass."""


@pytest.mark.parametrize("name", GOLDEN)
def test_the_official_code_returns_the_same(name):
    some, total, log_det = GOLDEN[name]
    document = small(name)
    chain = invflow.build(document)
    if name.startswith("iresnet"):
        fill_iresnet(chain, wide=name == "iresnet_cifar10")
    else:
        fill_flow(chain)
    x = image(document["input"]["shape"])
    with torch.no_grad():
        z = torch.cat([leaf.flatten(1) for leaf in leaves(chain.eval()(x))], dim=1).flatten()
    largest = float(z.abs().max())
    assert z[:: len(z) // 6][: len(some)].tolist() == pytest.approx(some, rel=0, abs=CLOSE * largest)
    assert float(z.sum()) == pytest.approx(total, rel=0, abs=CLOSE * largest * math.sqrt(len(z)))
    if log_det is not None:
        assert float(chain.forward_and_log_det(x[:1])[1].detach()) == pytest.approx(log_det, rel=CLOSE)
