"""The sections of a report, each as HTML: of one run, or of two side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import TypeVar

from ..diagnostics.analysis import Spectrum
from ..diagnostics.memory import ActivationMemory
from ..diagnostics.pictures import Curve
from ..training.classification import ACCURACY
from ..training.density import BITS, NLL
from .collect import DTYPES, Errors, Missing, Portrait
from .diagram import diagram
from .figures import Line, bar, chart, number, table

T = TypeVar("T")

SCORES = {f"test_{score.name}": score for score in (ACCURACY, BITS, NLL)}
CURVES = (
    Curve("accuracy", "accuracy, %", factor=100),
    Curve("bits_per_dim", "bits per dimension"),
    Curve("nll", "negative log-likelihood, nats"),
    Curve("loss", "loss, as it is minimised", log_scale=True),
)
STAGES = {"train": "training", "val": "validation", "test": "test"}
EXACTNESS = {
    "float": "float: the inverse is right up to rounding",
    "grid": "grid: on its grid, the inverse returns every bit on the same machine",
    "exact": "exact: the inverse returns every bit, on every machine",
}
POLICIES = {
    "stored": "stored: all activations are kept",
    "reversible": "reversible: inputs are computed again from outputs",
    "checkpoint": "checkpoint: each layer runs a second time",
}


def overview(runs: Sequence[Portrait]) -> str:
    """The main figures of each run."""
    return side_by_side(runs, _tiles)


def chains(runs: Sequence[Portrait]) -> str:
    """The chain of each run, with shapes."""
    return side_by_side(runs, _chain)


def _chain(one: Portrait) -> str:
    region = f'class="scrolls chain" role="region" tabindex="0" aria-label="The chain of {escape(one.name)}"'
    return f"<div {region}>{diagram(one.model, name=one.name)}</div>"


def curves(runs: Sequence[Portrait]) -> str:
    """The metrics of the trainings by epoch."""
    drawn: list[tuple[list[Line], str]] = []
    for curve in CURVES:
        lines = []
        for index, one in enumerate(runs):
            for dashes, (stage, told) in enumerate(reversed(STAGES.items())):
                known = zip(one.metrics.column("epoch"), one.metrics.column(f"{stage}_{curve.name}"), strict=True)
                points = [(epoch + 1, curve.factor * y) for epoch, y in known if epoch is not None and y is not None]
                last = f"{number(points[-1][1])} at the end" if points else ""
                lines.append(Line(f"{letter(runs, index)}{told}", points, index, dashes, last))
        if not any(_same(lines, others) for others, _ in drawn):  # the loss of a density is its likelihood
            title = curve.label.partition(",")[0].capitalize()
            key = f"curve-{curve.name}"
            drawn.append((lines, chart(title, lines, x="epoch", y=curve.label, log=curve.log_scale, key=key)))
    shown = "".join(made for _, made in drawn)
    return f'<div class="charts">{shown}</div>' if shown else missing("The folder has no metrics of a training.")


def scores(runs: Sequence[Portrait]) -> str:
    """The test scores, the round trips and the sizes, a column for each run."""
    names = [name for name in SCORES if any(name in _found(one.scores, {}) for one in runs)]
    rows = [[_capital(f"test {SCORES[name].label}"), *(_score(one, name) for one in runs)] for name in names]
    for dtype in DTYPES:
        trips = [None if isinstance(one.errors, Missing) else one.errors.whole[dtype] for one in runs]
        row = ["" if trip is None else f"{trip.relative:.1e}, {100 * trip.bit_equal:.1f} % bit-equal" for trip in trips]
        rows.append([f"Round-trip error of the chain, {dtype}", *row])
    rows.append(["Parameters", *(f"{parameters(one):,}" for one in runs)])
    gaps = [f"{letter(runs, i)}{one.scores.why}" for i, one in enumerate(runs) if isinstance(one.scores, Missing)]
    note = "<p>The relative error is the largest difference over the largest magnitude of any state on the way.</p>"
    return "".join(map(missing, gaps)) + table(["", *names_of(runs)], rows, caption="Figures on test samples") + note


def errors(runs: Sequence[Portrait]) -> str:
    """The error of each state on the way back, and what each layer loses alone."""
    lines = []
    for index, one in enumerate(runs):
        if isinstance(one.errors, Missing):
            continue
        for dashes, dtype in enumerate(DTYPES):
            points = [(float(depth), row.back[dtype]) for depth, row in enumerate(one.errors.depths)]
            largest = f"{number(max(y for _, y in points))} at most" if points else ""
            lines.append(
                Line(f"{letter(runs, index)}{dtype}", [*points, (float(len(points)), 0.0)], index, dashes, largest)
            )
    note = "The chain runs backwards from its output, on the right, to its input, on the left."
    drawn = chart(
        "Error of each state on the way back", lines, x="depth, in layers", y="relative error", log=True, note=note,
        key="errors",
    )  # fmt: skip
    return drawn + side_by_side(runs, lambda one: of(one.errors, lambda found: _depths(one, found)))


def spectra(runs: Sequence[Portrait]) -> str:
    """The singular values of the Jacobian: by depth, and all of those of the chain."""
    by_depth, of_chain, said = [], [], []
    for index, one in enumerate(runs):
        which = letter(runs, index)
        if isinstance(one.spectra, Missing):
            said.append(missing(f"{which}{one.spectra.why}"))
            continue
        known = one.spectra.spectra
        last = "smallest" if one.spectra.exact else f"number {len(known[0].values[0])}" if known else ""
        said += [missing(f"{which}{note}") for note in one.spectra.notes if not note.startswith("no separation")]
        for dashes, (name, place) in enumerate((("largest", 0), (last, -1))):
            points = [(float(row.depth), row.values[0][place]) for row in known]
            last_one = f"{number(points[-1][1])} after all layers" if points else ""
            by_depth.append(Line(f"{which}{name}", points, index, dashes, last_one))
        if known:
            of_chain.append(Line(f"{which}whole chain", _ordered(known[-1]), index))
    drawn = chart(
        "Singular values by depth", by_depth, x="depth, in layers", y="singular value", log=True, key="singular-depth",
        note="How much the first layers stretch the most and the least stretched direction at a test sample.",
    ) + chart(
        "Singular values of the chain", of_chain, x="number, from the largest", y="singular value", log=True,
        note="Values near 1 keep distances; a large ratio of the first to the last loses digits on the way back.",
        key="singular-chain",
    )  # fmt: skip
    return "".join(said) + (f'<div class="charts">{drawn}</div>' if drawn else "")


def memory(runs: Sequence[Portrait]) -> str:
    """What training keeps of the activations, by policy."""
    rooms = [one.memory for one in runs if isinstance(one.memory, ActivationMemory)]
    most = max((size for room in rooms for size in room.peak.values()), default=1) or 1

    def draw(one: Portrait) -> str:
        def rows(found: ActivationMemory) -> str:
            index, used = runs.index(one), one.model.bijection.backprop
            cells = [
                [
                    told + (" (this run)" if policy == used else ""),
                    _bytes(found.kept[policy]),
                    _bytes(found.peak[policy]) + bar(found.peak[policy] / most, index),
                ]
                for policy, told in POLICIES.items()
            ]
            caption = f"Activations of a batch of {found.batch}: {one.name}"
            return table(["policy", "kept for backward", "most at once"], cells, caption=caption, plain=False)

        return of(one.memory, rows)

    return side_by_side(runs, draw)


def side_by_side(runs: Sequence[Portrait], draw: Callable[[Portrait], str]) -> str:
    """What is drawn of one run; of two, in two columns with their names, which a narrow page stacks."""
    if len(runs) == 1:
        return draw(runs[0])
    columns = (
        f'<div><h3 class="name run{i}">{escape(name)}</h3>{draw(one)}</div>'
        for i, (name, one) in enumerate(zip(names_of(runs), runs, strict=True))
    )
    return f'<div class="pair">{"".join(columns)}</div>'


def names_of(runs: Sequence[Portrait]) -> list[str]:
    """What the page calls the runs; two have a letter each, because their names may be the same."""
    return [letter(runs, index, ": ") + one.name for index, one in enumerate(runs)]


def letter(runs: Sequence[Portrait], index: int, then: str = ", ") -> str:
    """The letter of one of two runs; of one run, nothing."""
    return "" if len(runs) == 1 else "AB"[index] + then


def of(found: T | Missing, draw: Callable[[T], str]) -> str:
    """What was found as HTML, or why nothing was."""
    return missing(found.why) if isinstance(found, Missing) else draw(found)


def missing(why: str) -> str:
    """Why something is not shown, or what to know of it."""
    return f'<p class="missing">{escape(_capital(why))}</p>'


def parameters(one: Portrait) -> int:
    """The number of trained numbers of a run's model."""
    return sum(weight.numel() for weight in one.model.parameters())


