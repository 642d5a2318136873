"""Documents and inputs of models whose context has names."""

from __future__ import annotations

import torch

import invflow

CLASSES, BATCH = 3, 5
SHAPES = {"class": [CLASSES], "image": [2, 4, 4], "size": [1]}
CONV = {"type": "conv", "hidden": [4], "activation": "tanh"}


def coupling(**fields):
    return {"type": "affine_coupling", "net": CONV, **fields}


def document(layers=None, **top_level):
    chain = [{"type": "split"}, *(layers or [coupling(), coupling()]), {"type": "merge"}]
    return {
        "input": {"shape": [4, 4, 4], "context_shape": SHAPES},
        "layers": chain,
        "prior": {"type": "standard_normal"},
        **top_level,
    }


EVERYTHING = document(
    [
        coupling(),
        coupling(context="class"),
        coupling(context=["image", "size"], net={**CONV, "context": "image"}),
        coupling(context=None),
        {"type": "sequential", "context": ["class", "image"], "layers": [coupling(), coupling(context="class")]},
        {"type": "inverse", "layer": coupling(context="size")},
        {"type": "exchange", "order": [1, 0]},
    ],
    context_net={
        "class": {"type": "embedding", "context": "class", "out_shape": [2]},
        "image": {"type": "conv", "context": "image", "out_shape": [3, 4, 4], "hidden": [4], "activation": "tanh"},
    },
    prior={"type": "gaussian_mixture", "by": "context", "context": "class"},
)
"""Each way to say what is seen, with a net for two entries."""


def model_of(spec, seed=0):
    torch.manual_seed(seed)
    return invflow.build_model(spec).double()


def a_context(batch=BATCH):
    generator = torch.Generator().manual_seed(1)
    drawn = {
        name: torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()
    }
    return {**drawn, "class": torch.eye(CLASSES, dtype=torch.float64)[torch.arange(batch) % CLASSES]}


def an_x(batch=BATCH):
    return torch.randn(batch, 4, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
