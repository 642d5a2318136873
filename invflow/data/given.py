"""Data that no spec can name."""

from __future__ import annotations

from ..errors import DataError
from ..registry import register_data
from ..samples import DataSet
from ..source import Request, Source

NAME = "given"


@register_data(NAME)
class Given(Source):
    """The data that a Python program passed to `invflow.fit`, which are not in the run folder."""

    def load(self, request: Request) -> DataSet:
        raise DataError(
            "this run was trained on data that a Python program passed to invflow.fit; pass them to invflow.evaluate "
            "or invflow.analyse, or name a data set with --data"
        )
