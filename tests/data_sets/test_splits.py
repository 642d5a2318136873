"""Parts of a data set, and paths that lead to no data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from invflow.spec.training import Data
from invflow.training.data import load_data
from tests.data_sets.files import loaded, pictures, refused


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