def _exactness(one: Portrait) -> str:
    """The level of exactness, and what it means for this chain."""
    chain = one.model.bijection
    said = EXACTNESS[chain.exactness]
    if not chain.invertible:
        return f"{said}, of each trunk between what has no inverse"
    return said if chain.surjective else f"{said}, from images of the chain alone"


def _tiles(one: Portrait) -> str:
    def entries() -> Iterator[tuple[str, str, str]]:
        for name in _found(one.scores, {}):
            yield f"test {SCORES[name].label}", _score(one, name), ""
        if isinstance(one.errors, Errors):
            trip = one.errors.whole["float32"]
            yield (
                "round-trip error, float32",
                f"{trip.relative:.1e}",
                f"{100 * trip.bit_equal:.1f} % of the numbers bit-equal",
            )
        yield "exactness", one.model.bijection.exactness, _exactness(one).partition(": ")[2]
        yield "parameters", f"{parameters(one):,}", ""
        seconds = one.run.record.get("seconds")
        if isinstance(seconds, int | float):
            yield "training time", _duration(seconds), f"{len(one.metrics)} epochs" if len(one.metrics) else ""
        yield "data", one.data, ""

    tiles = "".join(
        f"<div><dt>{escape(_capital(name))}</dt><dd><strong>{escape(value)}</strong>"
        + (f"<span>{escape(more)}</span>" if more else "")
        + "</dd></div>"
        for name, value, more in entries()
    )
    notices = [one.run.unfinished, one.model.caveat]
    said = "".join(f'<p class="notice">{escape(_capital(text))}</p>' for text in notices if text)
    note = one.run.spec.document.get("note")
    noted = f'<p class="note">{escape(note)}</p>' if isinstance(note, str) else ""
    return f'{noted}{said}<dl class="tiles">{tiles}</dl>'


