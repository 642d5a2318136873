"""Images in folders, and the processes that decode them."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image

from invflow.errors import DataError
from invflow.spec.training import Data
from invflow.training import data as loading
from invflow.training.data import load_data
from invflow.training.data import ordered_loader as loader_of
from tests.data_sets.files import loaded, picture, pictures, refused


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
        assert getattr(loader.batches, "num_workers", 0) == {1: 0, 2: 2}[cpus]
        order = data.train.order(torch.Generator().manual_seed(5))
        wanted = [data.train.take(some) for some in torch.split(order, 4)]
        for _ in range(2):
            for share, expected in zip(loader, wanted, strict=True):
                assert all(torch.equal(one, other) for one, other in zip(share.batch, expected, strict=True))

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
        assert [share.number for share in loader_of(data.test)] == [2, 2]
        monkeypatch.setattr(loading, "MOST_NUMBERS", 1)
        assert [share.number for share in loader_of(data.test)] == [1] * 4

    def test_tensors_need_no_processes(self):
        assert not hasattr(loader_of(load_data(Data()).train).batches, "num_workers")
