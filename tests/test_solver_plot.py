"""The plot of solvers shows the error of the inverse after each evaluation."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import invflow
from invflow.diagnostics.check import UNTRAINED
from invflow.diagnostics.solver_plot import inverse_errors, solver_plot

FLOOR = 1e-15
"""A few roundings of float64, to which both methods converge."""


def chain(coefficient=0.5):
    torch.manual_seed(0)
    return invflow.build(
        {
            "input": {"shape": [3]},
            "layers": [
                {"type": "actnorm"},
                {"type": "residual", "coefficient": coefficient},
                {"type": "sequential", "layers": [{"type": "residual", "coefficient": coefficient}]},
            ],
        }
    )


def test_every_block_is_found_and_converges():
    blocks = inverse_errors(chain(), torch.randn(6, 3))
    assert [block.layer for block in blocks] == [1, 2]
    for block in blocks:
        for errors in block.errors.values():
            assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
            assert errors[-1] <= FLOOR


@pytest.mark.parametrize("coefficient", [0.5, 0.9])
def test_picards_error_falls_by_the_coefficient_at_least(coefficient):
    """Picard starts at y, so that the first error is at most c |x|; each step reduces it by the factor c."""
    for block in inverse_errors(chain(coefficient), torch.randn(6, 3)):
        for k, error in enumerate(block.errors["picard"], start=1):
            # x_0 = y: |y - x| = |g(x)| and g(0) is not 0, so the bound is a multiple of the first error.
            assert error <= max(block.errors["picard"][0] * coefficient ** (k - 1) * (1 + 1e-9), FLOOR)


def test_a_linear_block_has_the_error_of_its_matrix():
    """y = x + c A x with an orthogonal A: after k evaluations Picard's error is exactly c^k."""
    c = 0.5
    layer = invflow.build(
        {
            "input": {"shape": [4]},
            "layers": [{"type": "residual", "coefficient": c, "net": {"type": "lipschitz_mlp", "hidden": []}}],
        }
    )
    with torch.no_grad():
        (linear,) = layer[0].net.maps
        linear.weight.copy_(torch.linalg.qr(torch.randn(4, 4))[0])
        linear.bias.zero_()
    (block,) = inverse_errors(layer, torch.randn(5, 4))
    expected = [c**k for k in range(1, 11)]
    assert block.errors["picard"][:10] == pytest.approx(expected, rel=1e-4)  # the norm of A is an estimate


def test_the_picture_has_a_line_for_each_block_and_method(tmp_path):
    blocks = inverse_errors(chain(), torch.randn(6, 3))
    (axis,) = solver_plot(blocks).axes
    lines = [line for line in axis.lines if len(line.get_xdata()) > 2]
    assert len(lines) == 4
    assert lines[0].get_ydata()[0] == pytest.approx(blocks[0].errors["anderson"][0])
    labels = [text.get_text().split(":")[0] for text in axis.get_legend().get_texts()]
    assert sorted(labels) == ["Anderson", "Picard"]
    assert len({line.get_linestyle() for line in lines}) == 2, "grey tells the methods apart, too"
    assert "random weights" not in axis.get_title()
    assert "random weights" in solver_plot(blocks, trained=False).axes[0].get_title()
    with pytest.raises(invflow.InvflowError, match="at least one residual block"):
        solver_plot([])


def test_the_verb_draws_it(tmp_path, monkeypatch, capsys):
    from invflow.cli import main

    monkeypatch.chdir(tmp_path)
    spec = {"input": {"shape": [3]}, "layers": [{"type": "residual"}]}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    (tmp_path / "none.json").write_text(json.dumps({**spec, "layers": [{"type": "affine"}]}))
    with pytest.raises(SystemExit) as ended:
        main(["plot-solver", "spec.json"])
    assert ended.value.code == 0
    assert (tmp_path / "solver.png").is_file()
    assert capsys.readouterr().out.splitlines() == [UNTRAINED, "wrote solver.png"]
    with pytest.raises(SystemExit) as ended:
        main(["plot-solver", "none.json"])
    assert ended.value.code == 2
    assert "expects a spec with a residual layer" in capsys.readouterr().err
