"""Old documents are migrated step by step, new ones refused."""

from __future__ import annotations

import copy

import pytest

from invflow import SpecError, load_spec
from invflow.spec.text import Source
from invflow.spec.versions import MIGRATIONS, SPEC_VERSION, migrate


def renamed(data):
    return {("layers" if key == "chain" else key): value for key, value in data.items()}


def doubled(data):
    return {**data, "layers": data["layers"] * 2}


def test_migrations_run_in_order_and_leave_the_source_alone():
    document = {"chain": [1], "name": "old"}
    before = copy.deepcopy(document)
    migrated = migrate(Source(document), {1: renamed, 2: doubled}, current=3)
    assert migrated.data == {"layers": [1, 1], "name": "old", "spec_version": 3}
    assert document == before


def test_only_the_missing_steps_run():
    assert migrate(Source({"spec_version": 2, "layers": [1]}), {1: renamed, 2: doubled}, 3).data["layers"] == [1, 1]
    assert migrate(Source({"spec_version": 3, "layers": [1]}), {1: renamed, 2: doubled}, 3).data["layers"] == [1]


def test_there_is_a_migration_from_every_older_version():
    assert set(MIGRATIONS) == set(range(1, SPEC_VERSION))


@pytest.mark.parametrize("version", [0, -1, "1", 1.5, True, None])
def test_a_version_that_is_none(version):
    with pytest.raises(SpecError, match="spec_version: input should be"):
        load_spec({"spec_version": version, "input": {"shape": [2]}, "layers": []})


def test_a_newer_version_says_what_to_do():
    with pytest.raises(SpecError, match=f"newer than this invflow reads .up to {SPEC_VERSION}.; upgrade invflow"):
        migrate(Source({"spec_version": SPEC_VERSION + 1}))


class TestEstimators:
    """Version 2 nests what version 1 had in five fields of a residual block."""

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ({}, {}),
            ({"log_det": "exact"}, {"log_det": {"type": "exact"}}),
            ({"probes": 2}, {"log_det": {"type": "auto", "probes": 2}}),
            ({"log_det": "exact", "probes": 2}, {"log_det": {"type": "exact"}}),
            ({"log_det": "roulette", "terms": 3}, {"log_det": {"type": "roulette", "terms": 3}}),
            ({"log_det": "power_series", "continuation": 0.9}, {"log_det": {"type": "power_series"}}),
            ({"log_det": {"$var": "how"}}, {"log_det": {"type": {"$var": "how"}}}),
        ],
    )
    def test_what_becomes_of_them(self, old, new):
        def documents(fields):
            block = {"type": "residual", **fields}
            inner = {"type": "inverse", "layer": {"type": "sequential", "layers": [block]}}
            more = {"kept": block} if "$var" not in str(block) else {}
            top = {"vars": {"how": "exact", **more}, "input": {"shape": [3]}}
            again = [{"$var": "kept"}] if more else []
            return {**top, "layers": [block, {"type": "repeat", "times": 2, "layers": [inner, *again]}]}

        migrated = migrate(Source({"spec_version": 1, **documents(old)})).data
        assert migrated == {"spec_version": 2, **documents(new)}
        assert load_spec({"spec_version": 1, **documents(old)}).hash == load_spec(documents(new)).hash

    def test_a_document_that_declares_no_version(self):
        def document(**fields):
            return {"input": {"shape": [3]}, "layers": [{"type": "residual", **fields}]}

        assert load_spec(document(log_det="exact")).hash == load_spec(document(log_det={"type": "exact"})).hash
        with pytest.raises(SpecError, match=r"log_det.probes: input should be greater than 0"):
            load_spec(document(log_det={"type": "auto", "probes": 0}))
        with pytest.raises(SpecError, match=r"layers.0.log_det"):
            load_spec({"spec_version": 2, **document(log_det="exact")})
        with pytest.raises(SpecError, match=r"layers.0: unknown layer type 'residul'"):
            load_spec({"input": {"shape": [3]}, "layers": [{"type": "residul", "probes": 2}]})
