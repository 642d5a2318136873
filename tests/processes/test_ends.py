"""How a training by several processes ends, and goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import invflow

from . import trainings

ENDED = 60.0
"""The seconds within which all have ended."""


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(condition, seconds):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.1)
    assert condition()


@pytest.fixture
def started(tmp_path):
    """A training of two processes that has saved its state; its folder, the process that leads, the other, its log."""
    (tmp_path / "spec.json").write_text(json.dumps(trainings.flow_of_points(steps=100_000, optimizer={"type": "adam"})))
    command = [sys.executable, "-m", "invflow", "train", "spec.json", "--out", "run", "--devices", "2"]
    log = tmp_path / "log"
    with log.open("w") as output:
        leader = subprocess.Popen(
            [*command, "--save-every", "10"],
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        wait_for((tmp_path / "run" / "resume" / "last.ckpt").exists, 120)
        yield tmp_path / "run", leader, children_of(leader.pid)[-1], log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes below /proc")
class TestEnds:
    @pytest.mark.parametrize("leads", [False, True])
    def test_one_is_killed(self, started, leads):
        folder, leader, other, log = started
        os.kill(leader.pid if leads else other, signal.SIGKILL)
        wait_for(lambda: not running(other) and leader.poll() is not None, ENDED)
        said = [line for line in log.read_text().replace("\r", "\n").splitlines() if "invflow:" in line]
        assert len(said) == 1
        assert "another of the 2 processes of this training ended" in said[0]
        assert "--resume" in said[0]
        assert "Traceback" not in log.read_text()
        self.goes_on(folder, devices=1)

    def test_a_signal_to_one_ends_both_after_they_saved(self, started):
        folder, leader, other, log = started
        os.kill(other, signal.SIGTERM)
        wait_for(lambda: not running(other) and leader.poll() is not None, ENDED)
        assert "Traceback" not in log.read_text()
        assert "resume with" in log.read_text()
        self.goes_on(folder, devices=3)

    def goes_on(self, folder, devices):
        """Resume the run with another number of processes, to an end that is near."""
        saved = invflow.open_run(folder).record["steps_done"]
        for file in ("spec.json", "run.json"):
            document = json.loads((folder / file).read_text())
            document["training"]["steps"] = saved + 200
            (folder / file).write_text(json.dumps(document))
        command = [sys.executable, "-m", "invflow", "train", "--resume", folder, "--devices", str(devices)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert ended.returncode == 0, ended.stderr
        record = invflow.open_run(folder).record
        assert record["status"] == "finished"
        assert record["steps_done"] > saved
        assert record["hardware"]["devices"] == devices
