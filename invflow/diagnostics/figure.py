"""Matplotlib's figure, made without pyplot, which notebooks show like one of pyplot's."""

from __future__ import annotations

import io

from matplotlib import figure

DPI = 130


class Figure(figure.Figure):
    """A figure that draws itself as PNG where a notebook asks for it."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(drawn: figure.Figure) -> bytes:
    """The content of a PNG file of a figure."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
