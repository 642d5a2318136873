"""Files of arrays."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from invflow.data import arrays as arrays_module
from tests.data_sets.files import loaded, refused


class TestArrays:
    ROWS = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    PIXELS = np.random.default_rng(0).integers(0, 256, (20, 4, 5), dtype=np.uint8)
    CLASSES = np.arange(20) % 4

    @staticmethod
    def write(root, kind, **arrays):
        """A file, or a folder of .npy files, with these arrays; its name."""
        name = f"data.{kind}"
        if kind == "npz":
            np.savez(root / name, **arrays)
        elif kind == "safetensors":
            save_file({key: np.ascontiguousarray(one) for key, one in arrays.items()}, root / name)
        else:
            (root / name).mkdir()
            for key, one in arrays.items():
                np.save(root / name / f"{key}.npy", one)
        return name

    @pytest.mark.parametrize("kind", ["npz", "safetensors", "folder"])
    def test_floats(self, tmp_path, kind):
        path = self.write(
            tmp_path, kind, values=self.ROWS.astype(np.float64), labels=self.CLASSES, extra=self.ROWS[:, 0]
        )
        data = loaded(tmp_path, "arrays", path, test_size=5, context=("extra", "values"))
        assert (data.shape, data.context_shape, data.levels) == ((3,), (4,), None)
        assert data.class_names == ("0", "1", "2", "3")
        for part in (data.train, data.test):
            batch = part.all()
            assert batch.values.dtype == batch.context.dtype == torch.float32
            rows = [self.ROWS.tolist().index(one) for one in batch.values.tolist()]
            assert batch.labels.tolist() == [row % 4 for row in rows]
            assert torch.equal(batch.context, torch.cat([batch.values[:, :1], batch.values], dim=1))

    @pytest.mark.parametrize("kind", ["npz", "safetensors", "folder"])
    @pytest.mark.parametrize("channels", [None, 3])
    def test_pixels(self, tmp_path, kind, channels):
        pixels = self.PIXELS if channels is None else np.stack([self.PIXELS] * channels, axis=1)
        path = self.write(tmp_path, kind, x=pixels, x_test=pixels[:7])
        data = loaded(tmp_path, "arrays", path)
        assert (data.shape, data.levels, data.classes) == ((channels or 1, 4, 5), 256, 0)
        assert torch.equal(data.test.all().values * 256, torch.tensor(pixels[:7]).reshape(7, -1, 4, 5).float())

    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
    def test_one_npy(self, tmp_path, order, dtype):
        np.save(tmp_path / "x.npy", np.asarray(self.ROWS, dtype=dtype, order=order))
        data = loaded(tmp_path, "arrays", "x.npy", test_size=1)
        wanted = self.ROWS.astype(dtype).astype(np.float32).tolist()
        assert all(row in wanted for row in data.train.all().values.tolist())

    def test_an_npy_stays_in_its_file(self, tmp_path):
        np.save(tmp_path / "x.npy", self.ROWS)
        data = loaded(tmp_path, "arrays", "x.npy")
        assert str(tmp_path / "x.npy") in Path("/proc/self/maps").read_text()
        assert len(data.train) == 16

    def test_names_of_its_own(self, tmp_path):
        path = self.write(
            tmp_path, "npz", a=self.ROWS, b=np.array(["ox", "ant"] * 10), c=self.ROWS[:4], d=np.array(["ox"] * 4)
        )
        names = {"values": "a", "labels": "b", "test_values": "c", "test_labels": "d"}
        data = loaded(tmp_path, "arrays", path, **names, context="labels")
        assert data.class_names == ("ant", "ox")
        assert data.train.labels[:4].tolist() == [1, 0, 1, 0]
        assert data.test.all().context.tolist() == [[0, 1]] * 4
        assert "no array 'x'; it has 'a', 'b', 'c', 'd'" in refused(tmp_path, "arrays", path, values="x")
        assert "no array 'values'; it has 'a', 'b'" in refused(tmp_path, "arrays", path)

    @pytest.mark.parametrize("labels", [[7, -3, 7, 100], [True, False, True, True], ["é", "a", "é", "z"]])
    def test_labels_are_the_different_values_in_order(self, tmp_path, labels):
        path = self.write(tmp_path, "npz", x=self.ROWS, y=np.array(labels * 5)[:, None])
        data = loaded(tmp_path, "arrays", path, test_size=4)
        assert data.class_names == tuple(map(str, sorted(set(labels))))
        assert [data.class_names[one] for one in data.train.labels.unique()] == [*data.class_names]

    def test_numbers_called_y_are_a_context_and_no_labels(self, tmp_path):
        path = self.write(
            tmp_path, "npz", x=self.ROWS, y=self.ROWS[:, 0], x_test=self.ROWS[:4], test_y=self.ROWS[:4, 0]
        )
        data = loaded(tmp_path, "arrays", path, context="y")
        assert (data.classes, data.context_shape) == (0, (1,))
        assert torch.equal(data.test.all().context, torch.tensor(self.ROWS[:4, :1]))
        assert loaded(tmp_path, "arrays", path).classes == 0

    def test_a_second_file(self, tmp_path):
        self.write(tmp_path, "npz", x=self.ROWS, y=self.CLASSES, c=self.ROWS)
        np.savez(tmp_path / "more.npz", x=self.ROWS[:3], y=self.CLASSES[:3], c=self.ROWS[:3])
        data = loaded(tmp_path, "arrays", "data.npz", test_path="more.npz", context="c")
        assert (len(data.train), len(data.test)) == (20, 3)
        assert torch.equal(data.test.all().context, torch.tensor(self.ROWS[:3]))
        np.savez(tmp_path / "more.npz", x=self.ROWS[:3], y=[0, 1, 9], c=self.ROWS[:3])
        message = refused(tmp_path, "arrays", "data.npz", test_path="more.npz")
        assert "more.npz: 'y': row 2 (from 0): no training sample has the label '9'" in message

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({}, "no array 'values'; it has nothing"),
            ({"x": np.zeros((0, 3))}, "'x': is empty, of shape (0, 3)"),
            ({"x": np.float64(1)}, "'x': is empty, of shape ()"),
            ({"x": np.zeros((5, 2), dtype=np.int64)}, "'x': expected floats, or images as uint8 of shape"),
            ({"x": np.zeros((5, 2), dtype=np.uint8)}, "'x': expected floats, or images as uint8 of shape"),
            ({"x": np.zeros((5, 2), dtype=complex)}, "'x': cannot be read: it holds complex128"),
            ({"x": np.array(["a", "b"])}, "'x': expected numbers, got strings"),
            ({"x": np.array([{}, 1])}, "'x': cannot be read: it holds object"),
            ({"x": np.zeros(3, dtype=[("a", "f4")])}, "'x': cannot be read"),
            ({"x": np.array([[1.0], [2], [np.nan], [np.nan]])}, "'x': row 2 (from 0) holds nan"),
            ({"x": np.array([[1.0], [-np.inf]])}, "'x': row 1 (from 0) holds -inf"),
            ({"x": np.array([[1.0], [1e300]])}, "'x': row 1 (from 0) holds inf"),
            ({"x": np.zeros((5, 2)), "y": np.zeros(4, dtype=int)}, "'y': 4 rows, but 'x' has 5"),
            (
                {"x": np.zeros((5, 2)), "y": np.zeros((5, 2), dtype=int)},
                "'y': expected integers or strings of shape (n,)",
            ),
            (
                {"x": np.zeros((5, 2)), "x_test": np.zeros((5, 3))},
                "'x_test': floats of shape (3,), but the training part",
            ),
            (
                {"x": np.zeros((5, 2)), "y": np.zeros(5, dtype=int), "x_test": np.zeros((5, 2))},
                "no array 'test_labels'",
            ),
            ({"x": np.zeros((40000, 1)), "y": np.arange(40000)}, "40000 different labels; expected at most 32768"),
        ],
    )
    def test_arrays_that_are_refused(self, tmp_path, arrays, message):
        np.savez(tmp_path / "data.npz", **arrays)
        assert message in refused(tmp_path, "arrays", "data.npz")

    def test_contexts_that_are_refused(self, tmp_path):
        path = self.write(tmp_path, "npz", x=self.ROWS, c=self.ROWS[:4], s=np.array(["a"] * 20), p=self.PIXELS)
        for context, message in [
            ("c", "'c': 4 rows, but 'x' has 20"),
            ("s", "'s': expected numbers, got strings"),
            (("x", "p"), "'p': of shape (20, 4, 5) cannot stand beside 'x'"),
            (("x", "x"), "names 'x' twice"),
            ("absent", "no array 'absent'"),
            ("labels", "has no labels to be the context"),
        ]:
            assert message in refused(tmp_path, "arrays", path, context=context)

    def test_nothing_is_unpickled(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return Path.touch, (tmp_path / "trapped",)

        np.save(tmp_path / "x.npy", np.array([Trap()], dtype=object), allow_pickle=True)
        assert "it holds object" in refused(tmp_path, "arrays", "x.npy")
        (tmp_path / "y.npy").write_bytes(pickle.dumps(Trap()))
        assert "cannot be read" in refused(tmp_path, "arrays", "y.npy")
        with zipfile.ZipFile(tmp_path / "z.npz", "w") as archive:
            archive.writestr("x.npy", pickle.dumps(Trap()))
        assert "cannot be read" in refused(tmp_path, "arrays", "z.npz")
        assert not (tmp_path / "trapped").exists()

    def test_bombs(self, tmp_path, monkeypatch):
        """Headers that claim more than there is, and files that unpack to more than memory holds."""
        whole = io.BytesIO()
        np.lib.format.write_array_header_1_0(whole, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
        (tmp_path / "x.npy").write_bytes(whole.getvalue())
        assert "its header claims 4000000000000 bytes" in refused(tmp_path, "arrays", "x.npy")
        with zipfile.ZipFile(tmp_path / "claims.npz", "w") as archive:
            archive.writestr("x.npy", whole.getvalue())
        assert "its header claims 4000000000000 bytes" in refused(tmp_path, "arrays", "claims.npz")
        monkeypatch.setattr(arrays_module, "_MOST_UNPACKED", 2**20)
        np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((2**18, 1), dtype=np.float32))
        assert (tmp_path / "bomb.npz").stat().st_size < 2**12
        assert "save it uncompressed (numpy.savez)" in refused(tmp_path, "arrays", "bomb.npz")
        with zipfile.ZipFile(tmp_path / "slow.npz", "w", zipfile.ZIP_LZMA) as archive:
            archive.writestr("x.npy", b"")
        assert "compressed in a way" in refused(tmp_path, "arrays", "slow.npz")

    def test_other_files(self, tmp_path):
        (tmp_path / "x.txt").write_text("1 2 3")
        assert "expected a file that ends in .npz, .npy, .safetensors" in refused(tmp_path, "arrays", "x.txt")
        (tmp_path / "empty").mkdir()
        assert "it has nothing" in refused(tmp_path, "arrays", "empty")
        for name in ("x.npy", "x.npz", "x.safetensors"):
            (tmp_path / name).write_bytes(b"")
            assert f"{name}: " in refused(tmp_path, "arrays", name)
