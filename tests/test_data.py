"""Data of one's own: images in folders, arrays, tables; their splits, contexts, and what is refused."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import zipfile
from hashlib import md5
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from invflow.data import arrays as arrays_module
from invflow.data import table as table_module
from invflow.errors import DataError
from invflow.spec.training import Data
from invflow.training import data as loading
from invflow.training.data import load_data
from invflow.training.data import test_loader as loader_of
from invflow.training.run_folder import Run

ROOT = Path(__file__).parent.parent


def loaded(root, name, path, **fields):
    return load_data(Data(name=name, path=path, **fields), root)


def refused(root, name, path, **fields):
    """The one line that refuses the data."""

    def read():
        data = loaded(root, name, path, **fields)
        for part in (data.train, data.test):
            part.all()

    with pytest.raises(DataError) as caught:
        read()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def picture(path, size=(8, 8), mode="RGB", colour=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Image.new(mode, size[::-1], colour or 0)
    made.save(path, **options)
    return path


def pictures(root, classes=("cat", "dog"), each=5, size=(8, 8)):
    """A folder of noise in classes, by which the mean of the red pixels can be told."""
    random = np.random.default_rng(0)
    for number, name in enumerate(classes):
        for index in range(each):
            pixels = random.integers(0, 64, (*size, 3), dtype=np.uint8)
            pixels[..., 0] += 64 * number
            file = root / name / f"{index:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    return root


class TestSplits:
    """What `Request.data_set` makes of the samples of a source, here of numbered rows."""

    @pytest.fixture
    def root(self, tmp_path):
        np.savez(tmp_path / "rows.npz", x=np.arange(100.0)[:, None], y=np.arange(100) % 3)
        given = {"x": np.arange(100.0)[:, None], "x_test": np.arange(100.0, 120.0)[:, None]}
        np.savez(tmp_path / "given.npz", **given)
        return tmp_path

    @staticmethod
    def rows(samples):
        return samples.all().values[:, 0].int().tolist()

    def test_a_fifth_is_the_test_part(self, root):
        data = loaded(root, "arrays", "rows.npz")
        assert (len(data.train), len(data.test), data.validation) == (80, 20, None)
        assert sorted(self.rows(data.train) + self.rows(data.test)) == list(range(100))
        assert self.rows(data.test) != list(range(20)), "they are drawn"

    @pytest.mark.parametrize("size", [30, 0.3])
    def test_a_number_or_a_fraction(self, root, size):
        data = loaded(root, "arrays", "rows.npz", test_size=size, validation_size=0.1)
        parts = [self.rows(part) for part in (data.train, data.validation, data.test)]
        assert [*map(len, parts)] == [63, 7, 30]
        assert sorted(itertools.chain(*parts)) == list(range(100))
        assert data.judge == ("val", data.validation)

    def test_the_seed_decides(self, root):
        first, again, other = (
            self.rows(loaded(root, "arrays", "rows.npz", split_seed=seed).test) for seed in (1, 1, 2)
        )
        assert first == again != other

    def test_given_parts_stay(self, root):
        data = loaded(root, "arrays", "given.npz", validation_size=10, train_size=50, test_size=5)
        assert self.rows(data.test) == list(range(100, 105))
        assert len(data.train) == 50
        assert len(data.validation) == 10
        assert not {*self.rows(data.train)} & {*self.rows(data.validation)}

    @pytest.mark.parametrize("sizes", [{"test_size": 101}, {"train_size": 81}, {"validation_size": 81}])
    def test_more_than_there_are(self, root, sizes):
        assert "the spec asks for" in refused(root, "arrays", "rows.npz", **sizes)

    def test_labels_follow_their_rows(self, root):
        data = loaded(root, "arrays", "rows.npz", validation_size=10, context="labels")
        for part in (data.train, data.validation, data.test):
            batch = part.all()
            assert (batch.values[:, 0] % 3).long().tolist() == batch.labels.tolist() == part.labels.tolist()
            assert batch.context.argmax(1).tolist() == batch.labels.tolist()
            assert batch.context.sum(1).tolist() == [1] * len(part)


class TestPaths:
    @pytest.mark.parametrize("path", ["/etc/passwd", "../x.npz", "a/../../x.npz", "", "a\0b"])
    @pytest.mark.parametrize("name", ["arrays", "table", "image_folder"])
    def test_a_path_that_leads_out(self, tmp_path, name, path):
        assert "expects a path relative to" in refused(tmp_path, name, path)

    @pytest.mark.parametrize("name", ["arrays", "table", "image_folder"])
    @pytest.mark.parametrize("path", ["absent", "x" * 5000, "two\nlines"])
    def test_a_path_to_nothing(self, tmp_path, name, path):
        assert "--data-root or INVFLOW_DATA" in refused(tmp_path, name, path)

    def test_a_link_that_leads_out(self, tmp_path):
        root, outside = tmp_path / "root", tmp_path / "outside"
        pictures(outside)
        np.save(outside / "x.npy", np.zeros((10, 2)))
        (root / "arrays").mkdir(parents=True)
        (root / "photos").symlink_to(outside)
        (root / "x.npy").symlink_to(outside / "x.npy")
        (root / "arrays" / "values.npy").symlink_to(outside / "x.npy")
        pictures(root / "mixed", ["cat"])
        pictures(root / "files", ["cat"])
        (root / "mixed" / "dog").symlink_to(outside / "dog")
        (root / "files" / "cat" / "z.png").symlink_to(outside / "dog" / "0000.png")
        for name, path in [("image_folder", "photos"), ("image_folder", "mixed"), ("image_folder", "files")]:
            assert "a link that leads out of" in refused(root, name, path)
        for path in ("x.npy", "arrays"):
            assert "a link that leads out of" in refused(root, "arrays", path)

    def test_a_link_that_stays(self, tmp_path):
        pictures(tmp_path / "photos", ["cat"], each=4)
        (tmp_path / "photos" / "cat" / "again.png").symlink_to(tmp_path / "photos" / "cat" / "0000.png")
        data = loaded(tmp_path, "image_folder", "photos", test_size=1)
        assert len(data.train) == 4

    def test_the_folder_of_the_spec_comes_first(self, tmp_path):
        for name, count in [("spec", 10), ("root", 20)]:
            (tmp_path / name).mkdir()
            np.save(tmp_path / name / "x.npy", np.zeros((count, 2)))
        data = load_data(Data(name="arrays", path="x.npy"), tmp_path / "root", folder=tmp_path / "spec")
        assert len(data.train) == 8


class TestImageFolder:
    def test_classes_are_the_folders_in_order(self, tmp_path):
        pictures(tmp_path / "photos", ["dog", "cat", "ant"], each=10)
        data = loaded(tmp_path, "image_folder", "photos")
        assert data.class_names == ("ant", "cat", "dog")
        assert (data.shape, data.levels, data.high) == ((3, 8, 8), 256, 1.0)
        assert data.holds_images
        batch = data.train.all()
        assert torch.equal(batch.values * 256, (batch.values * 256).round())
        red = batch.values[:, 0].mean((1, 2)) * 4
        assert [2 - one for one in red.int().tolist()] == batch.labels.tolist(), "dogs are the darkest"
        assert data.train.slow

    def test_given_splits(self, tmp_path):
        for part, each in [("train", 6), ("val", 2), ("test", 3)]:
            pictures(tmp_path / "photos" / part, each=each)
        data = loaded(tmp_path, "image_folder", "photos", context="labels")
        assert [len(one) for one in (data.train, data.validation, data.test)] == [12, 4, 6]
        assert data.context_shape == (2,)

    def test_train_and_val_alone(self, tmp_path):
        for part in ("train", "val"):
            pictures(tmp_path / "photos" / part, each=10)
        data = loaded(tmp_path, "image_folder", "photos")
        assert [len(one) for one in (data.train, data.validation, data.test)] == [16, 20, 4]

    def test_a_class_called_train(self, tmp_path):
        pictures(tmp_path / "photos", ["train", "tram"], each=5)
        assert loaded(tmp_path, "image_folder", "photos").class_names == ("train", "tram")

    def test_a_test_part_lacks_a_class(self, tmp_path):
        pictures(tmp_path / "photos" / "train", ["ant", "bee", "cat"])
        pictures(tmp_path / "photos" / "test", ["cat"])
        assert loaded(tmp_path, "image_folder", "photos").test.labels.tolist() == [2] * 5

    def test_no_classes(self, tmp_path):
        pictures(tmp_path, ["photos"], each=10)
        data = loaded(tmp_path, "image_folder", "photos")
        assert data.class_names == ()
        assert data.train.labels is None
        assert "has no labels to be the context" in refused(tmp_path, "image_folder", "photos", context="labels")

    def test_hidden_and_other_files_are_skipped(self, tmp_path):
        root = pictures(tmp_path / "photos")
        for name in (".DS_Store", "cat/.hidden.png", "cat/Thumbs.db", "notes.txt", "dog/labels.csv", "cat/x.eps"):
            (root / name).write_bytes(b"no image")
        (root / ".git").mkdir()
        assert len(loaded(tmp_path, "image_folder", "photos").train) == 8

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            (["photos/note.txt"], "photos: no images here"),
            (["photos/cat/a.png", "photos/dog/x.txt"], "photos/dog: no images here"),
            (["photos/cat/a.png", "photos/b.png"], "photos/b.png: an image beside folders"),
            (["photos/cat/a.png", "photos/cat/more/b.png"], "photos/cat/more: a folder in that of a class"),
            (
                ["photos/train/a/a.png", "photos/test/b/a.png"],
                "photos/test/b: expected images in folders of",
            ),
            (["photos/train/a/a.png", "photos/test/a.png"], "photos/test: expected images in folders of the classes"),
            (["photos/train/a/a.png", "photos/test/a/a.png", "photos/b/a.png"], "photos/b: expected no other folders"),
        ],
    )
    def test_folders_that_are_refused(self, tmp_path, files, message):
        for file in files:
            if file.endswith(".png"):
                picture(tmp_path / file)
            else:
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / file).write_text("")
        assert message in refused(tmp_path, "image_folder", "photos")

    def test_a_file_and_a_pipe(self, tmp_path):
        picture(tmp_path / "one.png")
        assert "expected a folder of images" in refused(tmp_path, "image_folder", "one.png")
        pictures(tmp_path / "photos")
        os.mkfifo(tmp_path / "photos" / "cat" / "a.png")
        assert "cat/a.png: expected a file, got a pipe" in refused(tmp_path, "image_folder", "photos")

    def test_sizes_that_differ(self, tmp_path):
        pictures(tmp_path / "photos")
        picture(tmp_path / "photos" / "cat" / "wide.png", (8, 9))
        message = refused(tmp_path, "image_folder", "photos")
        assert "cat/wide.png: 8x9 pixels, but" in message
        assert 'give a "size"' in message
        assert loaded(tmp_path, "image_folder", "photos", size=4).shape == (3, 4, 4)

    @pytest.mark.parametrize("size", [6, [6, 4]])
    @pytest.mark.parametrize("crop", [True, False])
    def test_resized(self, tmp_path, size, crop):
        """A wide picture, red between blue edges: a crop about the centre loses the edges."""
        pixels = np.zeros((12, 36, 3), dtype=np.uint8)
        pixels[:, :12, 2] = pixels[:, 24:, 2] = 255
        pixels[:, 12:24, 0] = 255
        (tmp_path / "photos").mkdir()
        for number in range(3):
            Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
        data = loaded(tmp_path, "image_folder", "photos", size=size, crop=crop)
        height, width = (size, size) if isinstance(size, int) else size
        assert data.shape == (3, height, width)
        found = data.train.all().values[0]
        assert (found[0, :, width // 2] > 0.6).all(), "stretched, the edges come nearer to the centre"
        assert (found[2, :, 0] > 0.9).all() != crop

    def test_modes(self, tmp_path):
        """What each kind of picture becomes, as uint8."""
        root = tmp_path / "photos"
        root.mkdir()
        colour, grey = {}, {}
        Image.new("L", (2, 2), 100).save(root / "grey.png")
        colour["grey"], grey["grey"] = (100, 100, 100), 100
        Image.new("1", (2, 2), 1).save(root / "bit.png")
        colour["bit"], grey["bit"] = (255, 255, 255), 255
        Image.fromarray(np.full((2, 2), 0x64FF, dtype=np.uint16)).save(root / "deep.png")
        colour["deep"], grey["deep"] = (100, 100, 100), 100
        Image.fromarray(np.full((2, 2), 0x64FF, dtype=np.uint16)).save(root / "deep_tiff.tiff")
        colour["deep_tiff"], grey["deep_tiff"] = (100, 100, 100), 100
        Image.new("RGB", (2, 2), (250, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE).save(root / "palette.gif")
        colour["palette"], grey["palette"] = (250, 0, 0), 75
        Image.new("RGBA", (2, 2), (9, 9, 9, 0)).save(root / "clear.png")
        colour["clear"], grey["clear"] = (255, 255, 255), 255
        Image.new("LA", (2, 2), (0, 51)).save(root / "dim.png")
        colour["dim"], grey["dim"] = (204, 204, 204), 204
        Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(root / "ink.tiff")
        colour["ink"], grey["ink"] = (255, 0, 0), 76
        frames = [Image.new("L", (2, 2), value) for value in (10, 200)]
        frames[0].save(root / "moves.gif", save_all=True, append_images=frames[1:])
        colour["moves"], grey["moves"] = (10, 10, 10), 10
        for channels, expected in [(3, colour), (1, grey)]:
            data = loaded(tmp_path, "image_folder", "photos", channels=channels, test_size=1)
            batches = [data.train.all().values, data.test.all().values]
            found = sorted((torch.cat(batches) * 256)[:, :, 0, 0].int().tolist())
            wanted = [list(one) if isinstance(one, tuple) else [one] for one in expected.values()]
            assert found == sorted(wanted)

    def test_a_picture_is_turned_as_it_says(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        picture(tmp_path / "photos" / "turned.jpg", (4, 6), exif=exif)
        for name in ("upright.jpg", "other.jpg"):
            picture(tmp_path / "photos" / name, (6, 4))
        data = loaded(tmp_path, "image_folder", "photos")
        assert {len(data.train.all().values), len(data.test.all().values)} == {2, 1}, "all have one size"
        assert data.shape == (3, 6, 4)

    def test_bad_pictures(self, tmp_path, monkeypatch):
        good = io.BytesIO()
        Image.effect_noise((32, 32), 50).save(good, "PNG")
        content = good.getvalue()
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
        deep = io.BytesIO()
        Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(deep, "TIFF")
        bad = {
            "empty": b"",
            "text": b"hello",
            "half": content[: len(content) // 2],
            "flipped": content[:60] + bytes([content[60] ^ 255]) + content[61:],
            "program": eps,  # PIL would start Ghostscript
            "floats": deep.getvalue(),
            "two\nlines": b"",
        }
        for name, text in bad.items():
            file = tmp_path / name.replace("\n", "") / f"{name}.png"
            file.parent.mkdir()
            file.write_bytes(text)
            for number in range(2):
                picture(file.parent / f"good{number}.png", (32, 32))
            message = refused(tmp_path, "image_folder", file.parent.name)
            assert f"{name}.png".replace("\n", "\\n") in message
            assert "cannot be read" in message
            assert name != "program" or "cannot identify image file" in message, "it was not even opened"
        for number in range(2):
            picture(tmp_path / "huge" / f"good{number}.png")
        picture(tmp_path / "huge" / "huge.png", (40, 30))
        for limit in (1199, 599):  # PIL warns beyond the limit, and refuses beyond twice as many
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            assert "huge.png: cannot be read: Image size (1200 pixels) exceeds limit" in refused(
                tmp_path, "image_folder", "huge", size=4
            )


class TestWorkers:
    """Other processes decode: the same batches in the same order, and the same one line if a file is bad."""

    @pytest.fixture
    def data(self, tmp_path, monkeypatch):
        monkeypatch.setattr(loading, "TEST_BATCH", 3)
        pictures(tmp_path / "photos", each=10)
        return loaded(tmp_path, "image_folder", "photos", context="labels")

    @pytest.fixture(params=[1, 2])
    def cpus(self, request, monkeypatch):
        monkeypatch.setattr(loading, "_cpus", lambda: request.param)
        return request.param

    def test_batches_do_not_depend_on_the_processes(self, data, cpus):
        loader = loading.train_loader(data.train, 4, seed=5)
        assert getattr(loader, "num_workers", 0) == {1: 0, 2: 2}[cpus]
        order = data.train.order(torch.Generator().manual_seed(5))
        wanted = [data.train.take(some) for some in torch.split(order, 4)]
        for _ in range(2):
            for found, expected in zip(loader, wanted, strict=True):
                assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    def test_an_error_is_one_line_and_no_process_stays(self, data, cpus, tmp_path):
        (tmp_path / "photos" / "cat" / "0003.png").write_bytes(b"no more")
        (tmp_path / "photos" / "dog" / "0003.png").write_bytes(b"no more")
        with pytest.raises(DataError, match=r"0003\.png: cannot be read") as caught:
            list(itertools.chain(loader_of(data.train), loader_of(data.test)))
        assert len(str(caught.value).splitlines()) == 1
        assert not multiprocessing.active_children()

    def test_an_iteration_that_is_left(self, data, monkeypatch):
        monkeypatch.setattr(loading, "_cpus", lambda: 2)
        batches = iter(loader_of(data.train))
        next(batches)
        assert len(multiprocessing.active_children()) == 2
        batches.close()
        assert not multiprocessing.active_children()

    def test_large_test_samples_come_in_smaller_batches(self, data, monkeypatch):
        monkeypatch.setattr(loading, "MOST_NUMBERS", 2 * 3 * 8 * 8)
        assert [len(batch.values) for batch in loader_of(data.test)] == [2, 2]
        monkeypatch.setattr(loading, "MOST_NUMBERS", 1)
        assert [len(batch.values) for batch in loader_of(data.test)] == [1] * 4

    def test_tensors_need_no_processes(self):
        assert not hasattr(loader_of(load_data(Data()).train), "num_workers")


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


class TestTable:
    COLUMNS = {
        "a": [1.5, 2.5, -3.0, 4.0, 0.0] * 20,
        "b": [int(1e9) + one for one in range(100)],
        "kind": ["x", "y", "z", "x", "z"] * 20,
        "where": ["n", "s", "n", "n", "s"] * 20,
        "class": [10, 2, 2, 10, 33] * 20,
    }

    @staticmethod
    def write(root, kind, columns=None, rows_together=17, name="data"):
        table = pa.table(TestTable.COLUMNS if columns is None else columns)
        if kind == "csv":
            lines = [",".join(map(str, row.values())) for row in table.to_pylist()]
            (root / f"{name}.csv").write_text("\n".join([",".join(table.column_names), *lines]) + "\n")
        else:
            pq.write_table(table, root / f"{name}.parquet", row_group_size=rows_together)
        return f"{name}.{kind}"

    @pytest.mark.parametrize("kind", ["csv", "parquet"])
    def test_columns(self, tmp_path, kind):
        path = self.write(tmp_path, kind)
        data = loaded(
            tmp_path,
            "table",
            path,
            label="class",
            context=("where", "b"),
            standardize=False,
            test_size=30,
            split_seed=3,
        )
        assert (data.shape, data.context_shape, data.levels) == ((1,), (3,), None)
        assert data.class_names == ("2", "10", "33")
        columns = [self.COLUMNS[name] for name in ("a", "class", "where")]
        wanted = [
            (a, str(label), [float(where == "n"), float(where == "s")])
            for a, label, where in zip(*columns, strict=True)
        ]
        found = []
        for part in (data.train, data.test):
            values, labels, context = part.all()
            assert values.dtype == context.dtype == torch.float32
            names = [data.class_names[label] for label in labels]
            found += [*zip(values[:, 0].tolist(), names, context[:, :2].tolist(), strict=True)]
        assert sorted(found) == sorted(wanted)

    @pytest.mark.parametrize("kind", ["csv", "parquet"])
    def test_rows_stay_together(self, tmp_path, kind):
        columns = {
            "row": list(range(100)),
            "twice": [2.0 * one for one in range(100)],
            "name": [str(one % 7) for one in range(100)],
        }
        path = self.write(tmp_path, kind, columns)
        data = loaded(tmp_path, "table", path, label="name", features=["twice"], context="row", standardize=False)
        rows = []
        for part in (data.train, data.test):
            for positions in torch.split(part.order(torch.Generator().manual_seed(1)), 13):
                batch = part.take(positions)
                assert torch.equal(batch.values, 2 * batch.context)
                assert torch.equal(batch.values[:, 0] / 2 % 7, batch.labels.float())
                rows += batch.context[:, 0].int().tolist()
        assert sorted(rows) == list(range(100)) != rows

    @pytest.mark.parametrize("kind", ["csv", "parquet"])
    def test_standardized_from_the_training_part(self, tmp_path, kind, monkeypatch):
        monkeypatch.setattr(table_module, "_CHUNK", 7)
        path = self.write(tmp_path, kind, {**self.COLUMNS, "same": [0.1] * 100})
        data = loaded(tmp_path, "table", path, context=("where", "b"), validation_size=10)
        batch, raw = (
            data.train.all(),
            loaded(tmp_path, "table", path, features=["a"], standardize=False, validation_size=10),
        )
        wanted = raw.train.all().values
        for numbers in (batch.values[:, 0], batch.context[:, 2]):
            assert abs(numbers.mean()) < 1e-6
            assert abs(numbers.std(correction=0) - 1) < 1e-6
        test = (raw.test.all().values[:, 0] - wanted.mean()) / wanted.std(correction=0)
        torch.testing.assert_close(data.test.all().values[:, 0], test)
        assert {*batch.context[:, :2].unique().tolist()} == {0.0, 1.0}, "classes stay as they are"
        position = sorted(["a", "same"]).index("same") if data.shape == (2,) else -1
        assert (batch.values[:, position].abs() < 1e-6).all(), "a constant is only shifted"

    @pytest.mark.parametrize("kind", ["csv", "parquet"])
    def test_labels_as_context(self, tmp_path, kind):
        data = loaded(tmp_path, "table", self.write(tmp_path, kind), label="class", context="labels")
        assert torch.equal(data.train.all().context.argmax(1), data.train.labels)
        assert data.context_shape == (3,)

    @pytest.mark.parametrize("kind", ["csv", "parquet"])
    def test_a_second_file(self, tmp_path, kind):
        path = self.write(tmp_path, kind)
        few = {name: values[:5] for name, values in self.COLUMNS.items()}
        other = self.write(tmp_path, kind, few, name="test")
        data = loaded(tmp_path, "table", path, label="class", context="kind", test_path=other)
        assert (len(data.train), len(data.test)) == (100, 5)
        assert data.test.labels.tolist() == [1, 0, 0, 1, 2]
        assert data.test.all().context.argmax(1).tolist() == [0, 1, 2, 0, 2]
        for column in ("class", "kind"):
            new = few | {column: [*few[column][:4], 99 if column == "class" else "new"]}
            self.write(tmp_path, kind, new, name="test")
            message = refused(tmp_path, "table", path, label="class", context="kind", test_path=other)
            assert f"column '{column}': row 4 (from 0): no training sample has the label" in message

    def test_parquet_streams(self, tmp_path, monkeypatch):
        """Batches in a training's order touch the groups of a window and decode each of them once an epoch."""
        rows, together = 1000, 50
        path = self.write(tmp_path, "parquet", {"a": np.arange(rows) * 1.0, "b": np.ones(rows)}, together)
        monkeypatch.setattr(table_module, "_WINDOW", 3 * together * 2 * 8)
        data = loaded(tmp_path, "table", path, standardize=False)
        decode, decoded = table_module._Rows._decode, []

        def counted(self, group):
            decoded.append(group)
            return decode(self, group)

        monkeypatch.setattr(table_module._Rows, "_decode", counted)
        inner = table_module._Rows(table_module._open(tmp_path / path), ["a", "b"], None, [])
        decoded.clear()
        order = inner.order(torch.Generator().manual_seed(4))
        assert torch.equal(order, inner.order(torch.Generator().manual_seed(4)))
        assert sorted(order.tolist()) == list(range(rows))
        for batch in torch.split(order, 64):
            assert len({one // together for one in batch.tolist()}) <= 6
            assert torch.equal(inner.take(batch).values[:, 0], batch.double())
        assert len(decoded) <= rows // together, "each group at most once"
        assert inner._decoded.cache_info().maxsize == 6
        order = data.train.order(torch.Generator().manual_seed(4))
        touched = [
            {int(one) // together for one in data.train.take(some).values[:, 0]} for some in torch.split(order, 64)
        ]
        assert max(map(len, touched)) <= 6, "the order of a part is that of the table"

    @pytest.mark.parametrize(
        ("text", "fields", "message"),
        [
            ("", {}, "Empty CSV file"),
            ("a,b\n", {}, "no column of numbers"),
            ("a,b\n", {"features": ["a"]}, "data.csv: no rows"),
            ("a,b\n1,2\n3\n", {}, "row 1 (from 0) has 1 values, expected 2: '3'"),
            ("a,b\n1,2\n3,4,5\n", {}, "row 1 (from 0) has 3 values, expected 2: '3,4,5'"),
            ("a,b\n1,2\n3,\n", {}, "column 'b': row 1 (from 0): a value is missing"),
            ("a,b\n1,2\n3,NaN\n", {}, "column 'b': row 1 (from 0): a value is missing"),
            ("a,b\n1,2\n3,inf\n", {}, "column 'b': row 1 (from 0) holds inf"),
            ("a,b\n1,2\n3,4\n5,six\n7,x\n", {}, "column 'b': row 2 (from 0): expected a number, got 'six'"),
            ("a,b\n1,x\n", {"features": ["b"]}, "column 'b': row 0 (from 0): expected a number, got 'x'"),
            ("a,b\n1,x\n", {"features": ["c"]}, "no column 'c'; it has 'a', 'b'"),
            ("a,b\n1,x\n", {"label": "c"}, "no column 'c'"),
            ("a,b\n1,x\n", {"context": "c"}, "no column 'c'"),
            ("a,b\n1,x\n2,\n", {"label": "b"}, "column 'b': row 1 (from 0): a value is missing"),
            ("a,b\nx,x\n", {}, "no column of numbers besides label and context; it has 'a', 'b'"),
            ("a,b\n1,x\n", {"label": "a", "features": ["a"]}, "the label 'a' is also named among the features"),
            ("a,a\n1,2\n", {}, "two columns are named 'a'"),
            ("1,2\n3,4\n", {}, "its first line holds numbers; expected the names of the columns"),
            ("a,b\n\xff,1\n", {}, "line 2 is not UTF-8; save the file as UTF-8"),
            ("a,b\n1,2\n\xff\n", {}, "line 3 is not UTF-8"),
            ("," * 40000, {}, "its first line is too long"),
            ("x" * 2**20, {}, "its first line is too long"),
        ],
    )
    def test_csv_that_is_refused(self, tmp_path, text, fields, message):
        (tmp_path / "data.csv").write_bytes(text.encode("latin-1"))
        assert message in refused(tmp_path, "table", "data.csv", **fields)

    @pytest.mark.parametrize(
        ("columns", "fields", "message"),
        [
            ({"a": [1.0, None, 3.0]}, {}, "column 'a': row 1 (from 0): a value is missing"),
            ({"a": [1.0, 2.0, float("nan")]}, {}, "column 'a': row 2 (from 0) holds nan"),
            ({"a": [1.0, 2.0], "b": [[1], [2]]}, {"features": ["b"]}, "column 'b': expected numbers, got list"),
            (
                {"a": [1.0, 2.0], "b": [0.5, 1.5]},
                {"label": "b"},
                "column 'b': expected integers or strings, got double",
            ),
            ({"a": [1.0, 2.0], "b": ["x", None]}, {"label": "b"}, "column 'b': row 1 (from 0): a value is missing"),
            ({"a": [1.0, 2.0], "b": [0.5, 1.5]}, {"context": "c"}, "no column 'c'; it has 'a', 'b'"),
            ({"a": [1.0] * 40000, "b": [*range(40000)]}, {"label": "b"}, "more than 32768 different labels"),
            ({"b": ["x", "y"]}, {}, "no column of numbers"),
            ({"a": pa.array([], pa.float64())}, {}, "no rows"),
        ],
    )
    def test_parquet_that_is_refused(self, tmp_path, columns, fields, message):
        path = self.write(tmp_path, "parquet", columns, 10**6 if len(columns.get("a", ())) > 100 else 2)
        assert message in refused(tmp_path, "table", path, **fields)

    def test_groups_that_are_too_large(self, tmp_path, monkeypatch):
        path = self.write(tmp_path, "parquet")
        monkeypatch.setattr(table_module, "_MOST_GROUP", 200)
        assert "408 bytes of numbers that are read together, expected 200 at most; write it as" in refused(
            tmp_path, "table", path
        )
        monkeypatch.setattr(table_module, "_MOST_ROWS", 99)
        assert "100 rows; expected 99 at most" in refused(tmp_path, "table", path)
        monkeypatch.setattr(table_module, "_MOST_CSV", 99)
        assert "expected 99 at most" in refused(tmp_path, "table", self.write(tmp_path, "csv"))

    def test_kinds_of_numbers(self, tmp_path):
        columns = {
            "small": pa.array([1, 2, 3], pa.int8()),
            "flag": [True, False, True],
            "dictionary": pa.array(["u", "v", "u"]).dictionary_encode(),
            "half": np.array([1, 2, 3], dtype=np.float16),
        }
        path = self.write(tmp_path, "parquet", columns)
        data = loaded(tmp_path, "table", path, label="dictionary", standardize=False, test_size=1)
        assert (data.shape, data.class_names) == ((3,), ("u", "v"))
        assert len(data.train.all().values) == 2

    def test_text_with_spaces_marks_and_an_index(self, tmp_path):
        """What spreadsheets and pandas write: a byte-order mark, spaces, quotes, an index without a name."""
        (tmp_path / "data.csv").write_bytes(b'\xef\xbb\xbf,a,"b, c"\r\n0, 1.5,"x, y"\r\n1,2.5 ,z\r\n\r\n2,3.5,z\r\n')
        data = loaded(tmp_path, "table", "data.csv", label="b, c", standardize=False, test_size=1)
        assert (data.shape, data.class_names) == ((1,), ("x, y", "z"))
        assert sorted([*data.train.all().values, *data.test.all().values]) == [1.5, 2.5, 3.5]

    def test_without_pyarrow(self, tmp_path, monkeypatch):
        path = self.write(tmp_path, "csv")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        assert "pip install 'invflow[table]'" in refused(tmp_path, "table", path)

    def test_other_files(self, tmp_path):
        (tmp_path / "x.xlsx").write_bytes(b"")
        assert "expected a file that ends in .csv, .parquet" in refused(tmp_path, "table", "x.xlsx")
        (tmp_path / "folder.csv").mkdir()
        assert "expected a file that ends in" in refused(tmp_path, "table", "folder.csv")
        (tmp_path / "x.parquet").write_bytes(b"")
        assert "x.parquet: cannot be read" in refused(tmp_path, "table", "x.parquet")


class TestTorchvision:
    """Files as torchvision's data sets have them, of few images."""

    @staticmethod
    def write_fashion(root, counts=(30, 10)):
        raw = root / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        drawn = np.random.default_rng(0)
        found = []
        for part, count in zip(("train", "t10k"), counts, strict=True):
            images = drawn.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            labels = np.arange(count, dtype=np.uint8) % 10
            sizes = b"".join(size.to_bytes(4) for size in images.shape)
            (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + images.tobytes())
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes[:4] + labels.tobytes())
            found.append(images)
        return found

    @staticmethod
    def write_cifar(root, monkeypatch):
        from torchvision.datasets import CIFAR10

        folder = root / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        drawn = np.random.default_rng(0)

        def write(name, content):
            text = pickle.dumps(content)
            (folder / name).write_bytes(text)
            return md5(text).hexdigest()

        def batch(count=6):
            images = drawn.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
            return {"data": images, "labels": [one % 10 for one in range(count)]}

        batches = {name: batch() for name in (*(f"data_batch_{one}" for one in range(1, 6)), "test_batch")}
        sums = [[name, write(name, content)] for name, content in batches.items()]
        meta = write("batches.meta", {"label_names": [*"abcdefghij"]})
        monkeypatch.setattr(CIFAR10, "train_list", sums[:-1])  # it refuses files of other people
        monkeypatch.setattr(CIFAR10, "test_list", sums[-1:])
        monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta})
        return np.concatenate([one["data"] for one in list(batches.values())[:-1]]).reshape(-1, 3, 32, 32)

    def test_fashion_mnist(self, tmp_path, call):
        images, _ = self.write_fashion(tmp_path)
        data = load_data(Data(name="fashion_mnist"), tmp_path)
        assert (len(data.train), len(data.test), data.shape, data.classes) == (30, 10, (1, 28, 28), 10)
        assert torch.equal(data.train.all().values * 256, torch.tensor(images)[:, None].float())
        assert data.train.labels.tolist() == [*range(10)] * 3
        spec = classifier(tmp_path, {"name": "fashion_mnist"}, [1, 28, 28], 10)
        assert call("train", spec, "--data-root", tmp_path, "--out", tmp_path / "run")[0] == 0

    def test_cifar10(self, tmp_path, monkeypatch, call):
        images = self.write_cifar(tmp_path, monkeypatch)
        data = load_data(Data(name="cifar10"), tmp_path)
        assert (len(data.train), len(data.test), data.shape) == (30, 6, (3, 32, 32))
        assert torch.equal(data.train.all().values * 256, torch.tensor(images).float())
        assert data.class_names[0] == "airplane"
        spec = classifier(tmp_path, {"name": "cifar10"}, [3, 32, 32], 10)
        assert call("train", spec, "--data-root", tmp_path, "--out", tmp_path / "run")[0] == 0

    def test_damaged(self, tmp_path, monkeypatch):
        self.write_fashion(tmp_path)
        file = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(DataError, match=r"fashion_mnist in .* is damaged") as caught:
            load_data(Data(name="fashion_mnist"), tmp_path)
        assert len(str(caught.value).splitlines()) == 1
        self.write_cifar(tmp_path, monkeypatch)
        (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"another pickle")
        with pytest.raises(DataError, match=r"cifar10 is not in .* and may not be downloaded"):
            load_data(Data(name="cifar10"), tmp_path)


def classifier(folder, data, shape, classes, **training):
    """A spec of a small classifier, in a file."""
    layers = [
        {"type": "split"},
        {"type": "additive_coupling", "net": {"type": "mlp", "hidden": [4]}},
        {"type": "merge"},
    ]
    layers = layers if len(shape) == 1 else [{"type": "psi", "block_size": 2}]
    document = {
        "input": {"shape": shape},
        "layers": layers,
        "head": {"type": "linear", "classes": classes},
        "training": {"data": data, "epochs": 1, **training},
    }
    path = folder / "spec.json"
    path.write_text(json.dumps(document))
    return path


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
            "from tests.test_data import peak_memory\n"
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


def peak_memory():
    """The most memory that this process has had, in kB; getrusage would count that of the process which started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


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
    script = f"import pathlib; from tests.test_data import fuzz; fuzz(pathlib.Path({str(inside)!r}))"
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
