"""Repair: gradients of a reconstruction that is wrong are computed again before they leave backward."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import torch.distributed.nn
from torch import nn

from invflow import Sequential
from invflow._torch import DispatchMode
from invflow.bijections import AdditiveCoupling, AffineCoupling, Each, Merge, Split
from invflow.errors import ReconstructionWarning
from tests.test_reversible_monitor import (
    GRADIENT,
    READERS,
    Unsound,
    chain_of,
    couplings,
    faint,
    gradients,
    images,
    normalised,
)


class Scaled(nn.Module):
    """A conditioner whose output is scaled and shifted."""

    def __init__(self, gain=1.0, bias=0.0):
        super().__init__()
        self.conv, self.gain, self.bias = nn.Conv2d(8, 8, 3, padding=1), gain, bias

    def forward(self, x):
        return self.gain * self.conv(x) + self.bias


class Alive(DispatchMode):
    """The largest number of bytes of tensors that were made inside and were alive at the same time."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        results = made if isinstance(made, tuple | list) else [made]
        for storage in (one.untyped_storage() for one in results if isinstance(one, torch.Tensor)):
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.end, storage._cdata)
        return made

    def end(self, storage):
        self.alive -= self.sizes.pop(storage, 0)


class TestRepair:
    """No wrong gradient leaves backward, and nobody is told: warnings are errors."""

    @staticmethod
    def assert_right(chain, x, act=None, steps=3, lost=GRADIENT):
        """At each of some steps, from the first one on; something was wrong."""
        act = act or (lambda chain, x: chain(x).square().mean())
        found = []
        for one in (chain, copy.deepcopy(chain)):
            one.backprop = "reversible" if one is chain else "stored"
            for _ in range(steps):
                one.zero_grad()
                given = x.clone().requires_grad_()
                torch.manual_seed(5)
                act(one, given).backward()
                leaves = (given, *one.parameters())
                found.append(torch.cat([leaf.grad.flatten().double() for leaf in leaves]))
            found.append(torch.cat([torch.zeros(1), *(buffer.flatten().double() for buffer in one.buffers())]))
        for own, right in zip(found[: steps + 1], found[steps + 1 :], strict=True):
            assert (own - right).norm() <= lost * right.norm()
        assert chain.reconstruction.anchors

    @pytest.mark.parametrize("reader", READERS)
    def test_faint_channels(self, reader):
        self.assert_right(couplings(READERS[reader], monitor="repair"), faint())

    def test_dropout_and_moving_statistics(self):
        make = lambda: nn.Sequential(nn.Dropout(0.3), normalised(), nn.Dropout(0.2))  # noqa: E731
        self.assert_right(couplings(make, monitor="repair"), faint())

    @pytest.mark.parametrize(("depth", "net"), [(32, {"gain": 2.0}), (64, {"bias": 100.0})])
    def test_gains_and_biases(self, depth, net):
        # The tolerance itself bounds what accumulates up to the first layer that is kept.
        self.assert_right(couplings(lambda: Scaled(**net), depth, monitor="repair"), images(), lost=7e-5)

    def test_log_determinants_and_context(self):
        class Conditioned(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, padding=1)

            def forward(self, x, context):
                return self.conv(self.norm(x).relu()) + context[:, :1, None, None]

        torch.manual_seed(1)
        layers = (AffineCoupling(Conditioned()) for _ in range(6))
        chain = Sequential(Split(), *layers, Merge(), backprop="reversible")

        def act(chain, x):
            y, log_det = chain.forward_and_log_det(x, x[:, :3, 0, 0])
            return y.square().mean() + log_det.mean()

        self.assert_right(chain, faint(), act)

    def test_nested_chains_each_and_shared_layers(self):
        torch.manual_seed(1)
        shared = AdditiveCoupling(normalised(4))
        inner = Sequential(Split(), shared, AdditiveCoupling(normalised(4)), shared, Merge())
        chain = Sequential(Split(), Each(inner), *chain_of(4, "repair")[1:-1], Each(inner), Merge())
        x = images()
        x[:, [3, 5, 9, 13]] *= 1e-7
        self.assert_right(chain, x)

    def test_hooks_fire_once(self):
        chain = couplings(normalised, monitor="repair")
        chain[2].net[2].weight.register_hook(lambda grad: seen.append(1) or 3 * grad)
        seen: list[int] = []
        chain(faint()).square().mean().backward()
        assert chain.reconstruction.anchors
        assert len(seen) == 1

    def test_no_more_than_the_part_where_it_began(self):
        chain, calls = couplings(normalised, 12, monitor="repair"), []
        for position, coupling in enumerate(list(chain)[1:-1]):
            coupling.net.register_forward_hook(lambda *_, position=position: calls.append(position))
        chain(faint()).square().mean().backward()
        (name,) = chain.reconstruction.anchors
        wrong = int(name.split(".")[1]) - 1
        assert 0 < wrong < 3
        # Forward, backward, and the last of four parts again; the last layer keeps its activations.
        assert calls == [*range(12), *range(10, -1, -1), *range(wrong), *range(2, -1, -1)]

    @pytest.mark.parametrize("position", [1, 4, 8, 11])
    def test_a_fault_in_any_part(self, position):
        layers = list(couplings(READERS["a ReLU"], 12))
        chain = Sequential(*layers[:position], Each(Unsound()), *layers[position:], monitor="repair")
        self.assert_right(chain, images())

    def test_memory_is_at_most_that_of_checkpoint(self):
        """If the last layer is wrong, the inputs of all layers are held."""
        layers, x = list(couplings(READERS["a ReLU"], 32)), torch.randn(16, 16, 16, 16)
        chain = Sequential(*layers[:32], Each(Unsound()), *layers[32:], monitor="repair")
        repaired, peaks = chain.reconstruction.anchors, {}
        for chain.backprop in ("reversible", "checkpoint"):
            chain.zero_grad()
            with Alive() as alive:
                chain(x.clone().requires_grad_()).square().mean().backward()
            peaks[chain.backprop] = alive.peak
        assert repaired
        assert peaks["reversible"] <= 1.05 * peaks["checkpoint"]

    def test_two_backwards_of_one_forward(self):
        chain = couplings(normalised, monitor="repair")
        right = gradients(chain, faint(), "stored")
        x = faint().requires_grad_()
        loss = chain(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        found = torch.cat([leaf.grad.flatten().double() for leaf in (x, *chain.parameters())])
        assert (found - 2 * right).norm() <= GRADIENT * right.norm()

    def test_a_gradient_that_is_differentiated_warns(self):
        chain, x = couplings(normalised, monitor="repair"), faint().requires_grad_()
        with pytest.warns(ReconstructionWarning, match="from now on this input is kept"):
            torch.autograd.grad(chain(x).square().mean(), x, create_graph=True)

    def test_healthy_nets_are_not_repaired(self):
        chain = couplings(lambda: nn.Sequential(normalised(), nn.Dropout(0.1)), depth=64, monitor="repair")
        x = images()
        x[:, 1], x[:, 9] = 3.7, 0.0
        x[:, 2] = (torch.arange(8) == 3)[:, None, None] * 1.0
        for _ in range(3):
            chain(x).square().mean().backward()
        assert chain.reconstruction.anchors == set()


def repair_in_a_process(rank, path):
    """Only one process has faint channels."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/group", rank=rank, world_size=2)

    class Synchronised(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = normalised()

        def forward(self, x):
            mean = torch.distributed.nn.functional.all_reduce(x.mean()) / 2
            return self.net(x - mean)

    found = []
    for policy in ("stored", "reversible"):
        chain = couplings(Synchronised, monitor="repair")
        chain.backprop = policy
        chain(images() if rank else faint()).square().mean().backward()
        found.append(torch.cat([weight.grad.flatten().double() for weight in chain.parameters()]))
    torch.save((found, chain.reconstruction.anchors), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_that_communicate_repair_together(tmp_path):
    torch.multiprocessing.spawn(repair_in_a_process, (str(tmp_path),), nprocs=2)
    (first, anchors), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert anchors == others != set()
    for right, found in (first, second):
        assert (found - right).norm() <= GRADIENT * right.norm()
