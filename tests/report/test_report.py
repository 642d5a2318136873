"""The report on a run: what it shows of each kind, that it is whole in itself, and that it runs nothing of a spec."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch

import invflow
from invflow.errors import RunError
from invflow.report.collect import Gallery, Missing, PlaneDensity, Walks, portrait
from invflow.report.figures import Line, chart
from invflow.report.images import png_of
from invflow.report.page import SECTIONS, page
from invflow.report.write import report_on, write_report
from invflow.training import run as runs
from invflow.training.frozen import freeze_run
from invflow.training.run_folder import Run
from tests.test_density_training import images, points
from tests.test_hybrid import spec as hybrid
from tests.test_training import tiny

LARGEST = 3_000_000
EXACT = {"input": {"shape": [2]}, "layers": [], "numerics": {"mode": "exact"}}
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


def conditional(**training):
    """A flow of the moons given their class."""
    spec = points(**training)
    data = {**spec.document["training"]["data"], "context": "labels"}
    net = {"type": "mlp", "hidden": [8]}
    layers = [{"type": "split"}, *2 * [{"type": "affine_coupling", "net": net}], {"type": "merge"}]
    training = {**spec.document["training"], "data": data}
    return spec.replace(input={"shape": [2], "context_shape": [2]}, layers=layers, training=training)


KINDS = {
    "classifier": lambda: tiny(epochs=2),
    "flow of images": lambda: images(epochs=2),
    "flow of the plane": lambda: points(epochs=2),
    "flow with a context": lambda: conditional(epochs=2),
    "hybrid": lambda: invflow.load_spec(hybrid(epochs=2)),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a run of a kind, once."""
    known = {}

    def run(kind):
        if kind not in known:
            folder = tmp_path_factory.mktemp("runs") / "run"
            if kind == "exact":
                known[kind] = freeze_run(run("classifier"), folder, invflow.load_spec(EXACT).top.numerics)[0]
            else:
                known[kind] = runs.train(KINDS[kind](), folder, progress=False)
        return known[kind]

    return run


class Parts(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.mark.parametrize("kind", [*KINDS, "exact"])
def test_every_kind_of_run_has_a_whole_page(trained, kind):
    run = trained(kind)
    text = report_on([run])
    assert len(text.encode()) < LARGEST
    parts = Parts(text)
    assert [one["id"] for one in parts.named("section")] == list(SECTIONS)
    assert len(parts.named("h1")) == 1
    assert run.spec.hash in parts.text
    assert f"{sum(weight.numel() for weight in run.model.parameters()):,}" in parts.text
    assert "Error:" not in parts.text, "something failed that is no refusal of the library"
    addresses = [one.get("src") or one.get("href") for tag, one in parts.elements if one.keys() & {"src", "href"}]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"https?://", re.sub(r'xmlns="[^"]*"|https?://[^"\s<]*schema[^"\s<]*', "", text))
    assert all("alt" in one for one in parts.named("img"))
    ids = [one["id"] for _, one in parts.elements if "id" in one]
    assert len(ids) == len(set(ids))


def test_what_a_classifier_shows(trained):
    found = portrait(trained("classifier"))
    assert found.scores == {"test_accuracy": trained("classifier").record["test_accuracy"]}
    assert isinstance(found.samples, Gallery)
    assert isinstance(found.walks, Walks)
    assert len(found.walks.frames) == 5
    assert found.reconstructions.equal == found.reconstructions.originals.numel()
    assert len(found.spectra.spectra[-1].values[0]) == 64
    depths = found.errors.depths
    assert [row.layer for row in depths] == [step.title for step in found.model.bijection.steps((1, 8, 8))]
    assert all(0 <= row.back["float64"] < 1e-13 for row in depths)
    assert found.memory.batch == 16


def test_what_an_exact_run_shows(trained):
    found = portrait(trained("exact"))
    assert all(trip.bit_equal == 1 for trip in found.errors.whole.values())
    assert {error for row in found.errors.depths for error in row.back.values()} == {0.0}
    assert isinstance(found.spectra, Missing)
    assert "integer nets have no derivatives" in found.spectra.why
    assert "returns every bit" in Parts(page([found])).text


def test_what_a_flow_of_the_plane_shows(trained):
    found = portrait(trained("flow of the plane"))
    assert set(found.scores) == {"test_nll"}
    (density,) = found.samples
    assert isinstance(density, PlaneDensity)
    assert density.log_density.isfinite().all()
    assert isinstance(found.walks, Missing)


def test_each_class_of_a_context_has_its_density(trained):
    found = portrait(trained("flow with a context")).samples
    assert [one.name for one in found] == ["upper", "lower"]
    assert not torch.equal(found[0].log_density, found[1].log_density)


def test_two_runs_are_side_by_side(trained):
    text = report_on([trained("classifier"), trained("flow of images")])
    parts = Parts(text)
    assert ("A: tiny" in parts.text, "B: images" in parts.text) == (True, True)
    lines = [one["class"] for one in parts.named("path") if one["class"].startswith("line")]
    assert {name.split()[1] for name in lines} == {"run0", "run1"}
    assert "Differences of the specs" in parts.text
    assert len(parts.named("input")) == 1, "one slider for the walks of both"
    assert len(text.encode()) < LARGEST


