"""What is loaded when: importing the library costs little more than importing PyTorch."""

from __future__ import annotations

import subprocess
import sys

import pytest

LATE = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "hypothesis",
    "matplotlib",
    "lightning",
    "torchvision",
    "sklearn",
    "torchmetrics",
    "rich",
    "typer",
)


def loaded_by(module):
    """Which of the libraries that load late an import loads, in a process of its own."""
    code = f"import sys, {module}; print(*[name for name in {LATE!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.split()


def test_the_library_loads_nothing_that_it_may_not_need():
    assert loaded_by("invflow") == []


@pytest.mark.parametrize("module", ["training.illustrate", "diagnostics.conditioning", "models.freezing"])
def test_only_the_checker_loads_hypothesis(module):
    assert "hypothesis" not in loaded_by(f"invflow.{module}")


def test_building_and_checking_loads_no_compiler():
    spec = {
        "input": {"shape": [1, 8, 8]},
        "layers": [{"type": "psi"}, {"type": "split"}],
        "head": {"type": "linear", "classes": 2},
    }
    code = f"import sys, invflow; invflow.build_model({spec!r}); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"


def test_the_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    import invflow

    assert invflow.__version__ == version("invflow")
