"""``invflow check --thorough`` of a sound spec, of a broken layer, and of a layer that loses precision."""

from __future__ import annotations

import json

import pytest
import torch

import invflow
from invflow import Bijection, Sequential
from invflow.bijections import Affine, Permute
from invflow.cli import main
from invflow.testing.thorough import check_thoroughly

SHAPE = (4,)
SPEC = {"input": {"shape": list(SHAPE)}, "layers": [{"type": "affine"}, {"type": "permute", "seed": 1}]}


class Lossy(Bijection):
    """Scales by a thousandth and shifts by a thousand, which loses three digits."""

    def forward(self, x, context=None):
        return 1e-3 * x + 1e3

    def inverse(self, y, context=None):
        return (y - 1e3) * 1e3

    def forward_and_log_det(self, x, context=None):
        return self(x), x.new_full(x.shape[:1], x[:1].numel() and -4 * 6.907755278982137)

    def inverse_and_log_det(self, y, context=None):
        return self.inverse(y), y.new_full(y.shape[:1], 4 * 6.907755278982137)


class Broken(Permute):
    def inverse(self, y, context=None):
        return y


def declared(*layers):
    chain = Sequential(*layers)
    chain.declared_shape = SHAPE
    return chain


@pytest.fixture
def check(capsys, monkeypatch, tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(SPEC))

    def run(*options):
        with pytest.raises(SystemExit) as ended:
            main(["check", str(path), "--thorough", *options])
        return ended.value.code, capsys.readouterr().out

    return run


def test_a_sound_spec_passes(check):
    status, out = check("--json")
    answer = json.loads(out)["thorough"]
    assert status == 0
    assert answer["ok"]
    assert [layer["failures"] for layer in [*answer["layers"], answer["chain"]]] == [[], [], []]
    assert answer["chain"]["worst"]["log det"] <= 1e-10
    assert answer["error_by_depth"][-1] == 0
    assert len(answer["error_by_depth"]) == 3


def test_a_broken_layer_fails_by_name_of_its_property(check, monkeypatch):
    chain = declared(Affine(SHAPE), Broken(order=[1, 2, 3, 0]))
    monkeypatch.setattr("invflow.diagnostics.check.chain_of", lambda source: chain)
    status, out = check()
    assert status == 1
    assert "1: Broken" in out
    assert "round trip: inverse(forward(x)) is x" in out
    assert "smallest failing input" in out


def test_the_layer_that_loses_precision_is_named(check, monkeypatch):
    chain = declared(Affine(SHAPE), Permute(order=[1, 2, 3, 0]), Lossy(), Affine(SHAPE))
    found = check_thoroughly(chain)
    assert found.lost_at == 2
    assert max(found.error_by_depth[3:]) < 1e-15 < found.error_by_depth[2]
    monkeypatch.setattr("invflow.diagnostics.check.chain_of", lambda source: chain)
    assert "most precision is lost at layer 2, Lossy()" in check()[1]


def test_properties_that_need_too_large_a_jacobian_are_named(monkeypatch):
    monkeypatch.setattr("invflow.testing.properties.base.LARGEST_JACOBIAN", 3)
    found = check_thoroughly(declared(Affine(SHAPE)))
    assert found.ok
    assert found.layers[0].unmeasured == ["log det", "inverse log det", "log det everywhere", "vmap"]


def test_the_callers_chain_is_left_as_it_was():
    chain = invflow.build(SPEC).train()
    before = {key: value.clone() for key, value in chain.state_dict().items()}
    check_thoroughly(chain)
    assert chain.training
    assert all(torch.equal(value, before[key]) for key, value in chain.state_dict().items())
