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
