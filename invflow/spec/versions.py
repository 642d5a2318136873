"""Versions of the spec language: older documents are brought up to date, newer ones refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .text import Problem, Source

SPEC_VERSION = 1

Migration = Callable[[dict[str, Any]], dict[str, Any]]
MIGRATIONS: Mapping[int, Migration] = {}
"""Version n -> a pure function that makes of a document of version n the same document in version n + 1.

It returns a new document and leaves its argument as it is; entries it does not know it hands on, for validation to
judge. Errors still point into the text that the user wrote, as long as their paths did not change.
"""


def migrate(source: Source, migrations: Mapping[int, Migration] = MIGRATIONS, current: int = SPEC_VERSION) -> Source:
    """The document in the current version of the language; a document that names none is of version 1.

    Raises:
        SpecError: a version newer than the library.
    """
    data = source.data
    version = data.get("spec_version", 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        return source  # validation says so, together with whatever else is wrong
    if version > current:
        message = f"spec_version {version} is newer than this invflow reads (up to {current}); upgrade invflow"
        raise source.error([Problem(("spec_version",), message)])
    for step in range(version, current):
        data = {**migrations[step](data), "spec_version": step + 1}
    return Source(data, source.name, source.text)
