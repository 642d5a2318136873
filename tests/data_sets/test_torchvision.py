"""Torchvision's data sets, from files as they have them."""

from __future__ import annotations

import pickle
from hashlib import md5

import numpy as np
import pytest
import torch

from invflow.errors import DataError
from invflow.spec.training import Data
from invflow.training.data import load_data
from tests.data_sets.files import classifier


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
