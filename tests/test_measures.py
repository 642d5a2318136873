"""Jacobians by rows: whatever the mode of the caller."""

from __future__ import annotations

import pytest
import torch

from invflow.measures import ROWS_OF_A_GRAPH, jacobian, joint_jacobian, slopes_of


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_more_rows_than_a_graph_gives(mode):
    matrix = torch.randn(ROWS_OF_A_GRAPH * 2 + 3, 5, dtype=torch.float64)
    with mode():
        assert torch.equal(slopes_of(lambda x: matrix @ x, torch.randn(5, dtype=torch.float64)), matrix)
        assert torch.equal(jacobian(lambda x: x @ matrix.T, torch.randn(1, 5, dtype=torch.float64)), matrix)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_samples_that_mix(mode):
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    with mode():
        assert joint_jacobian(lambda one: one * one.sum(), x).tolist() == [[4.0, 1.0], [2.0, 5.0]]
