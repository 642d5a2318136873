"""Bars that show how far long work has come."""

from __future__ import annotations

import itertools
import time

import pytest

from invflow.progress import progress
from tests.test_autoregressive import Terminal


def test_a_bar_disappears_with_an_error(monkeypatch):
    seen = Terminal()
    monkeypatch.setattr("sys.stderr", seen)
    monkeypatch.setattr("time.monotonic", itertools.count(0, 5).__next__)

    def fail():
        with progress("work", 3) as advance:
            advance()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    length = len(seen.getvalue())
    time.sleep(0.3)  # a bar that is left over draws itself ten times a second
    assert length == len(seen.getvalue()) > 0
