"""Packages provide bijections, nets and heads by entry points; each test installs a package and starts a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

GOOD = '''
import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

import invflow

print("acme is loaded")


class Scale(invflow.Bijection):
    """y = factor * x, elementwise.

    Args:
        factor: what to multiply by.
    """

    examples = [({}, (3,)), ({"factor": 0.5}, (2, 4, 4))]

    def __init__(self, factor: PositiveFloat = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x * self.factor

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        return y / self.factor

    def forward_and_log_det(self, x, context=None):
        return self(x), self._log_det(x)

    def inverse_and_log_det(self, y, context=None):
        return self.inverse(y), -self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        volume = x[0].numel() if len(x) else 0
        return x.new_full(x.shape[:1], self.factor).log() * volume


@invflow.register_net("acme.times")
class Times(nn.Module):
    """b = factor * a.

    Args:
        factor: what to multiply by.
    """

    def __init__(self, in_shape: tuple[int, ...], factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.factor * x


class Sum(nn.Module):
    """Every logit is the sum of the state.

    Args:
        classes: how many logits.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, state: Tensor) -> Tensor:
        return state.flatten(1).sum(1, keepdim=True).expand(-1, self.classes)
'''

ENTRY_POINTS = """
[invflow.bijections]
acme.scale = acme_flows:Scale
acme.broken = acme_broken:Nothing
acme.absent = acme_absent:Scale
acme.number = acme_number:NUMBER

[invflow.nets]
acme.times = acme_flows:Times

[invflow.heads]
acme.sum = acme_flows:Sum
"""


FORKING = """
import contextlib, io, json, os, sys, traceback
import torch, invflow

for line in sys.stdin:
    reading, writing = os.pipe()
    if os.fork() == 0:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(json.loads(line), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc(file=printed)
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(printed.getvalue().splitlines()))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        print(pipe.read(), flush=True)
    os.wait()
"""


@pytest.fixture(scope="module")
def clean_process():
    """Runs a program in a process where invflow has loaded no plug-in; torch is imported only once for all."""
    arguments = [sys.executable, "-W", "error", "-c", FORKING]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(program):
            process.stdin.write(json.dumps(program) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.fixture
def run(clean_process, tmp_path):
    """Runs code with the package installed, and returns the printed lines."""
    site = tmp_path / "site"
    information = site / "acme_flows-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-flows\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    (site / "acme_flows.py").write_text(GOOD)
    (site / "acme_broken.py").write_text("raise RuntimeError('no licence')\n")
    (site / "acme_number.py").write_text("NUMBER = 3\n")
    return lambda code: clean_process(f"import sys; sys.path.insert(0, {str(site)!r})\n{textwrap.dedent(code)}")


def test_a_plug_in_is_loaded_when_its_tag_asks_and_not_before(run):
    spec = {
        "input": {"shape": [4]},
        "layers": [
            {"type": "inverse", "layer": {"type": "sequential", "layers": [{"type": "acme.scale", "factor": 4}]}},
            {"type": "split"},
            {"type": "additive_coupling", "net": {"type": "acme.times", "factor": 2.0}},
            {"type": "merge"},
        ],
        "head": {"type": "acme.sum", "classes": 2},
    }
    assert run(f"""
        import json, torch, invflow
        from invflow.spec.schema import json_schema
        invflow.build({{"input": {{"shape": [4]}}, "layers": [{{"type": "split"}}]}})
        print("nothing so far", "acme_flows" in sys.modules, "layer.acme.scale" in json_schema()["$defs"])
        model = invflow.build_model(json.loads({json.dumps(spec)!r}))
        print(model(torch.ones(1, 4)).tolist())
        print(json.dumps(invflow.to_spec(model)["layers"]))
        invflow.save(model, sys.path[0] + "/run")
        print(type(invflow.load(sys.path[0] + "/run").head).__name__)
        shown = json_schema()["$defs"]
        print(shown["layer.acme.scale"]["properties"]["factor"]["description"])
        print(shown["net.acme.times"]["required"], shown["head.acme.sum"]["required"])
        print("acme.scale" in shown["entry.layers"]["properties"]["type"]["enum"])
    """) == [
        "nothing so far False False",
        "acme is loaded",
        "[[2.0, 2.0]]",
        json.dumps(
            [
                {"type": "inverse", "layer": {"type": "sequential", "layers": [{"type": "acme.scale", "factor": 4.0}]}},
                {"type": "split"},
                {"type": "additive_coupling", "net": {"type": "acme.times", "factor": 2.0}},
                {"type": "merge"},
            ]
        ),
        "Sum",
        "what to multiply by.",
        "['type'] ['type', 'classes']",
        "True",
    ]


def test_a_broken_plug_in_is_named_and_hurts_no_other_spec(run):
    lines = run("""
        import invflow
        for tag in ("acme.broken", "acme.absent", "acme.number", "acme.scael", "acme.broken"):
            try:
                invflow.build({"input": {"shape": [4]}, "layers": [{"type": tag}]})
            except invflow.SpecError as error:
                print(error)
        print(len(invflow.build({"input": {"shape": [4]}, "layers": [{"type": "acme.scale"}, {"type": "split"}]})))
    """)
    broken = (
        "layers.0: layer type 'acme.broken': the plug-in 'acme_broken:Nothing' of the distribution 'acme-flows' does "
        "not load: RuntimeError: no licence"
    )
    assert lines == [
        broken,
        "layers.0: layer type 'acme.absent': the plug-in 'acme_absent:Scale' of the distribution 'acme-flows' does "
        "not load: ModuleNotFoundError: No module named 'acme_absent'",
        "layers.0: layer type 'acme.number': the plug-in 'acme_number:NUMBER' of the distribution 'acme-flows' does "
        "not load: TypeError: 3 cannot be registered as a layer: it is not a Bijection",
        "layers.0: unknown layer type 'acme.scael'; did you mean 'acme.scale'?",
        broken,
        "acme is loaded",
        "2",
    ]


def test_the_schema_of_everything_installed_leaves_broken_ones_out(run):
    assert run("""
        from invflow.registry import bijections
        from invflow.spec.schema import json_schema
        names = [name for name in json_schema(plug_ins=True)["$defs"] if "acme" in name]
        print(*sorted(names))
        print(*(str(error).partition(":")[0] for error in bijections.load_plug_ins()))
    """) == [
        "acme is loaded",
        "context_net.acme.times head.acme.sum layer.acme.scale net.acme.times",
        "layer type 'acme.absent' layer type 'acme.broken' layer type 'acme.number'",
    ]


def test_a_tag_that_is_built_in_cannot_be_taken_over(run, tmp_path):
    entry_points = tmp_path / "site" / "acme_flows-1.0.dist-info" / "entry_points.txt"
    entry_points.write_text("[invflow.bijections]\npsi = acme_flows:Scale\n")
    assert run("""
        import invflow
        from invflow.registry import bijections
        print(bijections.load_plug_ins(), invflow.registered()["psi"].__module__)
    """) == ["[] invflow.bijections.psi"]


def test_two_packages_that_advertise_one_tag(run, tmp_path):
    other = tmp_path / "site" / "other-2.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 2.0\n")
    (other / "entry_points.txt").write_text("[invflow.bijections]\nacme.scale = acme_flows:Scale\n")
    (message,) = run("""
        import invflow
        try:
            invflow.build({"input": {"shape": [4]}, "layers": [{"type": "acme.scale"}]})
        except invflow.SpecError as error:
            print(error)
    """)
    assert message == (
        "layers.0: layer type 'acme.scale' is advertised by several distributions: 'acme-flows', 'other'; uninstall "
        "all but one"
    )


def test_one_line_tests_the_bijections_of_another_package(run, tmp_path):
    """The package's own test module finds its bijection by entry point; profiles and logs do not interfere."""
    del run  # installs the package
    site = tmp_path / "site"
    (site / "test_acme.py").write_text(
        'from invflow.testing import property_tests\n\ntest_mine = property_tests("acme.scale")\n'
    )
    (site / "conftest.py").write_text(
        "from hypothesis import Phase, settings\n\n"
        'settings.register_profile("few", max_examples=3, phases=[Phase.generate], deadline=1)\n'
        'settings.load_profile("few")\n'
    )
    healthy = _pytest_in(site)
    assert healthy.returncode == 0, healthy.stdout
    assert "1 passed" in healthy.stdout
    (site / "acme_flows.py").write_text(GOOD.replace("return self.inverse(y), -self", "return self.inverse(y), self"))
    planted = _pytest_in(site)
    assert planted.returncode == 1
    assert "BijectionError" in planted.stdout
    assert "DEBUG" not in planted.stdout
    assert "Deadline" not in planted.stdout


def _pytest_in(site):
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(site)]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, timeout=300, check=False)
