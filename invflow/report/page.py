"""The page of a report: one HTML file with its style and its script in it, which needs no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from datetime import datetime
from html import escape
from importlib.metadata import version
from importlib.resources import files

from . import pictured, sections
from .collect import Portrait
from .sections import names_of

SECTIONS: dict[str, tuple[str, Callable[[Sequence[Portrait]], str]]] = {
    "overview": ("Overview", sections.overview),
    "chain": ("The chain", sections.chains),
    "curves": ("Training", sections.curves),
    "scores": ("Figures", sections.scores),
    "reconstructions": ("Run backwards", pictured.reconstructions),
    "errors": ("Error by depth", sections.errors),
    "walks": ("Interpolation", pictured.walks),
    "samples": ("Samples", pictured.samples),
    "spectra": ("Singular values", sections.spectra),
    "memory": ("Memory", sections.memory),
    "warnings": ("Warnings", pictured.warned),
    "origin": ("Versions and spec", pictured.origin),
}
"""The sections in their order: their titles, and what makes the HTML of each."""


def page(runs: Sequence[Portrait]) -> str:
    """The HTML of a report on one run, or on two side by side.

    Nothing in it comes from elsewhere, which its Content-Security-Policy enforces, and every text that a spec or a
    record holds is escaped, because they may be a stranger's.
    """
    style, script = _part("page.css"), _part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = " and ".join(escape(name) for name in names_of(runs))
    links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, (name, _) in SECTIONS.items())
    body = "".join(_section(key, name, _drawn(draw, runs)) for key, (name, draw) in SECTIONS.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="invflow report">
<link rel="icon" href="data:,">
<title>{title} - invflow report</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header><p>invflow report</p><h1>{title}</h1></header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main id="main" tabindex="-1">{body}</main>
<footer><p>Written by invflow {escape(version("invflow"))} on {datetime.now():%Y-%m-%d at %H:%M}.</p></footer>
<script>{script}</script>
</body>
</html>
"""


def _drawn(draw: Callable[[Sequence[Portrait]], str], runs: Sequence[Portrait]) -> str:
    """The HTML of a section, or why it cannot be drawn: the others are shown all the same, whatever the fault is."""
    try:
        return draw(runs)
    except Exception as error:  # a record or a layer that others wrote
        return sections.missing(f"this part cannot be drawn: {type(error).__name__}: {error}")


def _section(key: str, title: str, body: str) -> str:
    return f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{body}</section>\n'


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
