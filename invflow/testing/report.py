"""The results of a check, as data, as a table, and as the text of an AssertionError."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..state import State, leaves
from .trial import Setting

_MOST_NUMBERS = 32


@dataclass(frozen=True)
class Finding:
    """The result for one property.

    Attributes:
        name: the name of the property.
        promise: what is expected.
        worst: the worst value measured; infinite if the promise is broken as a whole.
        tolerance: the largest value allowed.
        trials: the number of trials.
        setting: the setting of the worst trial.
        input: the smallest failing input that was found; None if none fails.
        came: what came instead, if it is not a number.
        cause: the exception that the bijection raised.
    """

    name: str
    promise: str
    worst: float
    tolerance: float
    trials: int
    setting: Setting
    input: State | None = None
    came: str = ""
    cause: BaseException | None = field(default=None, compare=False)

    @property
    def ok(self) -> bool:
        return not self.came and self.worst <= self.tolerance

    def __str__(self) -> str:
        """The finding as the message of an assertion."""
        if self.ok:
            return f"{self.name}: {self.worst:.1e} of {self.tolerance:.1e} allowed"
        came = self.came or f"worst value {self.worst:.3g}, allowed {self.tolerance:.3g}"
        text = f"{self.name}: {self.promise}\n  {came}\n  with {self.setting}"
        return text if self.input is None else f"{text}\n  smallest failing input: {shown(self.input)}"


@dataclass(frozen=True)
class Report:
    """The result of `check_bijection`.

    Attributes:
        subject: the bijection, on one line.
        findings: one per property that was tried.
        seed: the seed of everything random.
    """

    subject: str
    findings: tuple[Finding, ...]
    seed: int

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    @property
    def failures(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if not finding.ok)

    def require_ok(self) -> Report:
        """This report. Raises BijectionError if a property fails, from the first exception of the bijection."""
        if not self.ok:
            raise BijectionError(self) from next((one.cause for one in self.failures if one.cause), None)
        return self

    def __getitem__(self, name: str) -> Finding:
        """The finding of a property."""
        return next(finding for finding in self.findings if finding.name == name)

    def __str__(self) -> str:
        """A table with a line per property."""
        width = max(len(finding.name) for finding in self.findings)
        lines = [f"{self.subject}: {'ok' if self.ok else 'FAILED'} (seed {self.seed})"]
        for finding in self.findings:
            mark = "ok" if finding.ok else "FAILED"
            worst = "broken" if finding.came else f"{finding.worst:.1e}"
            lines.append(f"  {finding.name:<{width}}  {worst:>8} of {finding.tolerance:.1e}  {mark}")
        return "\n".join(lines)


class BijectionError(AssertionError):
    """A bijection breaks a promise.

    Attributes:
        report: the whole report.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        broken = "\n".join(map(str, report.failures))
        super().__init__(f"{report.subject} is not a sound bijection (seed {report.seed}):\n{broken}")


def shown(state: State) -> str:
    """The numbers of a small state, the shapes and the range of a large one."""
    if sum(leaf.numel() for leaf in leaves(state)) > _MOST_NUMBERS:
        low, high = torch.cat([leaf.flatten() for leaf in leaves(state)]).aminmax()
        return f"tensors of {[tuple(leaf.shape) for leaf in leaves(state)]}, from {low:.3g} to {high:.3g}"
    if isinstance(state, tuple):
        return f"({', '.join(map(shown, state))})"
    if not state.numel():
        return f"torch.empty({tuple(state.shape)}, dtype={state.dtype})"
    return f"torch.tensor({state.tolist()}, dtype={state.dtype})"