def test_what_strangers_write_is_text(trained, tmp_path):
    folder = tmp_path / "hostile<i>"
    spec = tiny(epochs=1).replace(name=HOSTILE, note=HOSTILE)
    run = runs.train(spec, folder, progress=False)
    run.update(
        warnings=[{"kind": HOSTILE, "text": HOSTILE, "count": HOSTILE}],
        versions={HOSTILE: HOSTILE},
        why=HOSTILE,
        overrides={HOSTILE: HOSTILE},
        hardware={HOSTILE: HOSTILE},
    )
    text = report_on([run, run])
    parts = Parts(text)
    assert "<img src=x" not in text
    assert len(parts.named("script")) == 1
    assert not [name for _, attributes in parts.elements for name in attributes if name.startswith("on")]
    assert not parts.named("i")
    assert parts.text.count("alert(1)") > 5


def test_nothing_but_its_own_script_may_run(trained):
    (policy,) = [
        one["content"]
        for one in Parts(report_on([trained("classifier")])).named("meta")
        if one.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; ")
    assert "script-src 'sha256-" in policy
    assert "unsafe" not in policy.partition("script-src")[2]


def test_a_part_that_fails_is_a_gap_with_a_reason(trained, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("an iteration did not converge")

    monkeypatch.setattr("invflow.report.collect.analyse", fail)
    text = Parts(report_on([trained("classifier")])).text
    assert "RuntimeError: an iteration did not converge" in text
    assert "Test accuracy" in text


def test_a_run_on_data_of_a_program_is_shown_without_them(tmp_path):
    values, labels = torch.rand(60, 1, 8, 8), torch.arange(60) % 10
    spec = tiny().replace(training={"epochs": 1, "batch_size": 16})
    run = invflow.fit(spec, (values, labels), tmp_path / "run", progress=False)
    text = Parts(report_on([run])).text
    assert "data" in text
    assert "additive_coupling" in text


def test_the_file(trained, tmp_path):
    run = trained("classifier")
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    here = Run.open(folder)
    assert write_report([here]) == folder / "report.html"
    assert write_report([here], tmp_path / "new" / "one.html").is_file()
    assert write_report([here]) == folder / "report.html", "an older report is replaced"
    (tmp_path / "letter.html").write_text("<p>Dear reader</p>")
    with pytest.raises(RunError, match=r"letter\.html: exists already and is no report"):
        write_report([here], tmp_path / "letter.html")
    assert (tmp_path / "letter.html").read_text() == "<p>Dear reader</p>"


class TestChart:
    def test_places(self):
        """The middle of a linear axis is in the middle; a larger value is higher, which is a smaller y."""
        drawn = chart("t", [Line("a", [(0, 0.0), (1, 5.0), (2, 10.0)])], x="x", y="y", key="k")
        path, *_ = [one["d"] for one in Parts(drawn).named("path") if one["class"].startswith("line")]
        (x0, y0), (x1, y1), (x2, y2) = [map(float, pair.split()) for pair in path.removeprefix("M").split("L")]
        assert (x0, x1, x2) == (0, 500, 1000)
        assert y0 > y1 > y2
        assert y1 == 500

    def test_zeros_are_at_the_foot_of_a_logarithmic_axis(self):
        drawn = chart("t", [Line("a", [(0, 0.0), (1, 1e-8), (2, 1e-4)])], x="x", y="y", log=True, key="k")
        path, *_ = [one["d"] for one in Parts(drawn).named("path") if one["class"].startswith("line")]
        assert path.startswith("M0 1000L")
        assert "logarithmic" in drawn

    @pytest.mark.parametrize("values", [[], [math.nan, math.inf]])
    def test_nothing_to_draw(self, values):
        assert chart("t", [Line("a", list(enumerate(values)))], x="x", y="y", key="k") == ""

    @pytest.mark.parametrize("values", [[0.0], [1.0], [-2.0, -2.0], [1e-300, 1e300], [0.0, 0.0]])
    @pytest.mark.parametrize("log", [False, True])
    def test_every_range_is_drawn(self, values, log):
        drawn = chart("t", [Line("a", list(enumerate(values)))], x="x", y="y", log=log, key="k")
        assert "nan" not in drawn
        assert "inf" not in drawn


def test_a_large_image_is_made_smaller():
    assert len(png_of(torch.rand(3, 256, 256))) < 48 * 48 * 3 + 1000


def test_warnings_of_the_training_are_kept(tmp_path, monkeypatch):
    import warnings

    from invflow.training.module import ModelTraining

    step = ModelTraining.training_step

    def training_step(module, given, index):
        warnings.warn("the weather is bad", UserWarning, stacklevel=1)
        return step(module, given, index)

    monkeypatch.setattr(ModelTraining, "training_step", training_step)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.warns(UserWarning, match="weather"):
            run = runs.train(tiny(epochs=1), tmp_path / "run", progress=False)
    (entry,) = json.loads((run.folder / "run.json").read_text())["warnings"]
    assert entry == {"kind": "UserWarning", "text": "the weather is bad", "count": 4}
    assert "the weather is bad" in Parts(report_on([run])).text


@pytest.mark.parametrize(
    "record", [{"warnings": "x", "hardware": 3}, {"warnings": [7], "versions": [], "overrides": 1}]
)
def test_a_record_of_a_stranger_ends_in_a_page(trained, tmp_path, record):
    folder = tmp_path / "run"
    shutil.copytree(trained("classifier").folder, folder)
    (folder / "run.json").write_text(json.dumps(record | {"status": "finished"}))
    assert "Error by depth" in report_on([Run.open(folder)])


def test_a_section_that_cannot_be_drawn_leaves_the_others(trained, monkeypatch):
    def fail(runs):
        raise ZeroDivisionError("of a region without a width")

    monkeypatch.setitem(SECTIONS, "samples", ("Samples", fail))
    text = report_on([trained("classifier")])
    assert "This part cannot be drawn: ZeroDivisionError: of a region without a width" in text
    assert "Singular values" in text
