"""Files of tensors that others wrote: no code of them runs, and what is none is refused in one line."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from invflow import CheckpointError
from invflow.spec.official import import_weights

SPEC = Path(__file__).parents[2] / "specs" / "published" / "irevnet_cifar10.json"


class Hostile:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "ran")


class TestFiles:
    """What is no file of tensors."""

    def test_no_code_runs(self, tmp_path):
        torch.save({"state_dict": {"a": torch.ones(1)}, "args": Hostile(tmp_path / "sign")}, tmp_path / "hostile.pth")
        with pytest.raises(CheckpointError):
            import_weights(SPEC, tmp_path / "hostile.pth")
        assert not (tmp_path / "sign").exists()

    def test_a_pickled_model_is_refused(self, tmp_path):
        torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
        torch.save({"model": nn.Linear(2, 2), "epoch": 1}, tmp_path / "inside.pth")
        for name in ("model.pth", "inside.pth"):
            with pytest.raises(CheckpointError, match=r"a pickled model is not loaded.*save model.state_dict\(\)"):
                import_weights(SPEC, tmp_path / name)

    @pytest.mark.parametrize("kept", [10, 5000, 300_000])
    def test_a_truncated_file(self, tmp_path, kept):
        torch.save({"a.weight": torch.zeros(10**5)}, tmp_path / "whole.pth")
        (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:kept])
        with pytest.raises(CheckpointError, match=r"cut.pth: no file of tensors"):
            import_weights(SPEC, tmp_path / "cut.pth")

    def test_a_compressed_file_may_be_of_any_size(self, tmp_path):
        torch.save({"a.weight": torch.zeros(10**6)}, tmp_path / "plain.pth")
        packed = zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED)
        with zipfile.ZipFile(tmp_path / "plain.pth") as plain, packed as small:
            for entry in plain.infolist():
                small.writestr(entry.filename, plain.read(entry))
        with pytest.raises(CheckpointError, match=r"small.pth: compressed"):
            import_weights(SPEC, tmp_path / "small.pth")

    @pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04cut short", b"\x80\x02."])
    @pytest.mark.parametrize("name", ["some.pth", "some.safetensors"])
    def test_something_else(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / name))):
            import_weights(SPEC, tmp_path / name)

    def test_a_mistake_is_one_line(self, tmp_path):
        for path, line in ((tmp_path / "none.pth", "No such file"), (tmp_path, "Is a directory")):
            with pytest.raises(CheckpointError, match=line):
                import_weights(SPEC, path)
        torch.save({"a.weight": torch.ones(1)}, tmp_path / "unknown.pth")
        with pytest.raises(
            CheckpointError, match=r"keys such as a.weight are of no layout that is known: pytorch-i-rev"
        ):
            import_weights(SPEC, tmp_path / "unknown.pth")
