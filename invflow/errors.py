"""The errors that a user can cause. Each names its origin, what was expected, what was given, and the fix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict


class InvflowError(ValueError):
    """The base of all errors that a user's input can cause; the command line prints one line for it.

    Attributes:
        place: where in the arguments of the constructor that raises it the fault is: ``("parts", 3)``.
    """

    place: tuple[int | str, ...] = ()

    @property
    def message(self) -> str:
        """The text without the place."""
        return super().__str__()

    def __str__(self) -> str:
        return ": ".join([".".join(map(str, self.place)), self.message] if self.place else [self.message])


class ShapeError(InvflowError):
    """A state or a shape that a bijection, a conditioner or a head does not accept."""


class NumericsError(InvflowError):
    """A state off its grid or out of its range, or an exactness that a layer cannot reach."""


class DataError(InvflowError):
    """A data set that is absent or does not fit the spec."""


class RunError(InvflowError):
    """A folder that holds no run, or a run that cannot be resumed."""


class DivergedError(RunError):
    """A training run whose loss or weights are no longer finite."""


class LocalStatisticsWarning(UserWarning):
    """Several processes train a model with batch norm where PyTorch cannot put their statistics together."""


class UnfinishedWarning(UserWarning):
    """A model is read from a run that diverged or was interrupted."""


class CheckpointError(InvflowError):
    """A checkpoint folder that is incomplete, altered, or does not fit its spec."""


class ReconstructionError(InvflowError):
    """The backward of a reversible chain could not reconstruct a layer's input, so its gradients are wrong."""


class ReconstructionWarning(UserWarning):
    """The same, as a warning."""


class SpecErrorDetail(TypedDict):
    """One fault of a spec: its place and its description."""

    path: str
    line: int | None
    column: int | None
    message: str


class SpecError(InvflowError):
    """A spec that cannot be read, validated or built.

    Attributes:
        errors: one entry per fault, in the document's order: ``path`` (``layers.2.net``), ``line`` and ``column``
            (from 1; None if the spec is a dict) and ``message``.
    """

    def __init__(self, errors: Sequence[SpecErrorDetail], source: str | None = None) -> None:
        self.errors = list(errors)
        self.source = source
        super().__init__("\n".join(self._line(error) for error in self.errors))

    def __reduce__(self) -> tuple[type[SpecError], tuple[list[SpecErrorDetail], str | None]]:
        return SpecError, (self.errors, self.source)

    def _line(self, error: SpecErrorDetail) -> str:
        place = ":".join(str(part) for part in (self.source, error["line"], error["column"]) if part is not None)
        return ": ".join(part for part in (place, error["path"], error["message"]) if part)
