"""Training on data of one's own by the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from invflow.training.run_folder import Run
from tests.data_sets.files import classifier, pictures

ROOT = Path(__file__).parent.parent.parent


class TestTraining:
    def test_a_folder_of_1000_images(self, tmp_path, call):
        pictures(tmp_path / "photos", each=500)
        data = {"name": "image_folder", "path": "photos", "size": [4, 6]}
        spec = classifier(tmp_path, data, [3, 4, 6], 2, epochs=3, optimizer={"type": "adam", "lr": 0.03})
        status, _, err = call("train", spec, "--out", tmp_path / "run")
        assert status == 0, err
        run = Run.open(tmp_path / "run")
        assert run.record["test_accuracy"] > 0.95, "the classes differ in their colour"
        assert call("evaluate", tmp_path / "run")[0] == 0

    def test_a_bad_image_ends_it_in_one_line(self, tmp_path, call):
        pictures(tmp_path / "photos", each=20)
        file = tmp_path / "photos" / "dog" / "0010.png"
        file.write_bytes(file.read_bytes()[:40])
        spec = classifier(tmp_path, {"name": "image_folder", "path": "photos", "size": 4}, [3, 4, 4], 2, batch_size=4)
        status, _, err = call("train", spec, "--out", tmp_path / "run")
        assert status == 2
        assert "Traceback" not in err
        progress, (line,) = err.split("invflow: ")[0], err.strip().split("invflow: ")[1:]
        assert line.endswith("dog/0010.png: cannot be read: cannot identify image file '0010.png'")
        assert len(line.splitlines()) == 1, "long as it is, it is not broken"
        assert "0010" not in progress

    def test_an_npz(self, tmp_path, call):
        x = np.random.default_rng(0).normal(size=(500, 4))
        np.savez(tmp_path / "rows.npz", x=x, y=np.where(x[:, 0] > 0, "right", "left"))
        spec = classifier(
            tmp_path, {"name": "arrays", "path": "rows.npz"}, [4], 2, epochs=20, optimizer={"type": "adam", "lr": 0.03}
        )
        status, _, err = call("train", spec, "--out", tmp_path / "run")
        assert status == 0, err
        assert Run.open(tmp_path / "run").record["test_accuracy"] > 0.9

    def test_a_parquet_table_of_a_million_rows(self, tmp_path):
        """In a process of its own, whose memory stays below 1.5 GiB: most of it is what PyTorch and Lightning need."""
        drawn = np.random.default_rng(0)
        schema = pa.schema([(f"x{column}", pa.float64()) for column in range(6)])
        with pq.ParquetWriter(tmp_path / "rows.parquet", schema) as writer:
            for _ in range(10):
                writer.write_table(pa.table([drawn.normal(5, 3, 100_000) for _ in schema], schema=schema))
        document = {
            "input": {"shape": [6]},
            "layers": [{"type": "actnorm"}],
            "prior": {"type": "standard_normal"},
            "training": {"data": {"name": "table", "path": "rows.parquet"}, "batch_size": 20_000, "epochs": 1},
        }
        (tmp_path / "spec.json").write_text(json.dumps(document))
        script = (
            "import sys\n"
            "from invflow.cli import main\n"
            "from tests.data_sets.files import peak_memory\n"
            "try:\n"
            "    main(['train', 'spec.json', '--out', 'run'])\n"
            "finally:\n"
            "    print(f'peak {peak_memory()}', file=sys.stderr)\n"
        )
        command = [sys.executable, "-c", script]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        (peak,) = [int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("peak")]
        print(f"peak {peak} kB")
        assert peak < 1.5 * 2**20, f"{peak} kB"
        run = Run.open(tmp_path / "run")
        # Six standard normal numbers, once they are standardised.
        assert abs(run.record["test_nll"] - 6 * (1 + np.log(2 * np.pi)) / 2) < 0.05
