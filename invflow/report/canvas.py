"""SVG elements, and the size of text, which is set in a font whose letters are equally wide."""

from __future__ import annotations

import html

SIZE = 12.0
"""Of letters, in units of the drawing."""
BOLD = 13.0
LINE = 17.0
"""From one line of text to the next."""
LETTER = 0.62
"""The width of a letter by the size: that of the usual fonts is 0.55 to 0.61."""
_KNOWN = str.maketrans("", "", "\N{MULTIPLICATION SIGN}→…")

STYLE = """
.invflow-diagram { display: block; width: 100%; max-width: 640px; height: auto; color: inherit; }
.invflow-diagram text { fill: currentColor; font: 12px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.invflow-diagram text.title { font-size: 13px; font-weight: 700; }
.invflow-diagram text.name { font-size: 16px; font-weight: 700; }
.invflow-diagram text.about { font-style: italic; }
.invflow-diagram rect { stroke: currentColor; fill: none; }
.invflow-diagram rect.layer { fill: var(--diagram-layer, #4c8bf526); }
.invflow-diagram rect.widens { fill: var(--diagram-layer, #4c8bf526); stroke-dasharray: 10 3; }
.invflow-diagram rect.net { fill: var(--diagram-net, #e0922f2e); stroke-dasharray: 5 3; }
.invflow-diagram rect.inset { fill: var(--diagram-net, #e0922f50); stroke-width: .6; }
.invflow-diagram rect.end { fill: var(--diagram-end, #2f9e6a2e); }
.invflow-diagram rect.more { stroke-dasharray: 1 4; stroke-linecap: round; }
.invflow-diagram rect.frame { stroke-width: .8; stroke-opacity: .6; }
.invflow-diagram rect.header { fill: var(--diagram-frame, #8080801f); stroke-width: .8; stroke-opacity: .6; }
.invflow-diagram path { fill: none; stroke: currentColor; stroke-width: 1.4; }
.invflow-diagram path.bundle { stroke-width: 4; }
.invflow-diagram path.context { stroke-dasharray: 1 4; stroke-width: 2; stroke-linecap: round; }
.invflow-diagram polygon { fill: currentColor; }
svg.invflow-diagram:root { color: #16181d; background: #fff; }
@media (prefers-color-scheme: dark) { svg.invflow-diagram:root { color: #e8e8ea; background: #16181d; } }
@media print { .invflow-diagram, svg.invflow-diagram:root { color: #000; background: none; } }
"""
"""A file has a background of its own; within a page, it has that of the page, and the colour of its text."""


def escaped(text: str) -> str:
    """A text for XML, which has no place for control characters."""
    return html.escape("".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text))


def cells(text: str) -> int:
    """The width of a text in letters; those outside the Latin alphabet count as two."""
    return sum(1 if ord(letter) < 0x250 or letter in "→…" else 2 for letter in text)


def width_of(text: str, size: float = SIZE) -> float:
    """The width of a text, or somewhat more."""
    return cells(text) * size * LETTER


def lines_of(text: str, width: float, size: float = SIZE) -> list[str]:
    """A text in lines of at most this width; a word that is longer is broken.

    Examples:
        >>> lines_of("one two three", width_of("one two"))
        ['one two', 'three']
        >>> lines_of("abcdef", width_of("abcd"))
        ['abcd', 'ef']
    """
    most = max(2, int(width / (size * LETTER) + 1e-6))
    lines = [""]
    for word in text.split():
        rest = word
        if lines[-1] and cells(lines[-1]) + 1 + cells(rest) <= most:
            lines[-1] += f" {rest}"
            continue
        while rest:
            fitting = next((n for n in range(len(rest), 0, -1) if cells(rest[:n]) <= most), 1)
            lines.append(rest[:fitting])
            rest = rest[fitting:]
    return [line for line in lines if line]


MARK = '<svg xmlns="http://www.w3.org/2000/svg" class="invflow-diagram"'
"""By which a file is known as a diagram."""


class Canvas:
    """Elements of a drawing, in the order in which they cover each other: frames, wires, boxes, words."""

    def __init__(self) -> None:
        self._layers: dict[str, list[str]] = {"frames": [], "wires": [], "boxes": [], "inside": [], "words": []}

    def box(self, kind: str, x: float, y: float, width: float, height: float, tip: str = "") -> None:
        """A rectangle; a frame lies below everything else."""
        layer = self._layers["frames" if kind == "frame" else "boxes"]
        place = f'x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{_number(height)}"'
        inside = f"><title>{escaped(tip)}</title></rect>" if tip else "/>"
        layer.append(f'<rect class="{kind}" {place} rx="{0 if kind == "header" else 4}"{inside}')

    def text(self, kind: str, x: float, y: float, text: str, size: float = SIZE, tip: str = "") -> None:
        """A line of text from ``x`` on, with its baseline at ``y``."""
        known = text.translate(_KNOWN).isascii()
        # In a font of other letters nobody knows how wide they are.
        fitted = "" if known else f' textLength="{_number(width_of(text, size))}" lengthAdjust="spacingAndGlyphs"'
        inside = f"<title>{escaped(tip)}</title>" if tip else ""
        self._layers["words"].append(
            f'<text class="{kind}" x="{_number(x)}" y="{_number(y)}"{fitted}>{escaped(text)}{inside}</text>'
        )

    def wire(
        self,
        kind: str,
        start: tuple[float, float],
        end: tuple[float, float],
        *,
        arrow: bool = False,
        inside: bool = False,
    ) -> None:
        """A wire downwards, which bends if its ends are not one above the other; between blocks, or inside of one."""
        (x, y), (to_x, to_y) = start, end
        middle = (y + to_y) / 2
        bends = abs(to_x - x) > 0.1 and abs(to_y - y) > 0.1
        course = f"C {_number(x)} {_number(middle)} {_number(to_x)} {_number(middle)}" if bends else "L"
        self._layers["inside" if inside else "wires"].append(
            f'<path class="{kind}" d="M {_number(x)} {_number(y)} {course} {_number(to_x)} {_number(to_y)}"/>'
        )
        if arrow:
            self._tip(to_x, to_y, sideways=abs(to_y - y) <= 0.1)

    def _tip(self, x: float, y: float, *, sideways: bool) -> None:
        """The tip of an arrow downwards, or to the left."""
        points = ((x, y), (x + 6, y - 4), (x + 6, y + 4)) if sideways else ((x, y), (x - 4, y - 6), (x + 4, y - 6))
        listed = " ".join(f"{_number(a)},{_number(b)}" for a, b in points)
        self._layers["wires"].append(f'<polygon points="{listed}"/>')

    def svg(self, width: float, height: float, title: str, description: str) -> str:
        """The ``<svg>`` element."""
        inside = "\n".join(line for layer in self._layers.values() for line in layer)
        size = f"{_number(width)} {_number(height)}"
        return (
            f'{MARK} role="img" viewBox="0 0 {size}">\n'
            f"<title>{escaped(title)}</title>\n<desc>{escaped(description)}</desc>\n<style>{STYLE}</style>\n"
            f"{inside}\n</svg>\n"
        )


def _number(value: float) -> str:
    return f"{round(value, 1):g}"
