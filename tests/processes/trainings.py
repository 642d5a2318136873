"""The trainings that several processes do as one does: a program, which each of them runs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import invflow

STEPS = 20
NET = {"type": "mlp", "hidden": [8]}
CONV = {"type": "conv", "hidden": [6]}
SGD = {"type": "sgd", "lr": 0.05, "momentum": 0.9}
POINTS = [
    {"type": "actnorm"},
    {"type": "linear_1x1"},
    {"type": "split"},
    {"type": "affine_coupling", "net": NET},
    {"type": "merge"},
]
IMAGES = [
    {"type": "psi"},
    {"type": "actnorm"},
    {"type": "linear_1x1"},
    {"type": "split"},
    {"type": "affine_coupling", "net": CONV},
    {"type": "merge"},
]


def flow_of_points(**training):
    """Steps with 2 epochs and a last batch that no number of processes divides: 100 samples in batches of 9."""
    return {
        "input": {"shape": [2]},
        "layers": [{"type": "repeat", "times": 2, "layers": POINTS}],
        "prior": {"type": "standard_normal"},
        "training": {
            "data": {"name": "moons", "train_size": 100},
            "batch_size": 9,
            "steps": STEPS,
            "precision": 64,
            "optimizer": SGD,
            "average": {"decay": 0.9},
            **training,
        },
    }


def flow_of_images(**training):
    return {
        "input": {"shape": [1, 8, 8]},
        "layers": IMAGES,
        "prior": {"type": "standard_normal"},
        "training": {
            "data": {"name": "digits", "train_size": 100, "augmentation": {"affine": {"degrees": 10}}},
            "batch_size": 30,
            "steps": STEPS,
            "precision": 64,
            "optimizer": {"type": "adam", "lr": 0.01},
            **training,
        },
    }


def classifier(**training):
    return {
        "input": {"shape": [1, 8, 8]},
        "layers": [{"type": "psi"}, {"type": "split"}, {"type": "additive_coupling", "net": CONV}, {"type": "merge"}],
        "head": {"type": "linear", "classes": 10},
        "training": {
            "data": {"name": "digits", "train_size": 100},
            "batch_size": 27,
            "steps": STEPS,
            "precision": 64,
            "optimizer": SGD,
            "clip_gradient": 1.0,
            **training,
        },
    }


SPECS = {
    "stored": flow_of_points(),
    "reversible": {**flow_of_points(), "backprop": "reversible"},
    "checkpoint": {**flow_of_points(), "backprop": "checkpoint"},
    "images": flow_of_images(),
    "parts": flow_of_images(accumulate=4),
    "classifier": classifier(),
}
BY_MANY = ("stored", "reversible", "checkpoint", "images")
"""Which of them more than two processes do too."""
SHARDED = {name: SPECS[name] for name in ("stored", "reversible", "checkpoint", "classifier")}


def train(name, folder, **hardware):
    """One of the trainings; each process of several calls it."""
    return invflow.fit(SPECS[name], SPECS[name]["training"]["data"], folder, progress=False, device="cpu", **hardware)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, devices = Path(sys.argv[1]), int(sys.argv[2])
    for name in SPECS if devices == 2 else BY_MANY:
        run = train(name, place / name, devices=devices)
        assert run.record["status"] == "finished"  # in every process
    if devices == 2:
        for name in SHARDED:
            train(name, place / f"{name}-sharded", devices=devices, strategy="fsdp")
