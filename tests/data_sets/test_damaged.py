"""Damaged files are refused in a line or read, in bounded memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file

from invflow.errors import DataError
from invflow.spec.training import Data
from invflow.training.data import load_data
from tests.data_sets.files import peak_memory

ROOT = Path(__file__).parent.parent.parent


FUZZED = 500


def healthy(folder):
    """A file of each kind that a source reads, with the fields that name it."""
    noise = np.random.default_rng(0)
    image = Image.fromarray(noise.integers(0, 256, (16, 12, 3), dtype=np.uint8))
    found = []
    for kind in ("png", "jpg", "gif", "bmp", "tiff", "webp", "ppm", "tga"):
        inside = folder / f"of_{kind}"
        inside.mkdir()
        for number in range(4):
            image.save(inside / f"{number}.{kind}")
        found.append((inside / f"0.{kind}", {"name": "image_folder", "path": inside.name, "size": 8}))
    x, y = noise.normal(size=(40, 3)), noise.integers(0, 3, 40)
    np.save(folder / "x.npy", x)
    np.savez(folder / "x.npz", x=x, y=y)
    np.savez_compressed(folder / "packed.npz", x=x, y=y)
    save_file({"x": x, "y": y}, folder / "x.safetensors")
    found += [
        (folder / name, {"name": "arrays", "path": name}) for name in ("x.npy", "x.npz", "packed.npz", "x.safetensors")
    ]
    table = pa.table({"a": x[:, 0], "b": x[:, 1], "c": [f"class {one}" for one in y]})
    (folder / "x.csv").write_text("\n".join(["a,b,c", *(f"{a},{b},{c}" for a, b, c in zip(*x.T, strict=True))]))
    pq.write_table(table, folder / "x.parquet", row_group_size=11)
    found.append((folder / "x.csv", {"name": "table", "path": "x.csv", "context": "b"}))
    found.append((folder / "x.parquet", {"name": "table", "path": "x.parquet", "label": "c"}))
    return found


def damaged(content, dice):
    """A file with what befalls files: cut off, bits flipped, bytes replaced, or something else altogether."""
    changed = bytearray(content)
    kind = dice.randrange(4)
    if kind == 0:
        del changed[dice.randrange(len(changed)) :]
    elif kind == 1:
        for _ in range(dice.randint(1, 20)):
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    elif kind == 2:
        first = dice.randrange(len(changed))
        changed[first : first + dice.randint(1, 50)] = dice.randbytes(dice.randint(0, 50))
    else:  # behind the first bytes, by which a kind of file is known
        changed[dice.choice([0, 8]) :] = dice.randbytes(dice.randrange(500))
    return bytes(changed)


def fuzz(folder):
    """Read damaged files; print how many were refused and read, and the memory in kB that it took."""
    dice, outcomes = random.Random(0), {"refused": 0, "read": 0}
    before = peak_memory()
    kinds, said = healthy(folder), []
    for number in range(FUZZED):
        file, fields = kinds[number % len(kinds)]
        content = file.read_bytes()
        try:
            file.write_bytes(damaged(content, dice))
            data = load_data(Data(**fields), folder)
            data.train.all()
            data.test.all()
            outcomes["read"] += 1
        except DataError as error:
            outcomes["refused"] += 1
            said.append(str(error))
        finally:
            file.write_bytes(content)
    assert all(one.isprintable() for one in said), "each is one line"
    print(json.dumps({**outcomes, "memory": peak_memory() - before}))


def test_damaged_files_are_refused_or_read(tmp_path):
    """In a process of its own, so that its memory is measured, and what crashes it fails this test alone."""
    inside, elsewhere = tmp_path / "inside", tmp_path / "elsewhere"
    inside.mkdir()
    elsewhere.mkdir()
    expected = {path.relative_to(inside) for path in (healthy(inside), inside.rglob("*"))[1]}
    for path in sorted(inside.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    script = f"import pathlib; from tests.data_sets.test_damaged import fuzz; fuzz(pathlib.Path({str(inside)!r}))"
    command = [sys.executable, "-W", "error", "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(elsewhere)}
    done = subprocess.run(
        command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["refused"] + found["read"] == FUZZED
    assert found["refused"] > FUZZED / 3
    assert found["memory"] < 2**18, "kB: what is imported on the way, and a little"
    assert {path.relative_to(inside) for path in inside.rglob("*")} == expected, "nothing is written"
    assert not list(elsewhere.iterdir())
