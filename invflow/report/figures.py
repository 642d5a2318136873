"""Charts as SVG in HTML: lines over axes, bars, legends, and the numbers as a table.

A chart is as wide as the page allows, and its text keeps its size: lines are drawn in a square of 1,000 units that the
browser stretches, ticks and labels are not. The colour and the mark of a line say which run it is of, its dashes which
quantity it shows; the style sheet gives ``run0`` and ``run1`` a colour in each theme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

UNITS = 1000.0
MOST_POINTS = 200
"""Of a line; of more, some are drawn, evenly chosen, the first and the last included."""
FROM_FACTOR = 20.0
"""A logarithmic axis is used if the largest value is that many times the smallest."""
_ZERO_ROOM = 0.12
"""The part of a logarithmic axis below its values that shows zeros, if there are some."""


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: in the legend and the table.
        points: pairs (x, y); those that are not finite are left out.
        run: which run it is of, 0 or 1: its colour and its mark.
        dashes: 0 for a solid line, 1 for a dashed, 2 for a dotted one.
        told: what the legend tells of it beside its name.
    """

    name: str
    points: Sequence[tuple[float, float]]
    run: int = 0
    dashes: int = 0
    told: str = ""

    @property
    def shown(self) -> list[tuple[float, float]]:
        """The points that are drawn."""
        finite = [(x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y)]
        if len(finite) <= MOST_POINTS:
            return finite
        return [finite[round(i * (len(finite) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]

    @property
    def style(self) -> str:
        """The classes of its elements."""
        return f"run{self.run} dashes{self.dashes}"


@dataclass(frozen=True)
class _Axis:
    """Places of values on an axis, in units from its beginning, and its ticks."""

    low: float
    high: float
    log: bool = False
    zero: bool = False

    def place(self, value: float) -> float:
        if self.log:
            if value <= 0:
                return 0.0
            part = (math.log10(value) - self.low) / (self.high - self.low)
            return UNITS * (_ZERO_ROOM + (1 - _ZERO_ROOM) * part if self.zero else part)
        return UNITS * (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 5) -> list[tuple[float, str]]:
        if not self.log:
            return [(value, number(value)) for value in even_ticks(self.low, self.high, most)]
        first, last = math.ceil(self.low), math.floor(self.high)
        step = max(1, math.ceil((last - first + 1) / most))
        found = [(10.0**power, number(10.0**power)) for power in range(first, last + 1, step)]
        return [(0.0, "0")] * self.zero + found


def _axis(values: Sequence[float], *, log: bool = False, whole: bool = False) -> _Axis:
    """An axis for some values.

    Args:
        values: at least one.
        log: whether a logarithmic one is wanted, if the values are that far apart.
        whole: whether the axis ends at the values, without room.
    """
    positive = [value for value in values if value > 0]
    zeros = len(positive) < len(values)
    if log and positive and min(values) >= 0 and (zeros or max(positive) > FROM_FACTOR * min(positive)):
        low, high = math.log10(min(positive)), math.log10(max(positive))
        room = max(0.5 - (high - low) / 2, 0.04 * (high - low))
        return _Axis(low - room, high + room, True, zeros)
    low, high = min(values), max(values)
    room = 0.0 if whole and high > low else 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    return _Axis(low - room, high + room)


def even_ticks(low: float, high: float, most: int) -> list[float]:
    """At most so many multiples of 1, 2 or 5 times a power of ten between two numbers.

    Examples:
        >>> even_ticks(0.0, 1.0, 6)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        >>> even_ticks(3, 41, 5)
        [10.0, 20.0, 30.0, 40.0]
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(times * power for times in (1, 2, 5, 10, 20) if (high - low) / (times * power) <= most - 0.5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number in few characters.

    Examples:
        >>> number(1200), number(0.25), number(3.2e-7), number(0.0)
        ('1,200', '0.25', '3.2e-07', '0')
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1000 and float(value).is_integer() and abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e7 else f"{value:.1e}".replace(".0e", "e")


def chart(title: str, lines: Sequence[Line], *, x: str, y: str, log: bool = False, note: str = "", key: str) -> str:
    """Lines over axes, with a legend and the numbers as a table; empty if there is no point to draw.

    Args:
        title: what is shown.
        lines: the lines, which share both axes.
        x: the label of the horizontal axis.
        y: that of the vertical axis, with the unit.
        log: whether the vertical axis is logarithmic if its values are far apart; zeros are at its foot.
        note: a sentence below the title.
        key: an id that no other chart of the page has.

    Examples:
        >>> drawn = chart("Loss", [Line("train", [(1, 2.0), (2, 1.5)])], x="epoch", y="nats", key="loss")
        >>> "M0 " in drawn, "<script" in chart("<script>", [Line("a", [(0, 0)])], x="x", y="y", key="k")
        (True, False)
    """
    lines = [line for line in lines if line.shown]
    if not lines:
        return ""
    along = _axis([one for line in lines for one, _ in line.shown], whole=True)
    up = _axis([one for line in lines for _, one in line.shown], log=log)
    drawn = "".join(_drawn(line, along, up) for line in lines)
    grid = "".join(f'<path class="grid" d="M0 {_y(up, value)}H1000"/>' for value, _ in up.ticks())
    ends = "; ".join(f"{line.name} from {number(line.shown[0][1])} to {number(line.shown[-1][1])}" for line in lines)
    scale = "logarithmic" if up.log else "linear"
    told = f"A chart of {y} on a {scale} axis by {x}: {ends}."
    rising = "".join(
        f'<text x="100%" y="{_y(up, value) / 10:.2f}%" dy="4" text-anchor="end">{escape(text)}</text>'
        for value, text in up.ticks()
    )
    rightwards = "".join(
        f'<text x="{along.place(value) / 10:.2f}%" y="14" text-anchor="middle">{escape(text)}</text>'
        for value, text in along.ticks()
    )
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3>{_paragraph(note)}</figcaption>'
        f'<p class="axis" aria-hidden="true">{escape(y)}</p><div class="plot">'
        f'<svg class="rising" aria-hidden="true">{rising}</svg>'
        f'<svg class="area" viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-labelledby="chart-{key}-title chart-{key}-told"><title id="chart-{key}-title">{escape(title)}</title>'
        f'<desc id="chart-{key}-told">{escape(told)}</desc>{grid}{drawn}</svg>'
        f'<svg class="along" aria-hidden="true">{rightwards}</svg></div>'
        f'<p class="axis along-name" aria-hidden="true">{escape(x)}</p>'
        f"{_legend(lines)}{_numbers(title, lines, x)}</figure>"
    )


def bar(part: float, run: int = 0) -> str:
    """A horizontal bar, as long as a part, from 0 to 1, of the cell that it fills; the number stands beside it."""
    width = 100 * min(1.0, max(0.0, part))
    return f'<svg class="bar run{run}" aria-hidden="true"><rect width="{width:.1f}%" height="100%" rx="2"/></svg>'


def _y(axis: _Axis, value: float) -> float:
    return round(UNITS - axis.place(value), 1)


def _drawn(line: Line, along: _Axis, up: _Axis) -> str:
    places = [(round(along.place(x), 1), _y(up, y)) for x, y in line.shown]
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
    # A line of no length with wide ends is a mark that the browser does not stretch.
    marked = places if len(places) <= 60 else [places[-1]]
    marks = "".join(f"M{x:g} {y:g}h0" for x, y in marked)
    return f'<path class="line {line.style}" d="{path}"/><path class="marks {line.style}" d="{marks}"/>'


def _legend(lines: Sequence[Line]) -> str:
    def swatch(line: Line) -> str:
        of_line, of_marks = f"line {line.style}", f"marks {line.style}"
        drawn = f'<path class="{of_line}" d="M2 6H34"/><path class="{of_marks}" d="M18 6h0"/>'
        return f'<svg class="swatch" viewBox="0 0 36 12" aria-hidden="true">{drawn}</svg>'

    names = (one.name + (f": {one.told}" if one.told else "") for one in lines)
    entries = (f"<li>{swatch(one)}{escape(name)}</li>" for one, name in zip(lines, names, strict=True))
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _numbers(title: str, lines: Sequence[Line], x: str) -> str:
    places = sorted({one for line in lines for one, _ in line.shown})
    known = [dict(line.shown) for line in lines]
    rows = [[number(one), *("" if (y := column.get(one)) is None else number(y) for column in known)] for one in places]
    made = table([x, *(line.name for line in lines)], rows, caption=f"{title}, in numbers")
    return f"<details><summary>Numbers<span class='unseen'> of {escape(title)}</span></summary>{made}</details>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str, plain: bool = True) -> str:
    """A table with a caption in a region that scrolls if the page is narrow. The first cell of a row is its head.

    Args:
        heads: of the columns.
        rows: the cells.
        caption: what it shows.
        plain: whether the cells are text; if not, those after the first are HTML.
    """
    head = "".join(f'<th scope="col">{escape(one)}</th>' for one in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell) if plain else cell}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scrolls" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""