def _depths(one: Portrait, found: Errors) -> str:
    def errors(row: dict[str, float | None]) -> list[str]:
        return ["no inverse" if (error := row[name]) is None else number(error) for name in DTYPES]

    rows = [
        [str(i), row.layer, str(row.shape), f"{row.parameters:,}", row.exactness, *errors(row.alone)]
        for i, row in enumerate(found.depths, start=1)
    ]
    heads = [
        "depth",
        "layer",
        "shape after it",
        "parameters",
        "exactness",
        *(f"error alone, {name}" for name in DTYPES),
    ]
    caption = f"Each layer alone, forward and back on {found.samples} test samples: {one.name}"
    made = table(heads, rows, caption=caption)
    level = one.model.bijection.exactness
    reason = one.model.bijection.limit.reason
    why = f" It can be no better, because {reason}." if reason and level != "exact" else ""
    said = f"<p>The whole chain is {escape(_exactness(one))}.{escape(why)}</p>"
    return f"{said}<details><summary>Layer by layer</summary>{made}</details>"


def _ordered(spectrum: Spectrum) -> list[tuple[float, float]]:
    return [(float(place), value) for place, value in enumerate(spectrum.values[0], start=1)]


def _same(lines: Sequence[Line], others: Sequence[Line]) -> bool:
    """Whether two charts would show the same."""
    return [list(line.points) for line in lines] == [list(line.points) for line in others]


def _found(what: T | Missing, otherwise: T) -> T:
    return otherwise if isinstance(what, Missing) else what


def _score(one: Portrait, name: str) -> str:
    value = _found(one.scores, {}).get(name)
    return "" if value is None else SCORES[name].text(value)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _bytes(count: int) -> str:
    """A number of bytes in a unit that suits it.

    Examples:
        >>> _bytes(900), _bytes(2_500_000)
        ('900 B', '2.4 MiB')
    """
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _duration(seconds: float) -> str:
    """A time in words.

    Examples:
        >>> _duration(42.3), _duration(130), _duration(7300)
        ('42 s', '2 min 10 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
