"""Glow with 3 levels of 8 steps on images of 3x32x32, in several libraries, for flows.py.

A step is an actnorm, an invertible 1x1 convolution with LU factors, and an affine coupling whose conditioner is a
convolution of side 3 to 64 channels, one of side 1, and one of side 3. The prior is a standard normal. FrEIA has no
learned 1x1 convolution: its block has a fixed rotation instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from chains import Contender
from torch import Tensor, nn

import invflow

SHAPE = (3, 32, 32)
LEVELS = 3
STEPS = 8
WIDTH = 64
LOG_NORMALIZER = math.prod(SHAPE) / 2 * math.log(2 * math.pi)


def conditioner(inputs: int, outputs: int) -> nn.Sequential:
    """The convolutions of a coupling."""
    return nn.Sequential(
        nn.Conv2d(inputs, WIDTH, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(WIDTH, WIDTH, 1),
        nn.ReLU(),
        nn.Conv2d(WIDTH, outputs, 3, padding=1),
    )


def ours() -> Contender:
    """Ours."""
    return built("linear_1x1", {"scale": "sigmoid"})


def with_rotations() -> Contender:
    """Ours, with what FrEIA has in the place of learned 1x1 convolutions, and with its scale."""
    return built("rotation", {"clamp": 1.0})


def built(mixing: str, scale: dict[str, Any]) -> Contender:
    """Ours, as a spec, with a layer that mixes the channels and a scale of the couplings."""
    parts = [
        {"type": "conv", "channels": WIDTH},
        {"type": "relu"},
        {"type": "conv", "channels": WIDTH, "kernel_size": 1},
        {"type": "relu"},
        {"type": "conv"},
    ]
    step = [
        {"type": "actnorm"},
        {"type": mixing},
        {"type": "split"},
        {"type": "affine_coupling", **scale, "net": {"type": "stack", "parts": parts}},
        {"type": "merge"},
    ]
    steps = [{"type": "psi", "block_size": 2}, {"type": "repeat", "times": STEPS, "layers": step}]
    level = [{"type": "on", "layers": steps}, {"type": "factor_out"}]
    layers = [{"type": "repeat", "times": LEVELS - 1, "layers": level}, level[0]]
    model = invflow.build_model({"input": {"shape": SHAPE}, "layers": layers, "prior": {"type": "standard_normal"}})
    model.bijection.initialize(torch.randn(32, *SHAPE))
    return Contender(model, model.log_prob, model.sample)


def freia() -> Contender:
    """FrEIA: a graph of its all-in-one blocks."""
    from FrEIA.framework import GraphINN, InputNode, Node, OutputNode
    from FrEIA.modules import AllInOneBlock, IRevNetDownsampling, Split

    nodes: list[Any] = [InputNode(*SHAPE)]
    goes_on: Any = nodes[0]
    for level in range(LEVELS):
        nodes.append(Node(goes_on, IRevNetDownsampling, {}))
        for _ in range(STEPS):
            nodes.append(Node(nodes[-1], AllInOneBlock, {"subnet_constructor": conditioner, "permute_soft": True}))
        goes_on = nodes[-1]
        if level < LEVELS - 1:
            split = Node(nodes[-1], Split, {})
            goes_on = split.out0
            nodes += [split, OutputNode(split.out1)]
    graph = GraphINN([*nodes, OutputNode(goes_on)])
    shapes = graph(torch.zeros(1, *SHAPE))[0]

    def log_prob(x: Tensor) -> Tensor:
        z, log_det = graph(x)
        return sum(-0.5 * part.square().flatten(1).sum(1) for part in z) + log_det - LOG_NORMALIZER

    def sample(count: int) -> Tensor:
        return graph([torch.randn(count, *part.shape[1:]) for part in shapes], rev=True)[0]  # type: ignore[no-any-return]

    return Contender(graph, log_prob, sample)


def nflows() -> Contender:
    """Nflows."""
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import (
        ActNorm,
        AffineCouplingTransform,
        CompositeTransform,
        MultiscaleCompositeTransform,
        OneByOneConvolution,
        SqueezeTransform,
    )

    class Net(nn.Sequential):
        """Called with the context too."""

        def forward(self, x: Tensor, context: None = None) -> Tensor:
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]

    def net(inputs: int, outputs: int) -> nn.Module:
        return Net(*conditioner(inputs, outputs))

    multiscale = MultiscaleCompositeTransform(LEVELS)
    shape = SHAPE
    for _ in range(LEVELS):
        squeeze = SqueezeTransform()
        shape = squeeze.get_output_shape(*shape)
        mask = (torch.arange(shape[0]) >= shape[0] // 2).int()
        step = [squeeze]
        for _ in range(STEPS):
            step += [ActNorm(shape[0]), OneByOneConvolution(shape[0]), AffineCouplingTransform(mask, net)]
        shape = multiscale.add_transform(CompositeTransform(step), shape)
    flow = Flow(multiscale, StandardNormal([math.prod(SHAPE)]))
    flow.log_prob(torch.randn(32, *SHAPE))
    return Contender(flow, flow.log_prob, flow.sample)


def normflows() -> Contender:
    """The example of normflows; its samples come with their densities."""
    import normflows as nf

    channels, height, width = SHAPE
    priors, flows, merges = [], [], []
    for level in range(LEVELS):  # the deepest first
        depth = LEVELS - level
        here = channels * 2 ** (depth + 1)
        flows.append([*(nf.flows.GlowBlock(here, WIDTH, init_zeros=False) for _ in range(STEPS)), nf.flows.Squeeze()])
        merges += [nf.flows.Merge()] if level else []
        latent = here // 2 if level else here
        priors.append(nf.distributions.DiagGaussian((latent, height // 2**depth, width // 2**depth), trainable=False))
    flow = nf.MultiscaleFlow(priors, flows, merges, class_cond=False)
    flow.log_prob(torch.randn(32, *SHAPE), None)
    return Contender(flow, lambda x: flow.log_prob(x, None), lambda count: flow.sample(count)[0])
