"""CSV and Parquet."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from invflow.data import table as table_module
from tests.data_sets.files import loaded, refused


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
        inner = table_module._Rows(table_module._open(tmp_path / path), ["a", "b"], None, {})
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
