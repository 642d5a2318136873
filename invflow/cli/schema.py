"""``invflow schema``."""

from __future__ import annotations

from .options import Plugins
from .output import err, print_json, stdout_for_the_answer


def schema(plugin: Plugins = None) -> None:
    """Print the JSON Schema of specs, for editors.

    It contains everything that is registered or installed.
    """
    from ..registry import REGISTRIES
    from ..spec.schema import json_schema

    with stdout_for_the_answer(True):
        broken = [error for registry in REGISTRIES for error in registry.load_plug_ins()]
        document = json_schema()
    for error in broken:
        err.print(f"skipped: {error}")
    print_json(document)
