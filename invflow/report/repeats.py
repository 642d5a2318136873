"""The layers of a list that repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_PERIOD = 64
"""The largest number of layers that are recognised as a repeated unit."""


def repeats(keys: Sequence[str]) -> list[tuple[int, int, int]]:
    """What repeats itself in a list: runs ``(start, period, times)`` that cover it, in order.

    An item that is not repeated is a run of period 1, once.

    Examples:
        >>> repeats("xababab")
        [(0, 1, 1), (1, 2, 3)]
        >>> repeats("aab" * 2)
        [(0, 3, 2)]
    """
    length = len(keys)
    best = [(0, 1, 1)] * (length + 1)  # (covered, period, times) of the best run from each position
    for period in range(1, min(LONGEST_PERIOD, length // 2) + 1):
        equal = 0  # how many items from a position equal those one period later
        for start in range(length - period - 1, -1, -1):
            equal = equal + 1 if keys[start] == keys[start + period] else 0
            times = equal // period + 1
            if times > 1 and period * times > best[start][0]:
                best[start] = (period * times, period, times)
    found = []
    start = 0
    while start < length:
        covered, period, times = best[start]
        if covered < best[start + 1][0]:  # a longer run begins right after
            covered, period, times = 1, 1, 1
        found.append((start, period, times))
        start += max(1, covered)
    return found
