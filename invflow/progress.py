"""How far long work has come, for somebody who waits at a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from ._torch import never_compiled

SHOWN_AFTER = 3.0
"""The seconds after which work counts as long."""


def _seconds() -> float:
    return time.monotonic()


_clock = never_compiled(_seconds, "a clock cannot be compiled: omit fullgraph")
"""Returns `_seconds`, of which the compiler would warn."""


@contextlib.contextmanager
def progress(what: str, most: int) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each of at most ``most`` steps of some work.

    If the work takes longer than `SHOWN_AFTER`, a bar on stderr shows the steps, in a terminal only; it disappears with
    the work.

    Examples:
        >>> with progress("sums", most=3) as advance:
        ...     for _ in range(3):
        ...         advance()
    """
    begun, done = _clock()(), 0
    with contextlib.ExitStack() as stack:
        show: Callable[[int], object] | None = None

        def advance() -> None:
            nonlocal done, show
            done += 1
            if show is None and _clock()() - begun > SHOWN_AFTER and sys.stderr is not None:
                show = stack.enter_context(_bar(what, most)) if sys.stderr.isatty() else _nothing
            if show is not None:
                show(done)

        yield advance


@contextlib.contextmanager
def _bar(what: str, most: int) -> Iterator[Callable[[int], object]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=most)
        yield lambda done: bar.update(task, completed=done)


def _nothing(done: int) -> None:
    """Where nobody watches."""
