"""``invflow diff``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Plugins, load_document
from .output import out


def diff(
    old: Annotated[Path, typer.Argument(metavar="A", help="A spec's JSON file, or the folder of a run.")],
    new: Annotated[Path, typer.Argument(metavar="B", help="Another spec or run.")],
    plugin: Plugins = None,
) -> None:
    """Print what differs between two specs, layer by layer.

    The specs are expanded first. Exit status 1 if anything differs.
    """
    from ..spec.diff import diff_specs

    lines = diff_specs(load_document(old), load_document(new))
    for line in lines:
        out.print(line)
    raise typer.Exit(1 if lines else 0)
