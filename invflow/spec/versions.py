"""Versions of the spec language: older documents are migrated, newer ones refused.

Version 2 has the estimator of a residual block's log-determinant as one nested option. Fields that are not part of a
spec's identity (`backprop`, `monitor`) may change their default within a version; all others keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .text import Problem, Source

SPEC_VERSION = 2

Migration = Callable[[dict[str, Any]], dict[str, Any]]

_ESTIMATOR = {"log_det": "auto", "terms": None, "probes": 1, "probe": "rademacher", "continuation": None}
"""The fields of version 1 that became one, with their defaults."""
_UNUSED = {"exact": {"terms", "probes", "probe", "continuation"}, "power_series": {"continuation"}}
"""Options that version 1 accepted with an estimator that does not use them."""


def nest_estimators(document: Any) -> Any:
    """Version 1 to 2: ``"log_det": "roulette", "probes": 2`` becomes ``{"type": "roulette", "probes": 2}``."""
    if isinstance(document, list):
        return [nest_estimators(item) for item in document]
    if not isinstance(document, dict):
        return document
    nested = {key: nest_estimators(value) for key, value in document.items()}
    if document.get("type") != "residual" or not nested.keys() & _ESTIMATOR.keys():
        return nested
    kind = nested.get("log_det", "auto")
    if isinstance(kind, dict) and not kind.keys() & {"$var", "$item"}:
        return nested  # not version 1: left to validation
    unused = _UNUSED.get(kind, set()) if isinstance(kind, str) else set()
    options = {key: nested.pop(key) for key in list(nested) if key in _ESTIMATOR and key != "log_det"}
    nested["log_det"] = {"type": kind, **{key: value for key, value in options.items() if key not in unused}}
    return nested


MIGRATIONS: Mapping[int, Migration] = {1: nest_estimators}
"""Version n -> a pure function from a document of version n to the same document in version n + 1.

It returns a new document and does not change its argument; unknown entries are passed on to validation.
Errors still point into the text that the user wrote, as long as their paths did not change.
"""


def version_of(source: Source) -> int | None:
    """The version that a document declares; None if it declares none, or an invalid one."""
    version = source.data.get("spec_version")
    return version if isinstance(version, int) and not isinstance(version, bool) and version >= 1 else None


def migrate(source: Source, migrations: Mapping[int, Migration] = MIGRATIONS, current: int = SPEC_VERSION) -> Source:
    """The document in the current version of the language; if it declares no version, it is read as version 1.

    Raises:
        SpecError: a version newer than the library.
    """
    data = source.data
    if "spec_version" in data and version_of(source) is None:
        return source  # validation reports this with all other faults
    version = version_of(source) or 1
    if version > current:
        message = f"spec_version {version} is newer than this invflow reads (up to {current}); upgrade invflow"
        raise source.error([Problem(("spec_version",), message)])
    for step in range(version, current):
        data = {**migrations[step](data), "spec_version": step + 1}
    return Source(data, source.name, source.text)


def in_version_1(canonical: Any, expanded: Any) -> Any:
    """The canonical document by the rules of version 1.

    Args:
        canonical: the canonical document in version 2.
        expanded: the original document, in version 1, without repeat and references.
    """
    if isinstance(canonical, list):
        return [in_version_1(*pair) for pair in zip(canonical, expanded, strict=True)]
    if not isinstance(canonical, dict) or not isinstance(expanded, dict):
        return canonical
    found = {key: in_version_1(value, expanded.get(key)) for key, value in canonical.items()}
    if canonical.get("type") == "residual" and not isinstance(expanded.get("log_det"), dict):
        found.pop("log_det", None)
        said = ((key, expanded.get(key, default), default) for key, default in _ESTIMATOR.items())
        found.update((key, value) for key, value, default in said if value != default)
    return found
