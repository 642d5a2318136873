"""The checker itself: what it leaves unchanged, how its findings read, and the arguments that describe a bijection."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from invflow import Bijection
from invflow.bijections import ActNorm, AffineCoupling, Psi
from invflow.diagnostics.rounding import condition_number
from invflow.nets import MLP
from invflow.state import zeros
from invflow.testing import BijectionError, check_bijection, from_callables
from invflow.testing.properties import PROPERTIES
from invflow.testing.trial import Subject
from tests.testing.faults.base import PAIR, VECTOR, Scale
from tests.testing.faults.inverses import OtherPermutation
from tests.testing.faults.modules import Raises

QUICK = {"examples": 3, "skip": ["compiles"]}


class Logit(Bijection):
    domain = "unit"

    def forward(self, x, context=None):
        return torch.log(x) - torch.log1p(-x)

    def inverse(self, y, context=None):
        return torch.sigmoid(y)

    def forward_and_log_det(self, x, context=None):
        return self(x), -(torch.log(x) + torch.log1p(-x)).flatten(1).sum(1)

    def inverse_and_log_det(self, y, context=None):
        x = self.inverse(y)
        log_det = (torch.nn.functional.logsigmoid(y) + torch.nn.functional.logsigmoid(-y)).flatten(1).sum(1)
        return x, log_det


def a_hook(module, inputs, output):
    """Pickles, unlike a lambda."""


def test_the_callers_module_and_generators_are_left_as_they_were():
    module = AffineCoupling(MLP((2,), (6,), hidden=[3], norm="batch")).half().train()
    module.net.eval()
    module.register_forward_hook(a_hook)
    hooks = list(module._forward_hooks)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = (torch.rand(3), random.random(), np.random.rand())
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    check_bijection(module, PAIR, **QUICK)
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]
    assert module.training
    assert not module.net.training
    assert list(module._forward_hooks) == hooks
    after = module.state_dict()
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    assert all(weight.grad is None for weight in module.parameters())


def test_a_failure_reads_like_one():
    with pytest.raises(AssertionError) as raised:
        check_bijection(OtherPermutation(), VECTOR, seed=7, **QUICK)
    text = str(raised.value)
    assert "is not a sound bijection (seed 7)" in text
    assert "round trip: inverse(forward(x)) is x" in text
    assert ", allowed 0" in text
    assert "smallest failing input: torch.tensor([[" in text
    failing = raised.value.report["round trip"].input
    assert failing.shape == (1, 4), "one sample is enough"
    assert int((failing != 0).sum()) <= 2, "one or two numbers off zero show the fault"


def test_the_smallest_failing_input_fails():
    with pytest.raises(BijectionError) as raised:
        check_bijection(OtherPermutation(), VECTOR, **QUICK)
    x = raised.value.report["round trip"].input
    permute = OtherPermutation()
    assert not torch.equal(permute.inverse(permute(x)), x)


def test_what_the_bijection_raises_is_a_finding_and_the_cause():
    with pytest.raises(AssertionError, match=r"round trip: .*\n  raised RuntimeError: singular matrix") as raised:
        check_bijection(Raises(), VECTOR, **QUICK)
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_the_same_seed_finds_the_same():
    first, second = (check_bijection(Scale(), VECTOR, seed=3, **QUICK) for _ in range(2))
    assert first == second
    assert "round trip" in str(first)


def test_a_domain_declared_by_the_class_or_the_caller():
    check_bijection(Logit(), (3,), skip=["compiles"])
    check_bijection(Logit(), (3,), domain=(0.25, 0.75), **QUICK)
    with pytest.raises(AssertionError):
        check_bijection(Logit(), (3,), domain="reals", **QUICK)
    with pytest.raises(ValueError, match="unknown domain 'torus'"):
        check_bijection(Logit(), (3,), domain="torus", **QUICK)
    with pytest.raises(ValueError, match="low < high"):
        check_bijection(Logit(), (3,), domain=(1.0, 0.0), **QUICK)


def test_properties_are_chosen_by_name():
    report = check_bijection(Scale(), VECTOR, only=["round trip", "log det"])
    assert [finding.name for finding in report.findings] == ["round trip", "log det"]
    with pytest.raises(ValueError, match="unknown properties \\['log dte'\\]"):
        check_bijection(Scale(), VECTOR, only=["log dte"])


def test_every_property_that_is_defined_is_checked():
    names = [prop.name for prop in PROPERTIES]
    assert len(set(names)) == len(names) == 36
    assert names[0] == "round trip"
    assert names[-1] == "compiles"


def test_weights_that_hide_a_fault_are_moved():
    class WrongOnceTrained(ActNorm):
        def inverse(self, y, context=None):
            return y

    sound_at_first = WrongOnceTrained(VECTOR)
    check_bijection(sound_at_first, VECTOR, perturb=False, only=["round trip"])
    with pytest.raises(AssertionError):
        check_bijection(sound_at_first, VECTOR, only=["round trip"])


def test_layers_of_others():
    layer = torch.nn.Linear(3, 3)

    def forward(held, x):
        return held(x)

    def inverse(held, y):
        return torch.linalg.solve(held.weight, (y - held.bias).T).T

    def log_det(held, x):
        return torch.linalg.slogdet(held.weight).logabsdet.expand(len(x))

    def minus_log_det(held, y):
        return -log_det(held, y)

    sound = from_callables(forward, inverse, forward_log_det=log_det, inverse_log_det=minus_log_det, module=layer)
    # No round trip: the condition number bounds the rounding errors of LU without refinement only roughly.
    check_bijection(sound, (3,), only=["log det", "inverse log det", "gradients"])
    wrong = from_callables(forward, inverse, forward_log_det=log_det, inverse_log_det=log_det, module=layer)
    with pytest.raises(AssertionError, match="inverse log det"):
        check_bijection(wrong, (3,), only=["log det", "inverse log det", "gradients"])
    without = from_callables(forward, inverse, module=layer)
    names = [finding.name for finding in check_bijection(without, (3,), only=["log det", "shapes"]).findings]
    assert names == ["shapes"], "nothing is known about its log-determinant"


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_the_condition_number_of_a_scaling_is_its_factor(factor):
    class Scaling(Scale):
        def forward(self, x, context=None):
            return x * factor

    assert condition_number(Scaling(), torch.ones(2, 4, dtype=torch.float64)) == pytest.approx(max(factor, 1 / factor))


def test_a_subject_draws_the_same_trial_twice():
    from invflow.testing.trial import Setting

    first, second = (Subject(Psi(2), (1, 4, 4)).trial(Setting(seed=5)) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert not torch.equal(first.x, zeros((1, 4, 4), 3, dtype=torch.float64))
