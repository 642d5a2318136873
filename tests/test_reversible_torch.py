"""Constant-memory training beside the rest of PyTorch: hooks, autocast, compilation, several processes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed
from torch import nn

from invflow import Inverse, Sequential
from invflow.bijections import ActNorm, AdditiveCoupling, AffineCoupling, Each, Linear1x1, Merge, Permute, Psi, Split
from invflow.nets import Conv

GRADIENT = 1e-10
"""Relative, float64: inverting loses some units of eps per layer, times the gain of a dozen layers."""
SINGLE = 1e-5
"""Relative, float32: two times its seven digits' rounding of some dozen layers."""
BFLOAT = 2e-2
"""Relative, under autocast to bfloat16, which keeps two digits: plain training is off by as much."""


def conditioner(channels_in=2, channels_out=2, dropout=0.0):
    parts = [nn.Conv2d(channels_in, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*parts, nn.Conv2d(6, channels_out, 3, padding=1))


def make_chain(policy="reversible", dropout=0.0, **options):
    torch.manual_seed(0)
    couplings = [
        AdditiveCoupling(conditioner(dropout=dropout)), AffineCoupling(conditioner(2, 4, dropout)),
        Inverse(AffineCoupling(conditioner(2, 4, dropout))), Inverse(AdditiveCoupling(conditioner(dropout=dropout))),
        AdditiveCoupling(conditioner(dropout=dropout)),
    ]  # fmt: skip
    first = [Psi(2), ActNorm(shape=(4, 3, 3)), Permute(seed=0, shape=(4, 3, 3)), Linear1x1(shape=(4, 3, 3)), Split()]
    return Sequential(*first, *couplings, Merge(), backprop=policy, **options).double()


def images(batch=5):
    return torch.randn(batch, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def flat(tensors):
    return torch.cat([torch.zeros(1) if tensor is None else tensor.flatten() for tensor in tensors])


def gradients(chain, x, run=None):
    """Of the input and of the weights after one step."""
    chain.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = (chain if run is None else run)(x)
    (y.square() * torch.linspace(0.5, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    return flat([x.grad, *(weight.grad for weight in chain.parameters())])


def assert_close(found, right, tolerance=GRADIENT):
    assert (found - right).norm() <= tolerance * right.norm()


def in_both(act, **options):
    """What ``act(chain, x)`` returns under the stored and under the reversible policy."""
    return [act(make_chain(policy, **options), images()) for policy in ("stored", "reversible")]


class TestCaller:
    """What he may do with his tensors, and what he may not."""

    def test_an_output_changed_in_place(self):
        chain = make_chain()[:-1]
        for policy in ("stored", "reversible"):
            chain.backprop = policy
            changed, handed_on = chain(images().requires_grad_())
            with pytest.raises(RuntimeError, match=r"modified by an inplace operation|modified inplace"):
                (changed.sum() + handed_on.mul_(2).sum()).backward()

        def act(chain, x):
            x = x.clone().requires_grad_()
            torch.relu_(chain(x)).sum().backward()  # of a tensor that nobody keeps
            return flat([x.grad, *(weight.grad for weight in chain.parameters())])

        assert_close(*reversed(in_both(act)))

    def test_the_output_of_a_run_changed_in_place(self):
        """Of a chain that ends in a layer which is checkpointed, so that the run before it keeps its output."""
        chain = make_chain()
        chain.reconstruction.anchors.add("layers.9")
        outputs = []
        chain[8].register_forward_hook(lambda layer, _, y: outputs.append(y[0]))
        loss = chain(images().requires_grad_()).sum()
        with torch.no_grad():
            outputs[0].mul_(2)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|modified inplace"):
            loss.backward()

    def test_a_weight_changed_between_forward_and_backward(self):
        for policy in ("stored", "reversible", "checkpoint"):
            chain = make_chain(policy)
            loss = chain(images()).square().sum()
            with torch.no_grad():
                chain[6].net[0].weight.mul_(2)
            if policy == "checkpoint":  # torch's own computes with the new weights, and notices nothing
                continue
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()

    def test_modes_and_statistics_changed_between_forward_and_backward(self):
        def act(chain, x):
            loss = chain(x).square().sum()
            with torch.no_grad():
                chain(x + 1)
            chain.eval()
            loss.backward()
            assert not chain.training
            return flat([*(weight.grad for weight in chain.parameters()), *chain.buffers()])

        assert_close(*reversed(in_both(act, dropout=0.3)))

    def test_a_relu_in_place_before_and_after_cloning_behind(self):
        def act(chain, x):
            x = x.clone().requires_grad_()
            y = chain(torch.relu_(x * 2))
            torch.relu_(y.clone()).sum().backward()
            return flat([x.grad, *(weight.grad for weight in chain.parameters())])

        assert_close(*reversed(in_both(act)))

    def test_the_input_changed_in_place_after_the_forward(self):
        """A repair needs it, so that it is kept as in plain training; without repairs it is not."""
        given = images().requires_grad_() * 1
        y = make_chain()(given)
        given.detach().zero_()
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|modified inplace"):
            y.sum().backward()
        right = gradients(make_chain("stored"), images())
        chain, x = make_chain(monitor="warn"), images().requires_grad_()
        given = x * 1
        y = chain(given)
        given.detach().zero_()  # plain training would complain: it kept it
        (y.square() * torch.linspace(0.5, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
        assert_close(flat([x.grad, *(weight.grad for weight in chain.parameters())]), right)

    def test_in_eval_mode_without_gradients(self):
        chain = make_chain().eval()
        with torch.no_grad():
            quiet = chain(images())
        with torch.inference_mode():
            inferred = chain(images())
        assert not quiet.requires_grad
        assert torch.equal(quiet, inferred)
        assert torch.allclose(quiet, chain(images()))
        assert_close(gradients(chain, images()), gradients(make_chain("stored").eval(), images()))

    def test_no_input_and_no_weight_needs_a_gradient(self):
        chain = make_chain().requires_grad_(False)
        assert not chain(images()).requires_grad
        x = images().requires_grad_()
        chain(x).sum().backward()
        assert x.grad is not None

    def test_channels_last(self):
        def act(chain, x):
            return gradients(
                chain.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
            )

        assert_close(*reversed(in_both(act)))

    def test_an_output_that_is_the_input(self):
        for chain in (Sequential(backprop="reversible"), Sequential(Split(), Merge(), backprop="reversible")):
            x = torch.randn(3, 4, requires_grad=True)
            chain(x).pow(2).sum().backward()
            assert torch.equal(x.grad, 2 * x)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # PyTorch's own use of it
    def test_forward_mode_differentiation(self):
        chain, x = make_chain().eval(), images()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            slope = torch.autograd.forward_ad.unpack_dual(chain(dual)).tangent
        expected = torch.func.jvp(make_chain("stored").eval(), (x,), (torch.ones_like(x),))[1]
        torch.testing.assert_close(slope, expected)

    def test_functional_call_and_gradients_by_func(self):
        def act(chain, x):
            chain.eval()  # torch.func refuses statistics that move
            weights = {name: weight.detach() * 1.5 for name, weight in chain.named_parameters()}
            outside = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
            torch.func.functional_call(chain, outside, (x,)).square().sum().backward()
            by_func = torch.func.grad(lambda w: torch.func.functional_call(chain, w, (x,)).square().sum())(weights)
            assert_close(flat([weight.grad for weight in outside.values()]), flat(by_func.values()))
            return flat(by_func.values())

        assert_close(*reversed(in_both(act)))

    def test_gradients_through_the_inverse(self):
        def act(chain, x):
            chain = chain[::-1][::-1]
            z = chain(x).detach().requires_grad_()
            back, log_det = chain.inverse_and_log_det(z)
            (back.square().sum() + log_det.sum()).backward()
            return flat([z.grad, *(weight.grad for weight in chain.parameters())])

        assert_close(*reversed(in_both(act)))

    @pytest.mark.parametrize("log_det", [False, True])
    def test_the_inverse_keeps_as_little(self, log_det):
        def kept(policy, depth):
            couplings = (AdditiveCoupling(Conv((2, 6, 6), (2, 6, 6), hidden=[8])) for _ in range(depth))
            chain, storages = Sequential(Split(), *couplings, backprop=policy), {}
            weights = {weight.untyped_storage().data_ptr() for weight in chain.parameters()}

            def pack(tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    storages[storage.data_ptr()] = storage.nbytes()
                return tensor

            z = torch.randn(3, 2, 6, 6), torch.randn(3, 2, 6, 6)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                x = chain.inverse_and_log_det(z) if log_det else chain.inverse(z)
            return sum(storages.values()), x

        assert kept("reversible", 32)[0] <= kept("reversible", 4)[0]
        assert kept("stored", 32)[0] > 4 * kept("reversible", 32)[0]


class TestHooks:
    def test_on_a_weight_once(self):
        def act(chain, x):
            chain[6].net[0].weight.register_hook(lambda grad: seen.append(1) or 3 * grad)
            chain[3].log_diagonal.register_post_accumulate_grad_hook(lambda weight: seen.append(2))
            return gradients(chain, x)

        seen: list[int] = []
        assert_close(*reversed(in_both(act)))
        assert sorted(seen) == [1, 1, 2, 2]  # once under each policy

    def test_on_a_weight_when_a_second_backward_is_differentiated(self):
        def act(chain, x):
            chain = chain.eval()
            chain[6].net[0].weight.register_hook(lambda grad: 3 * grad)
            loss = chain(x).pow(3).sum()
            loss.backward(retain_graph=True)
            slopes = torch.autograd.grad(loss, list(chain.parameters()), create_graph=True)
            return flat(torch.autograd.grad(sum(slope.square().sum() for slope in slopes), list(chain.parameters())))

        assert_close(*reversed(in_both(act)))

    def test_on_a_conditioner_at_each_of_its_evaluations(self):
        chain, forwards, backwards = make_chain(), [], []
        chain[6].net.register_forward_hook(lambda *_: forwards.append(1))
        chain[6].net.register_full_backward_hook(lambda *_: backwards.append(1))
        assert_close(gradients(chain, images()), gradients(make_chain("stored"), images()))
        assert (len(forwards), len(backwards)) == (2, 1)  # in forward and again in backward

    def test_a_chain_with_hooks_inside_a_chain_is_called(self):
        inner, seen = make_chain("stored"), []
        outer = Sequential(inner, Psi(3), backprop="reversible")
        inner.register_forward_hook(lambda *_: seen.append(1))
        outer(images()).sum().backward()
        assert len(seen) == 1
        assert len(outer.steps()) == 2

    def test_spectral_normalisation_that_moves_in_every_forward(self):
        """Power iteration moves u and v in train mode; each evaluation in backward has to start where forward did."""

        def act(chain, x):
            for position in (5, 6, 9):
                nn.utils.parametrizations.spectral_norm(chain[position].net[0])
            return flat([gradients(chain, x), *chain.buffers()])

        assert_close(*reversed(in_both(act)))
        assert_close(act(make_chain("checkpoint"), images()), act(make_chain("stored"), images()))


class TestAutocast:
    @pytest.mark.parametrize("policy", ["reversible", "checkpoint"])
    def test_bfloat16(self, policy):
        def act(policy):
            chain = make_chain(policy, dropout=0.2, monitor="raise").float()
            x = images().float().requires_grad_()
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16):
                y, log_det = chain.forward_and_log_det(x)
            (y.float().square().sum() + log_det.float().sum()).backward()
            return flat([x.grad, *(weight.grad for weight in chain.parameters())])

        assert_close(act(policy), act("stored"), BFLOAT)

    def test_backward_within_another_autocast(self):
        chain, right = make_chain().float(), gradients(make_chain("stored").float(), images().float())
        x = images().float().requires_grad_()
        y = chain(x)
        loss = (y.square() * torch.linspace(0.5, 2, y.numel()).reshape(y.shape)).sum()
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
        assert_close(flat([x.grad, *(weight.grad for weight in chain.parameters())]), right, SINGLE)


class TestCompiled:
    @staticmethod
    def chain(policy, dropout):
        """One layer of each kind: what there is to compile takes seconds."""
        whole = make_chain(policy, dropout)
        layers = [whole[0], whole[3], whole[4], whole[6], whole[8], whole[9], whole[10]]
        return Sequential(*layers, backprop=policy)

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_forward_and_backward_in_one_graph_each(self, dropout):
        torch._dynamo.reset()
        chain, plain = self.chain("reversible", dropout), self.chain("stored", dropout)
        found = gradients(chain, images(), torch.compile(chain, fullgraph=True, backend="aot_eager"))
        assert_close(found, gradients(plain, images()))
        assert_close(flat(chain.buffers()).double(), flat(plain.buffers()).double())

    def test_batches_of_every_size_in_one_graph(self):
        torch._dynamo.reset()
        chain = Sequential(Split(), *(AdditiveCoupling(nn.Linear(2, 2)) for _ in range(3)), backprop="reversible")
        run = torch.compile(chain, fullgraph=True, backend="aot_eager", dynamic=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in (3, 7):
                x = torch.randn(batch, 4)
                (found,) = torch.autograd.grad(sum(half.square().sum() for half in run(x)), chain[1].net.weight)
                (right,) = torch.autograd.grad(sum(half.square().sum() for half in chain(x)), chain[1].net.weight)
                assert_close(found, right, SINGLE)

    def test_a_conditioner_that_draws_numbers_by_itself(self):
        torch._dynamo.reset()

        class Noisy(nn.Conv2d):
            def forward(self, x):
                return nn.functional.dropout(super().forward(x), 0.3)

        def act(policy, compiled):
            torch.manual_seed(0)
            chain = Sequential(Split(), *(AdditiveCoupling(Noisy(2, 2, 1)) for _ in range(3)), Merge(), backprop=policy)
            chain, x = chain.double(), torch.randn(4, 4, 3, 3, dtype=torch.float64)
            return gradients(chain, x, torch.compile(chain, fullgraph=True, backend="aot_eager") if compiled else None)

        assert_close(act("reversible", True), act("stored", False))
        assert_close(act("reversible", False), act("stored", False))

    def test_a_deep_graph_keeps_as_little(self):
        def kept(depth, policy):
            torch._dynamo.reset()
            couplings = (AdditiveCoupling(Conv((2, 8, 8), (2, 8, 8), hidden=[8])) for _ in range(depth))
            chain, storages = Sequential(Split(), *couplings, Merge(), backprop=policy), {}
            weights = {weight.untyped_storage().data_ptr() for weight in chain.parameters()}
            run = torch.compile(chain, fullgraph=True, backend="aot_eager")
            run(torch.randn(3, 4, 8, 8)).sum().backward()

            def pack(tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    storages[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                y = run(torch.randn(3, 4, 8, 8))
            return sum(storages.values()), y

        deep = kept(8, "reversible")[0]
        assert deep <= 1.1 * kept(3, "reversible")[0]
        assert kept(8, "stored")[0] > 4 * deep


def train_in_a_process(rank, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/group", rank=rank, world_size=2)
    for policy in ("stored", "reversible", "checkpoint"):
        chain = make_chain(policy, dropout=0.2)
        parallel = nn.parallel.DistributedDataParallel(chain)
        half = images(6)[3 * rank : 3 * rank + 3]
        gradients(chain, half, parallel)
        found = gradients(chain, half, parallel)  # the second step waits for the first one's exchange
        if rank == 0:
            torch.save(found, f"{path}/{policy}.pt")
    del parallel  # it holds the group, whose threads would end with the interpreter
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    """DistributedDataParallel averages the same gradients whatever the policy."""
    torch.multiprocessing.spawn(train_in_a_process, (str(tmp_path),), nprocs=2)
    right = torch.load(tmp_path / "stored.pt")
    for policy in ("reversible", "checkpoint"):
        assert_close(torch.load(tmp_path / f"{policy}.pt"), right)
    alone = gradients(make_chain("stored", dropout=0.2), images(6)[:3])
    assert (alone - right).norm() > 0.1 * right.norm()  # it did average


def test_each_shares_its_layer():
    chain = Sequential(Split(), Each(ActNorm(shape=(2, 3, 3))), Merge(), backprop="reversible").double()
    x = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    plain = copy.deepcopy(chain)
    plain.backprop = "stored"
    assert_close(gradients(chain, x), gradients(plain, x))
