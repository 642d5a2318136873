"""Where the entries of a context come from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import invflow
from invflow.cli import main
from invflow.errors import SpecError

from .documents import model_of


class TestData:
    TRAINING = {"epochs": 2, "batch_size": 16, "optimizer": {"type": "adam", "lr": 0.01}}
    SPEC = {
        "input": {"shape": [2], "context_shape": {"class": [2], "more": [3]}},
        "context_net": {"class": {"type": "embedding", "context": "class", "out_shape": [4]}},
        "layers": [
            {"type": "split"},
            {"type": "affine_coupling", "net": {"type": "mlp", "hidden": [8]}},
            {"type": "affine_coupling", "context": "class", "net": {"type": "mlp", "hidden": [8]}},
            {"type": "merge"},
        ],
        "prior": {"type": "standard_normal"},
    }

    @staticmethod
    def arrays(count=64):
        generator = torch.Generator().manual_seed(0)
        x, more = (torch.randn(count, size, generator=generator) for size in (2, 3))
        return x, torch.arange(count) % 2, more

    def test_from_arrays_in_python(self, tmp_path):
        x, y, more = self.arrays()
        both = {"more": more, "class": torch.eye(2)[y]}
        first = invflow.fit(self.SPEC, (x, y, both), tmp_path / "a", progress=False, **self.TRAINING)
        given = (x, y, {"more": more})
        other = invflow.fit(
            self.SPEC, given, tmp_path / "b", context={"class": "labels"}, progress=False, **self.TRAINING
        )
        for name, weight in first.model.state_dict().items():
            assert torch.equal(weight, other.model.state_dict()[name])
        start = model_of(self.SPEC).float().context_net.of("class").weight
        assert not torch.equal(first.model.context_net.of("class").weight, start)  # it was trained along

    @pytest.mark.parametrize("kind", ["arrays", "table"])
    def test_from_a_file(self, tmp_path, capsys, kind):
        x, y, more = self.arrays()
        if kind == "arrays":
            np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy(), more=more.numpy())
            source = {"name": "arrays", "path": "data.npz", "context": {"class": "labels", "more": "more"}}
        else:
            rows = [
                f"{a},{b},{'uv'[c]},{','.join(map(str, d))}"
                for (a, b), c, d in zip(x.tolist(), y.tolist(), more.tolist(), strict=True)
            ]
            (tmp_path / "data.csv").write_text("\n".join(["a,b,kind,p,q,r", *rows]) + "\n")
            source = {"name": "table", "path": "data.csv", "features": ["a", "b"]}
            source["context"] = {"class": "kind", "more": ["p", "q", "r"]}
        spec = {**self.SPEC, "training": {**self.TRAINING, "data": source}}
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        run = invflow.train(tmp_path / "spec.json", tmp_path / "run", progress=False)
        assert run.model.context_shape == {"class": (2,), "more": (3,)}
        for words, code in (("class=0,1;more=0,1,2", 0), ("class=1", 2)):
            with pytest.raises(SystemExit) as ended:
                main(["sample", str(run.folder), "--context", words, "--count", "4", "--json"])
            assert ended.value.code == code
            printed = capsys.readouterr()
            if code:
                assert printed.err == "invflow: --context expects 'class=...; more=...', got 'class=1'\n"
            else:
                assert json.loads(printed.out)["context"] == {"class": [[0.0, 1.0]] * 4, "more": [[0.0, 1.0, 2.0]] * 4}
        with pytest.raises(SystemExit):
            main(["sample", str(run.folder), "--context", "class=0,1;more=0,1,2", "--out", str(tmp_path / "drawn.png")])
        assert (tmp_path / "drawn.png").exists()

    def test_other_names_are_refused(self, tmp_path):
        x, y, more = self.arrays()
        with pytest.raises(SpecError, match=r'gives a context of shape \{"class": \[2\], "other": \[3\]\}'):
            invflow.fit(self.SPEC, (x, y, {"class": torch.eye(2)[y], "other": more}), tmp_path / "run", progress=False)
