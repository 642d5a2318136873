"""What a check found, as data, as a table, and as the text of an AssertionError."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..state import State, leaves
from .trial import Setting

_MOST_NUMBERS = 32


@dataclass(frozen=True)
class Finding:
    """What came of one property.

    Attributes:
        name: of the property.
        promise: what is expected.
        worst: the worst value measured; infinite where the promise is broken as a whole.
        tolerance: what is allowed there.
        trials: how many times it was tried.
        setting: the conditions of the worst trial.
        input: the smallest input that fails, None where none does.
        came: what came instead, where it is not a number.
        cause: the exception that the bijection raised.
    """

    name: str
    promise: str
    worst: float = 0.0
    tolerance: float = 0.0
    trials: int = 0
    setting: Setting | None = None
    input: State | None = None
    came: str = ""
    cause: BaseException | None = field(default=None, compare=False)

    @property
    def ok(self) -> bool:
        return not self.came and self.worst <= self.tolerance

    def __str__(self) -> str:
        """The finding as an assertion's message."""
        if self.ok:
            return f"{self.name}: {self.worst:.1e} of {self.tolerance:.1e} allowed"
        lines = [f"{self.name}: {self.promise}"]
        lines += [f"  {self.came}"] if self.came else [f"  worst value {self.worst:.3g}, allowed {self.tolerance:.3g}"]
        lines += [f"  with {self.setting}"] if self.setting else []
        lines += [f"  smallest failing input: {shown(self.input)}"] if self.input is not None else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """What `check_bijection` found.

    Attributes:
        subject: the bijection, on one line.
        findings: one per property that was tried.
        seed: what everything random was drawn from.
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

    def __getitem__(self, name: str) -> Finding:
        """The finding of a property."""
        return next(finding for finding in self.findings if finding.name == name)

    def __str__(self) -> str:
        """A table, a property a line."""
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
        report: all that was found.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        broken = "\n".join(map(str, report.failures))
        super().__init__(f"{report.subject} is no sound bijection (seed {report.seed}):\n{broken}")


def shown(state: State) -> str:
    """A small state with its numbers, a large one by its shapes."""
    if sum(leaf.numel() for leaf in leaves(state)) > _MOST_NUMBERS:
        extremes = [(float(leaf.min()), float(leaf.max())) for leaf in leaves(state) if leaf.numel()]
        low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
        return f"tensors of {[tuple(leaf.shape) for leaf in leaves(state)]}, from {low:.3g} to {high:.3g}"
    if isinstance(state, tuple):
        return f"({', '.join(map(shown, state))})"
    if not state.numel():
        return f"torch.empty({tuple(state.shape)}, dtype={state.dtype})"
    return f"torch.tensor({state.tolist()}, dtype={state.dtype})"
