"""Numerics in a spec: where they stand, what is refused, and where."""

from __future__ import annotations

import pytest

import invflow
from invflow import NumericsError, SpecError

COUPLING = '{"type": "additive_coupling", "net": {"type": "mlp"}}'
TEMPLATE = """{
  "input": {"shape": [4]},
  %s
  "layers": [
    {"type": "split"},
    %s,
    {"type": "merge"}
  ]
}
"""


def build(tmp_path, numerics="", layer=COUPLING):
    path = tmp_path / "x.json"
    path.write_text(TEMPLATE % (f'"numerics": {numerics},' if numerics else "", layer))
    return invflow.build(path)


@pytest.mark.parametrize(
    ("numerics", "layer", "place", "message"),
    [
        ('{"mode": "grid"}', '{"type": "affine_coupling", "net": {"type": "mlp"}}', "6:5: layers.1",
         "affine_coupling cannot be grid: its inverse undoes real arithmetic, which is true up to rounding only"),
        ('{"mode": "exact"}', '{"type": "each", "layer": {"type": "actnorm"}}', "6:31: layers.1.layer",
         "actnorm cannot be exact"),
        ('{"mode": "grid"}', '{"type": "sequential", "layers": [{"type": "each", "layer": {"type": "affine"}}]}',
         "6:65: layers.1.layers.0.layer", "affine cannot be grid"),
        ('{"mode": "grid"}', '{"type": "inverse", "layer": {"type": "each", "layer": {"type": "linear_1x1"}}}',
         "6:60: layers.1.layer.layer", "linear_1x1 cannot be grid"),
        ("", '{"type": "sequential", "numerics": {"mode": "grid"}, "layers": [{"type": "affine_coupling", '
             '"net": {"type": "mlp"}}]}', "6:69: layers.1.layers.0", "affine_coupling cannot be grid"),
        ('{"mode": "grid"}', '{"type": "sequential", "numerics": {"mode": "exact"}, "layers": []}',
         "6:40: layers.1.numerics", "set them once, on the outermost chain"),
        ('{"mode": "gird"}', COUPLING, "3:15: numerics", "unknown numerics mode 'gird'; did you mean 'grid'?"),
        ("{}", COUPLING, "3:15: numerics", "numerics needs 'mode'"),
        ('"grid"', COUPLING, "3:15: numerics", 'got "grid"'),
        ('{"mode": "grid", "frac_bits": 53}', COUPLING, "3:45: numerics.frac_bits", "less than or equal to 52"),
        ('{"mode": "grid", "frac_bits": true}', COUPLING, "3:45: numerics.frac_bits", "integer"),
        ('{"mode": "grid", "frac_bits": -1}', COUPLING, "3:45: numerics.frac_bits", "greater than or equal to 0"),
        ('{"mode": "snap", "entry": "snap"}', COUPLING, "3:32: numerics.entry", "unknown key 'entry'"),
        ('{"mode": "exact", "activation_bits": 17}', COUPLING, "3:52: numerics.activation_bits", "16"),
        ('{"mode": "grid", "conditioner_dtype": "float16"}', COUPLING, "3:53: numerics.conditioner_dtype", "float64"),
    ],
)  # fmt: skip
def test_a_fault_is_refused_at_its_line(tmp_path, numerics, layer, place, message):
    with pytest.raises(SpecError) as raised:
        build(tmp_path, numerics, layer)
    assert f"x.json:{place}" in str(raised.value), str(raised.value)
    assert message in str(raised.value)


def hash_of(numerics=None, layers=()):
    document = {"input": {"shape": [4]}, "layers": list(layers)}
    return invflow.load_spec(document if numerics is None else {**document, "numerics": numerics}).hash


def test_numerics_decide_the_function_and_defaults_do_not():
    assert hash_of({"mode": "float"}) == hash_of()
    assert hash_of({"mode": "grid", "frac_bits": 16, "entry": "check"}) == hash_of({"mode": "grid"})
    different = [None, {"mode": "grid"}, {"mode": "exact"}, {"mode": "snap"}, {"mode": "grid", "frac_bits": 8}]
    assert len({hash_of(one) for one in different}) == len(different)
    inner = {"type": "sequential", "layers": []}
    assert hash_of(layers=[inner]) == hash_of(layers=[{**inner, "numerics": {"mode": "float"}}])
    assert hash_of(layers=[inner]) != hash_of(layers=[{**inner, "numerics": {"mode": "grid"}}])


@pytest.mark.parametrize("mode", ["float", "snap", "grid", "exact"])
def test_a_chain_says_what_it_was_built_with(tmp_path, mode):
    chain = build(tmp_path, f'{{"mode": "{mode}", "frac_bits": 4}}' if mode != "float" else '{"mode": "float"}')
    document = invflow.to_spec(chain)
    assert invflow.build(document).numerics == chain.numerics
    assert chain.exactness == (mode if mode in ("grid", "exact") else "float")
    inner = {"input": {"shape": [4]}, "layers": [{"type": "sequential", **{k: document[k] for k in ("layers",)}}]}
    if mode != "float":
        inner["layers"][0]["numerics"] = document["numerics"]
    again = invflow.build(inner)
    assert again[0].numerics == chain.numerics
    assert invflow.load_spec(invflow.to_spec(again)).hash == invflow.load_spec(inner).hash


def test_a_chain_inside_takes_part(tmp_path):
    layer = f'{{"type": "sequential", "layers": [{COUPLING}, {COUPLING}]}}'
    chain = build(tmp_path, '{"mode": "grid"}', layer)
    assert {part.exactness for part in chain[1]} == {"grid"}
    assert "numerics" not in invflow.to_spec(chain)["layers"][1]


def test_an_unregistered_bijection_is_float_by_default():
    class Mine(invflow.Bijection):
        volume_preserving = True  # which is not so, and is of no interest here

        def forward(self, x, context=None):
            return 3 * x

        def inverse(self, y, context=None):
            return y / 3

    with pytest.raises(NumericsError, match="layer 0 of 1: Mine cannot be exact: its inverse undoes real arithmetic"):
        invflow.Sequential(Mine(), numerics={"mode": "exact"})
