"""Every fault of a document is reported at its place, with a message that says how to fix it."""

from __future__ import annotations

import json

import pytest

import invflow
from invflow import Limits, SpecError

from .faults import FAULTS, document


def build(source, **options):
    """Builds a source, with its head or its prior if it has one."""
    spec = invflow.load_spec(source, **options)
    return (invflow.build_model if spec.head or spec.prior else invflow.build)(spec, **options)


def refuse(source, **options):
    """The error of a source that must not build."""
    with pytest.raises(SpecError) as caught:
        build(source, **options)
    return caught.value


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a text into a file and returns its name, relative as a user would give it."""
    monkeypatch.chdir(tmp_path)

    def write(text, encoding="utf-8"):
        (tmp_path / "spec.json").write_text(text, encoding=encoding)
        return "spec.json"

    return write


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_is_one_error_at_its_place(name, write):
    fault = FAULTS[name]
    error = refuse(write(fault.text))
    assert error.errors == [{"path": fault.path, "line": fault.line, "column": fault.column, "message": fault.message}]
    place = f"spec.json:{fault.line}:{fault.column}: "
    assert str(error) == place + (fault.path and f"{fault.path}: ") + fault.message


def only_text_has(fault):
    """Whether a fault is lost after Python has parsed the document, such as a syntax error or a duplicate key."""
    try:
        return not isinstance(json.loads(fault.text), dict) or "duplicate" in fault.message
    except (ValueError, RecursionError):
        return True


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if not only_text_has(fault)])
def test_a_dict_is_refused_for_the_same_without_a_place(name):
    fault = FAULTS[name]
    parsed = json.loads(fault.text)
    error = refuse(parsed)
    if any(word in fault.message for word in ("NaN", "Infinity", "1e999")):
        (only,) = error.errors
        assert only["line"] is only["column"] is None
        assert only["message"].startswith("the dict is not a JSON document: ")
    else:
        assert error.errors == [{"path": fault.path, "line": None, "column": None, "message": fault.message}]
        assert str(error) == (fault.path and f"{fault.path}: ") + fault.message


def test_there_are_faults_of_every_kind():
    assert len(FAULTS) > 150
    assert len({(fault.path, fault.message) for fault in FAULTS.values()}) > 140


def test_the_example_of_the_design(write):
    text = """{
  "spec_version": 1,
  "input": {"shape": [1, 28, 28]},
  "layers": [
    {"type": "psi", "block_size": 4},
    {"type": "split"},
    {"type": "repeat", "times": 4, "layers": [
      {"type": "additive_copling", "net": {"type": "conv"}}
    ]}
  ]
}"""
    assert str(refuse(write(text))) == (
        "spec.json:8:7: layers.2.layers.0: unknown layer type 'additive_copling'; did you mean 'additive_coupling'?"
    )


def test_two_faults_are_two_errors_in_the_order_of_the_text(write):
    text = document('{"type": "spilt"}', '{"type": "psi", "blocksize": 2, "layout": 1}', more='"epochs": 3')
    assert [(e["line"], e["column"], e["path"]) for e in refuse(write(text)).errors] == [
        (4, 5, "layers.0"),
        (5, 21, "layers.1.blocksize"),
        (5, 47, "layers.1.layout"),
        (6, 6, "epochs"),
    ]


def test_two_faults_of_the_text_are_two_errors(write):
    text = '{"a": NaN, "b": 1,\n "b": -1e999}'
    assert [(e["line"], e["column"], e["message"]) for e in refuse(write(text)).errors] == [
        (1, 7, "NaN is not allowed in a spec"),
        (2, 2, "duplicate key 'b'"),
        (2, 7, "the number -1e999 is out of range"),
    ]


def test_two_faults_of_repeats_are_two_errors(write):
    text = document('{"type": "repeat", "times": 0}', '{"type": "psi", "block_size": {"$var": "b"}}')
    assert [(e["line"], e["column"]) for e in refuse(write(text)).errors] == [(4, 5), (4, 33), (5, 35)]


def test_items_differ_so_each_iteration_has_its_errors(write):
    text = document(
        '{"type": "repeat", "times": 4, "with": {"b": [0, 2, -1, 1]}, '
        '"layers": [{"type": "psi", "block_size": {"$item": "b"}}]}'
    )
    assert [e["message"] for e in refuse(write(text)).errors] == [
        "input should be greater than 0, got 0 (iteration 1 of 4)",
        "input should be greater than 0, got -1 (iteration 3 of 4)",
    ]


def test_a_hundred_errors_are_enough(write):
    keys = ", ".join(f'"k{i}": {i}' for i in range(5000))
    errors = refuse(write(document(f'{{"type": "psi", {keys}}}'))).errors
    assert len(errors) == 100
    assert [e["path"] for e in errors] == [f"layers.0.k{i}" for i in range(100)]


def test_columns_count_characters_and_windows_line_ends_and_a_mark_at_the_start_do_no_harm(write):
    text = document('{"note": "größe ✓", "type": "psi", "x": 1}')
    assert [(e["line"], e["column"]) for e in refuse(write(text)).errors] == [(4, 40)]
    for encoding, ends in (("utf-8-sig", text), ("utf-8", text.replace("\n", "\r\n"))):
        assert [(e["line"], e["column"]) for e in refuse(write(ends, encoding)).errors] == [(4, 40)]


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(refuse("none.json")) == "none.json: no such file"
    (tmp_path / "folder").mkdir()
    assert str(refuse("folder")) == "folder: cannot be read: Is a directory"
    (tmp_path / "bytes.json").write_bytes(b'{\n "name": "\xff"}')
    assert str(refuse("bytes.json")) == "bytes.json:2:11: not UTF-8 text"
    (tmp_path / "long.json").write_bytes(b" " * (2**20 + 1))
    assert str(refuse("long.json")) == "long.json:1:1: the file is larger than the limit of 1048576 bytes"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1, 2}, "the dict is not a JSON document: Object of type set is not JSON serializable"),
        ("x" * 2**20, f"the document has {2**20 + 12} bytes as JSON, the limit is {2**20}"),
        (2**60, "the number 1152921504606846976 is out of range"),
    ],
)
def test_dicts_that_are_no_document(value, message):
    assert [e["message"] for e in refuse({"name": value}).errors] == [message]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(text_bytes=100), "the file is larger than the limit of 100 bytes"),
        (Limits(depth=3), "objects and lists are nested deeper than the limit of 3"),
        (Limits(layers=4), "repeat 5 times makes more layers than the limit of 4"),
        (Limits(layers=5), "more layers than the limit of 5 once every repeat is expanded"),
        (Limits(values=20), "more than the limit of 20 values once everything is expanded"),
        (Limits(parameters=50), "52 parameters up to here, the limit is 50 (iteration 2 of 5)"),
        (
            Limits(operations=10**7),
            "building takes 18030000 operations up to here, the limit is 10000000 (iteration 1 of 5)",
        ),
        (Limits(state=3), "a state of shape (4,) holds 4 numbers, the limit is 3"),
    ],
)
def test_every_limit_is_adjustable(limits, message, write):
    path = write(
        json.dumps(
            {
                "input": {"shape": [4]},
                "layers": [
                    {"type": "repeat", "times": 5, "layers": [
                        {"type": "split"},
                        {"type": "additive_coupling", "net": {"type": "mlp", "hidden": [4]}},
                        {"type": "merge"},
                        {"type": "permute", "seed": 1},
                    ]},
                ],
            }
        )
    )  # fmt: skip
    assert len(invflow.build(path)) == 20
    assert [e["message"] for e in refuse(path, limits=limits).errors] == [message]


def test_an_error_pickles_and_keeps_the_shape_error_as_its_cause():
    import pickle

    error = refuse({"input": {"shape": [3]}, "layers": [{"type": "psi"}]})
    assert isinstance(error.__cause__, invflow.ShapeError)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.errors, str(copy)) == (error.errors, str(error))
