"""The gradients of what depends on a context, and of its entries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from invflow.context import each_entry

from .documents import BATCH, CONV, EVERYTHING, a_context, an_x, coupling, document, model_of

GRADIENTS = 1e-10
"""Of the largest gradient: the promise for float64."""


def gradients(model, context, run=None):
    """Those of every weight and of every entry of the context, by name."""
    model.zero_grad()
    given = each_entry(lambda entry: entry.clone().requires_grad_(), context)
    (model if run is None else run)(an_x(len(context["class"])), given).sum().backward()
    of_weights = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return of_weights | {f"context {name}": entry.grad for name, entry in given.items()}


def assert_alike(found, right):
    assert found.keys() == right.keys()
    for name, gradient in right.items():
        scale = gradient.abs().max().clamp(min=1)
        assert (found[name] - gradient).abs().max() <= GRADIENTS * scale, name
        assert gradient.abs().max() > 0, name  # each matters


class TestGradients:
    @pytest.mark.parametrize("policy", ["reversible", "checkpoint"])
    def test_are_those_of_plain_training(self, policy):
        model = model_of(EVERYTHING)
        right = gradients(model, a_context())
        assert sum(name.startswith("context_net") for name in right) == 5
        model.bijection.backprop = policy
        assert_alike(gradients(model, a_context()), right)

    @pytest.mark.parametrize("policy", ["reversible", "checkpoint"])
    def test_are_right_backwards_too(self, policy):
        model, context = model_of(EVERYTHING), a_context()

        def inverted():
            given = each_entry(lambda entry: entry.clone().requires_grad_(), context)
            model.zero_grad()
            model.inverse(an_x(), given).square().sum().backward()
            return {name: entry.grad for name, entry in given.items()}

        right = inverted()
        model.bijection.backprop = policy
        assert_alike(inverted(), right)

    def test_of_an_entry_under_two_names_are_those_of_both(self):
        shapes = {"a": [2], "b": [2]}
        spec = {**document(), "input": {"shape": [4, 4, 4], "context_shape": shapes}}
        model, row = model_of(spec), torch.randn(BATCH, 2, dtype=torch.float64)

        def gradient(policy, differentiable):
            model.bijection.backprop = policy
            one = row.clone().requires_grad_()
            total = model(an_x(), {"a": one, "b": one}).sum()
            (found,) = torch.autograd.grad(total, one, create_graph=differentiable)
            return found.detach()

        for differentiable in (False, True):
            found, right = (gradient(policy, differentiable) for policy in ("reversible", "stored"))
            assert (found - right).abs().max() < GRADIENTS

    def test_of_second_order(self):
        model, context = model_of(EVERYTHING), a_context(2)

        def second(policy):
            model.bijection.backprop = policy
            given = each_entry(lambda entry: entry.clone().requires_grad_(), context)
            total = model(an_x(2), given).sum()
            first = torch.autograd.grad(total, list(given.values()), create_graph=True)
            norm = sum(gradient.square().sum() for gradient in first)
            return dict(zip(given, torch.autograd.grad(norm, list(given.values())), strict=True))

        assert_alike(second("reversible"), second("stored"))

    @pytest.mark.parametrize("policy", ["stored", "reversible", "checkpoint"])
    def test_compiled(self, policy):
        linear = {"type": "mlp", "context": "image", "out_shape": [2]}
        layers = [coupling(context="class"), coupling(context=["image", "size"], net={**CONV, "context": "image"})]
        model = model_of(document([*layers, coupling(context="size")], context_net={"image": linear}))
        right = gradients(model, a_context())
        model.bijection.backprop = policy
        assert_alike(
            gradients(model, a_context(), torch.compile(model, fullgraph=policy != "checkpoint", backend="aot_eager")),
            right,
        )


def train_in_a_process(rank, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/group", rank=rank, world_size=2)
    for policy in ("stored", "reversible", "checkpoint"):
        model = model_of(EVERYTHING)
        model.bijection.backprop = policy
        parallel = nn.parallel.DistributedDataParallel(model)
        half = each_entry(lambda entry: entry[3 * rank : 3 * rank + 3], a_context(6))
        given = each_entry(lambda entry: entry.clone().requires_grad_(), half)
        parallel(an_x(6)[3 * rank : 3 * rank + 3], given).sum().backward()
        if rank == 0:
            torch.save({name: weight.grad for name, weight in model.named_parameters()}, f"{path}/{policy}.pt")
    del parallel  # it holds the group, whose threads would end with the interpreter
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_gradients_in_two_processes_are_the_mean(tmp_path):
    torch.multiprocessing.spawn(train_in_a_process, (str(tmp_path),), nprocs=2)
    both = gradients(model_of(EVERYTHING), a_context(6))
    right = {name: gradient / 2 for name, gradient in both.items() if not name.startswith("context ")}
    for policy in ("stored", "reversible", "checkpoint"):
        assert_alike(torch.load(tmp_path / f"{policy}.pt"), right)
