"""The errors a user can cause. Each says who complains, what was expected, what came, and the fix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict


class InvflowError(ValueError):
    """Base of every error that a user's input can cause; the command line prints it as one line."""


class ShapeError(InvflowError):
    """A state or a shape that a bijection, a conditioner or a head cannot take."""


class NumericsError(InvflowError):
    """A state off its grid or out of its range, or an exactness that a layer cannot give."""


class DataError(InvflowError):
    """A data set that is absent or does not fit the spec."""


class RunError(InvflowError):
    """A folder that holds no run, or a run that cannot be resumed."""


class DivergedError(RunError):
    """A training whose loss or weights are no longer finite."""


class CheckpointError(InvflowError):
    """A checkpoint folder that is incomplete, altered, or does not fit its spec."""


class ReconstructionError(InvflowError):
    """A backward of a reversible chain met a layer whose input it could not reconstruct: its gradients are wrong."""


class ReconstructionWarning(UserWarning):
    """The same, as a warning."""


class SpecErrorDetail(TypedDict):
    """One fault of a spec: where it stands and what it is."""

    path: str
    line: int | None
    column: int | None
    message: str


class SpecError(InvflowError):
    """A spec that cannot be read, validated or built.

    Attributes:
        errors: one entry per fault, in the document's order: ``path`` (``layers.2.net``), ``line`` and ``column``
            (from 1; None where the spec came as a dict) and ``message``.
    """

    def __init__(self, errors: Sequence[SpecErrorDetail], source: str | None = None) -> None:
        self.errors = list(errors)
        self.source = source
        super().__init__("\n".join(self._line(error) for error in self.errors))

    def __reduce__(self) -> tuple[type[SpecError], tuple[list[SpecErrorDetail], str | None]]:
        return SpecError, (self.errors, self.source)

    def _line(self, error: SpecErrorDetail) -> str:
        place = [] if self.source is None else [self.source]
        if error["line"] is not None:
            place += [str(error["line"]), str(error["column"])]
        parts = [":".join(place), error["path"], error["message"]]
        return ": ".join(part for part in parts if part)
