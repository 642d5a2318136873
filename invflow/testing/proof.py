"""The table of the worst value per property and bijection, as Markdown: ``python -m invflow.testing.proof 100``."""

from __future__ import annotations

import sys

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from ..registry import bijections
from .properties import PROPERTIES
from .report import BijectionError, Report
from .strategies import Case, cases, chain_cases, conditions
from .suite import check_case
from .tolerances import GRADIENT, LOG_DET, ROUND_TRIP_ROUNDINGS, eps
from .trial import Setting

EXAMPLES = 100
ROUND_TRIPS = ("round trip", "inverse round trip", "context")
COLUMNS: dict[str, tuple[tuple[str, ...], torch.dtype | None]] = {
    "round trip, float64": (ROUND_TRIPS, torch.float64),
    "round trip, float32": (ROUND_TRIPS, torch.float32),
    "log-determinant": (("log det", "inverse log det"), None),
    "gradients": (("gradients", "inverse gradients"), None),
    "batch, layout, NaN; float64": (("batch independence", "memory layout", "nan contained"), torch.float64),
    "vmap": (("vmap",), None),
    "autocast": (("autocast",), None),
}
"""What each column shows: the worst value of these properties, in one dtype or, if it is None, in all."""
HEAD = """# Proof

The worst value of every property that is measured by a number, over {examples} examples per property and row: drawn
documents, shapes, contexts, weights, dtypes and modes; ordinary, huge, tiny, zero and repeated inputs in several memory
layouts. `make proof` writes this page.

A round trip, in either direction, is measured as max |x' - x| in units of the largest magnitude met and, if that alone
exceeds the tolerance, of the condition number of the Jacobian. A log-determinant is compared with the dense Jacobian by
autodiff, relative to max(1, |log-determinant|). Allowed for one layer: {trip64:.1e} in float64 and {trip32:.1e} in
float32 for a round trip, {log_det:.0e} for a log-determinant, {gradient:.0e} for gradients.
"""


def worst_values(strategy: st.SearchStrategy[Case], examples: int) -> tuple[dict[str, float], set[str]]:
    """The worst value in each column over this number of examples, and the names of the failed properties."""
    worst = dict.fromkeys(COLUMNS, 0.0)
    failed: set[str] = set()

    @seed(0)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=strategy, setting=conditions())
    def run(case: Case, setting: Setting) -> None:
        try:
            report: Report = check_case(case, setting)
        except BijectionError as error:
            report = error.report
            failed.update(finding.name for finding in report.failures)
        for finding in report.findings:
            for column, (names, wanted) in COLUMNS.items():
                if finding.ok and finding.name in names and wanted in (None, finding.setting.dtype):
                    worst[column] = max(worst[column], finding.worst)

    run()
    return worst, failed


def main(examples: int = EXAMPLES) -> int:
    """Print the page. Returns 1 if a property failed, else 0."""
    torch.set_num_threads(1)
    trip64, trip32 = (ROUND_TRIP_ROUNDINGS * eps(dtype) for dtype in (torch.float64, torch.float32))
    print(HEAD.format(examples=examples, trip64=trip64, trip32=trip32, log_det=LOG_DET, gradient=GRADIENT))
    print(f"| bijection | {' | '.join(COLUMNS)} | failed |")
    print(f"| --- |{' --- |' * (len(COLUMNS) + 1)}")
    rows = {f"`{tag}`": cases(tag) for tag in sorted(bijections.registered())}
    all_failed: set[str] = set()
    for name, strategy in {**rows, "chains of 1 to 12": chain_cases(max_depth=12)}.items():
        worst, failed = worst_values(strategy, examples)
        all_failed |= failed
        cells = [f"{worst[column]:.1e}" if worst[column] else "0" for column in COLUMNS]
        print(f"| {name} | {' | '.join(cells)} | {', '.join(sorted(failed)) or 'none'} |", flush=True)
    print("\nA property that is not measured by a number holds or fails. All properties:\n")
    print("\n".join(f"- **{prop.name}**: {prop.promise}" for prop in PROPERTIES))
    return int(bool(all_failed))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2])))
