"""Hypothesis profiles, where the data lie, and a fixture for what a test registers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from invflow import registry
from invflow.cli import main

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("dev", max_examples=15, **COMMON)
settings.register_profile("quick", max_examples=3, **COMMON)
settings.register_profile("ci", max_examples=15, derandomize=True, **COMMON)
settings.register_profile("thorough", max_examples=300, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

torch.set_num_threads(1)  # small tensors: threads cost more than they save, and pytest-xdist uses the cores


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The torchvision root that holds MNIST; the test is skipped, with the reason, where there is none."""
    root = os.environ.get("INVFLOW_DATA")
    if root is None or not (Path(root) / "MNIST" / "raw").is_dir():
        pytest.skip("needs MNIST: set INVFLOW_DATA to a torchvision root that holds it")
    return Path(root).resolve()


@pytest.fixture
def forget_what_a_test_registers(monkeypatch):
    """Leaves the registries as they were."""
    for one in registry.REGISTRIES:
        monkeypatch.setattr(one, "_classes", dict(one._classes))
        monkeypatch.setattr(one, "_fields", dict(one._fields))


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder and return (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run
