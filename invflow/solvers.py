"""Fixed points of contractions, each sample on its own, with a report of how well they were found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Method: TypeAlias = Literal["anderson", "picard"]
Step: TypeAlias = Callable[[Tensor, Tensor], Tensor]

MEMORY = 8
"""How many differences Anderson's method looks back on. With 5, where few directions sit near the limit, it takes 23
evaluations instead of 16 (128 dimensions, contraction 0.97, to an error of 1e-6); with 10, 14."""

TIKHONOV = 1e-8
"""Regularisation of its least squares, relative to the size of each difference."""

LARGEST_DEBT = 1.0
CREDIT = 3.0
"""Evaluations that Anderson's method may have lost against Picard's before a sample goes on by the latter, and how many
it may have won that losses are set against: old gains are no reason to go on losing."""

PROGRESS = 0.9
PATIENCE = 3
"""A residual near the roundings is at its floor when it has not fallen by `PROGRESS` in as many evaluations as Picard's
method takes for that at worst, and so many more."""

ROUNDING = 0.25
"""In units of eps, the root mean square of what one rounding of each number leaves off."""

MOST_EVALUATIONS = 10_000

FLOOR = 64
"""So many roundings is near: where the residual has stopped falling further up, something else is wrong."""


@dataclass(frozen=True)
class Report:
    """How a fixed point was found, each entry of shape ``(batch,)``.

    Attributes:
        evaluations: how often the map was evaluated for the sample.
        residual: ``|f(x) - x| / max(|x|, |f(x)|, |start|)``, Euclidean norms.
        contraction: the largest ratio ``|f(x) - f(x')| / |x - x'|`` that was seen.
        error: an estimate of ``|x - x*|`` in the same unit: the residual, and what evaluating f rounds off, over
            1 - contraction.
        converged: whether that error is within the tolerance.
    """

    evaluations: Tensor
    residual: Tensor
    contraction: Tensor
    error: Tensor
    converged: Tensor

    @property
    def failed(self) -> list[int]:
        """The samples that have not converged."""
        found: list[int] = (~self.converged).nonzero().flatten().tolist()
        return found

    def __str__(self) -> str:
        if not len(self.evaluations):
            return "no samples"
        return (
            f"{len(self.evaluations)} samples, at most {int(self.evaluations.max())} evaluations, residual "
            f"{float(self.residual.max()):.1e}, contraction {float(self.contraction.max()):.3f}, "
            f"error {float(self.error.max()):.1e}, {len(self.failed)} not converged"
        )


@dataclass(frozen=True)
class Solution:
    """A fixed point and how it was found."""

    x: Tensor
    report: Report


@torch.no_grad()
def solve(
    step: Step,
    start: Tensor,
    *,
    contraction: float,
    method: Method = "anderson",
    tolerance: float | None = None,
    max_evaluations: int | None = None,
) -> Solution:
    """The fixed point ``x = f(x)`` of a contraction, for each sample of a batch on its own.

    Picard's method repeats ``x <- f(x)``: the error falls by the factor L, the Lipschitz constant of f, each time.
    Anderson's takes the combination of the last points whose residuals cancel best, which is as good as GMRES where f
    is nearly linear; a step whose residual is more than L times the one before, which Picard's never is, is taken back,
    and where such steps cost more than they win, Picard's method goes on.

    A sample that has converged, or is not finite, or gets no further, is not evaluated any more; so what a sample gets
    does not depend on the others.

    Args:
        step: ``f(x, rows)`` for some samples only; ``rows`` says which of the batch they are.
        start: where to begin, ``(batch, ...)``.
        contraction: L, below 1.
        method: "anderson" or "picard".
        tolerance: the relative error at which to stop, which ``residual / (1 - L)`` bounds; None goes on until
            roundings keep the residual from falling.
        max_evaluations: at most so many for each sample; by default as many as Picard's method takes at worst.

    >>> solution = solve(lambda x, rows: 1 + x / 2, torch.zeros(3, 1), contraction=0.5)
    >>> solution.x.flatten().tolist(), solution.report.failed
    ([2.0, 2.0, 2.0], [])
    """
    return _Solver(step, start, contraction, method, tolerance, max_evaluations).run()


class _Solver:
    """The state of all samples, and of those still at work, whose place in the batch is ``rows``."""

    def __init__(
        self,
        step: Step,
        start: Tensor,
        contraction: float,
        method: Method,
        tolerance: float | None,
        max_evaluations: int | None,
    ) -> None:
        self.step, self.start, self.method, self.contraction = step, start, method, contraction
        self.eps = torch.finfo(start.dtype).eps
        self.patience = math.log(PROGRESS) / math.log(contraction) + PATIENCE
        enough = 2 * math.log(self.eps) / math.log(contraction) + self.patience
        self.max_evaluations = max_evaluations or min(math.ceil(enough), MOST_EVALUATIONS)
        self.target = self.eps / 2 if tolerance is None else tolerance * (1 - contraction)
        self.allowed = accuracy(start.dtype) if tolerance is None else tolerance
        batch = start.shape[0]
        self.x = start.flatten(1).clone()
        self.size = self.x.shape[1]
        self.unit = _norm(self.x)
        wide = torch.float64 if start.dtype == torch.float64 else torch.float32
        self.evaluations = torch.zeros(batch, dtype=torch.int64, device=start.device)
        self.residual, self.seen = (start.new_full((batch,), value, dtype=wide) for value in (float("inf"), 0.0))

    def run(self) -> Solution:
        if self.start.numel():
            self._iterate()
        else:
            self.residual.zero_()
        error = (self.residual + ROUNDING * self.eps) / (1 - self.seen.clamp(max=self.contraction))
        report = Report(self.evaluations, self.residual, self.seen, error, error <= self.allowed)
        return Solution(self.x.reshape(self.start.shape), report)

    def _evaluate(self, x: Tensor, rows: Tensor) -> Tensor:
        self.evaluations[rows] += 1
        return self.step(x.reshape(-1, *self.start.shape[1:]), rows).flatten(1)

    def _iterate(self) -> None:
        rows = torch.arange(self.start.shape[0], device=self.start.device)
        x = self.x.clone()
        image = self._evaluate(x, rows)
        residual = image - x
        size = _norm(residual)
        state: dict[str, Any] = {
            "rows": rows,
            "x": x,
            "image": image,
            "residual": residual,
            "size": size,
            "mark": size.clone(),
            "stalled": torch.zeros_like(rows),
            "debt": torch.zeros_like(size),
            # Differences of the points and of their images, the newest first; zeros where there are none yet.
            "moves": x.new_zeros(len(rows), MEMORY, self.size),
            "images": x.new_zeros(len(rows), MEMORY, self.size),
            "memory": torch.zeros_like(rows),
        }
        self._record(state)
        state = self._drop_finished(state)
        while len(state["rows"]):
            state = self._drop_finished(self._advance(state))

    def _advance(self, state: dict[str, Any]) -> dict[str, Any]:
        """One evaluation for each sample at work."""
        mixing = (state["memory"] > 0) & (state["debt"] < LARGEST_DEBT)
        if self.method == "picard":
            mixing = torch.zeros_like(mixing)
        # A step that was taken back is followed by Picard's.
        mixing &= ~state.get("taken_back", torch.zeros_like(mixing))
        candidate = state["image"]
        if bool(mixing.any()):
            candidate = torch.where(mixing[:, None], self._mixed(state), candidate)
        image = self._evaluate(candidate, state["rows"])
        residual = image - candidate
        size = _norm(residual)
        worse = mixing & ~(size <= self.contraction * state["size"])
        state["taken_back"] = worse
        keep = ~worse
        move, change = candidate - state["x"], image - state["image"]
        ratio = self._see(state, move, change)
        lost = 1 - torch.log(size / state["size"]) / torch.log(ratio.clamp(max=self.contraction))
        debt = state["debt"] + torch.where(worse, 1.0, torch.where(mixing, torch.nan_to_num(lost), 0.0))
        state["debt"] = debt.clamp(min=-CREDIT)
        for name, difference in (("moves", move), ("images", change)):
            shifted = torch.cat([difference[:, None], state[name][:, :-1]], dim=1)
            state[name] = torch.where(keep[:, None, None], shifted, state[name])
        state["memory"] = state["memory"] + keep
        for name, new in (("x", candidate), ("image", image), ("residual", residual)):
            state[name] = torch.where(keep[:, None], new, state[name])
        state["size"] = torch.where(keep, size, state["size"])
        progress = size < PROGRESS * state["mark"]
        state["stalled"] = torch.where(progress, 0, state["stalled"] + 1)
        state["mark"] = torch.where(progress, size, state["mark"])
        self._record(state)
        return state

    def _mixed(self, state: dict[str, Any]) -> Tensor:
        """Anderson's combination of the last images."""
        changes = (state["images"] - state["moves"]).double()  # of the residuals
        sizes = changes.norm(dim=2, keepdim=True)
        changes = changes / sizes.clamp(min=torch.finfo(torch.float64).tiny)
        gram = changes @ changes.mT
        gram = gram + TIKHONOV * torch.eye(MEMORY, dtype=gram.dtype, device=gram.device)
        right = changes @ state["residual"].double()[:, :, None]
        weights, _ = torch.linalg.solve_ex(gram, right)
        weights = weights / sizes.clamp(min=torch.finfo(torch.float64).tiny)
        mixed: Tensor = state["image"] - (weights.to(self.x.dtype).mT @ state["images"])[:, 0]
        return mixed

    def _see(self, state: dict[str, Any], move: Tensor, change: Tensor) -> Tensor:
        """The ratio of distances, the largest of which is kept, of points further apart than their roundings."""
        distance = _norm(move)
        far = distance > 1e3 * self.eps * state["scale"]
        ratio = torch.where(far, _norm(change) / distance, 0.0)
        rows = state["rows"]
        self.seen[rows] = torch.maximum(self.seen[rows], torch.nan_to_num(ratio).to(self.seen.dtype))
        return ratio

    def _record(self, state: dict[str, Any]) -> None:
        """Keeps each sample's best point: the image, which is nearer to the fixed point than the point itself."""
        size, rows = state["size"], state["rows"]
        state["scale"] = torch.maximum(self.unit[rows], torch.maximum(_norm(state["x"]), _norm(state["image"])))
        state["relative"] = torch.where(size == 0, 0.0, size / state["scale"]).to(self.residual.dtype)
        better = ~(state["relative"] >= self.residual[rows])  # NaN too: the sample is lost, and says so
        self.x[rows[better]] = state["image"][better]
        self.residual[rows[better]] = state["relative"][better]

    def _drop_finished(self, state: dict[str, Any]) -> dict[str, Any]:
        relative = state["relative"]
        at_floor = (relative <= FLOOR * self.eps) & (state["stalled"] >= self.patience)
        done = (relative <= self.target) | at_floor | ~relative.isfinite()
        done |= self.evaluations[state["rows"]] >= self.max_evaluations
        if not bool(done.any()):
            return state
        return {name: value[~done] for name, value in state.items()}


def accuracy(dtype: torch.dtype) -> float:
    """The relative error that counts as converged where no tolerance is named: 1e-6 in float32, 1e-12 in float64."""
    return {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 16 * torch.finfo(dtype).eps)


def _norm(x: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=None if x.dtype == torch.float64 else torch.float32)
    return found
