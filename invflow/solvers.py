"""Fixed points of contractions, each sample on its own, with an account of how well they were found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Method: TypeAlias = Literal["anderson", "picard"]
Step: TypeAlias = Callable[[Tensor, Tensor], Tensor]

MEMORY = 8
"""How many differences Anderson's method looks back on. With 5, where few directions sit near the limit, it takes 23
evaluations instead of 16 (128 dimensions, contraction 0.97, to an error of 1e-6); with 10, 14."""

LARGEST_GROWTH = 2.0
"""A mixed step whose residual is more times the one before is taken back. Smaller growth is made good by later steps:
to take back whatever is larger than Picard's residual could be costs up to 6 evaluations more where f has kinks."""

TIKHONOV = 1e-8
"""Regularisation of its least squares, relative to the size of each difference; ten roundings where these are more."""

LARGEST_DEBT = 1.0
CREDIT = 3.0
"""Evaluations that Anderson's method may have lost against Picard's before a sample goes on by the latter, and how many
it may have won that losses are set against: old gains are no reason to go on losing."""

PROGRESS = 0.9
PATIENCE = 3
"""A residual near the roundings is at its floor when it has not fallen by `PROGRESS` in as many evaluations as Picard's
method takes for that at worst, plus this number."""

ROUNDING = 0.25
"""In units of eps, the root mean square of what one rounding of each number leaves off."""

NEAR = 1e3
"""Points that are nearer than this number of roundings tell nothing of the contraction."""

MOST_EVALUATIONS = 10_000

FLOOR = 64
"""So many roundings is near: where the residual has stopped falling further up, something else is wrong."""


@dataclass(frozen=True)
class Convergence:
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
    convergence: Convergence


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
    is nearly linear. It keeps account, against the contraction that it sees, of what its steps win and lose: a sample
    that loses goes on by Picard's method, and a step that makes the residual much larger is taken back.

    A sample that has converged, or is not finite, or gets no further, is not evaluated any more; so what a sample gets
    does not depend on the others.

    Args:
        step: ``f(x, rows)`` for some samples only; ``rows`` says which of the batch they are.
        start: where to begin, ``(batch, ...)``.
        contraction: L, below 1.
        method: "anderson" or "picard".
        tolerance: the relative error at which to stop, which ``residual / (1 - L)`` bounds; None goes on until
            roundings keep the residual from falling.
        max_evaluations: the limit for each sample; by default as many as Picard's method takes at worst.

    Examples:
        >>> solution = solve(lambda x, rows: 1 + x / 2, torch.zeros(3, 1), contraction=0.5)
        >>> solution.x.flatten().tolist(), solution.convergence.failed
        ([2.0, 2.0, 2.0], [])
    """
    if not start.numel():
        nothing = start.new_zeros(start.shape[0])
        return Solution(start.clone(), Convergence(nothing.long(), nothing, nothing, nothing, nothing == 0))
    solver = _Solver(step, start, contraction, method, tolerance, max_evaluations)
    while len(solver.at_work.rows):
        solver.advance()
    return solver.solution()


@dataclass
class _Samples:
    """What is known of the samples that are still at work, one row each, their numbers flattened.

    Attributes:
        rows: their places in the batch.
        x: the last point.
        image: f there.
        size: the norm of the residual, ``image - x``.
        scale: the unit of errors.
        best: the image with the smallest relative residual so far.
        relative: that residual.
        mark: the residual's norm when it last fell by `PROGRESS`.
        stalled: evaluations since.
        contraction: the largest ratio of distances so far.
        debt: evaluations lost by mixing.
        mixes: whether there is something to mix, and the last mixing was not taken back.
        images: the last `MEMORY` differences of images, zeros where there are fewer.
        changes: those of residuals.
        gram: the inner products of the latter.
    """

    rows: Tensor
    x: Tensor
    image: Tensor
    size: Tensor
    scale: Tensor
    best: Tensor
    relative: Tensor
    mark: Tensor
    stalled: Tensor
    contraction: Tensor
    debt: Tensor
    mixes: Tensor
    images: Tensor
    changes: Tensor
    gram: Tensor

    def select(self, kept: Tensor) -> _Samples:
        """Some of the samples, by their rows here."""
        return _Samples(**{field.name: getattr(self, field.name).index_select(0, kept) for field in fields(self)})


class _Solver:
    """The samples at work, and what has been found for the others."""

    def __init__(
        self, step: Step, start: Tensor, contraction: float, method: Method, tolerance: float | None, most: int | None
    ) -> None:
        self.step, self.shape, self.method, self.limit = step, start.shape, method, contraction
        self.eps = torch.finfo(start.dtype).eps
        self.patience = math.log(PROGRESS) / math.log(contraction) + PATIENCE
        enough = 2 * math.log(self.eps) / math.log(contraction) + self.patience
        self.most = most or min(math.ceil(enough), MOST_EVALUATIONS)
        self.target = self.eps / 2 if tolerance is None else tolerance * (1 - contraction)
        self.allowed = accuracy(start.dtype) if tolerance is None else tolerance
        self.tikhonov = max(TIKHONOV, 10 * self.eps)
        self.most_debt = LARGEST_DEBT if method == "anderson" else -math.inf  # Picard's method never mixes
        x = start.flatten(1)
        self.x, self.unit = x.clone(), _norm(x)
        rows, zero = torch.arange(len(x), device=x.device), torch.zeros_like(self.unit)
        self.evaluations, self.residual, self.contraction = torch.zeros_like(rows), zero + math.inf, zero.clone()
        self.count = 1
        image = step(start, rows).flatten(1)
        history = x.new_zeros(len(x), MEMORY, x.shape[1])
        self.at_work = _Samples(
            rows=rows, x=x, image=image, size=_norm(image - x), scale=zero, best=image, relative=zero + math.inf,
            mark=zero + math.inf, stalled=zero, contraction=zero, debt=zero, mixes=rows < 0,
            images=history, changes=history.clone(), gram=x.new_zeros(len(x), MEMORY, MEMORY),
        )  # fmt: skip
        self._look()

    def solution(self) -> Solution:
        error = (self.residual + ROUNDING * self.eps) / (1 - self.contraction.clamp(max=self.limit))
        convergence = Convergence(self.evaluations, self.residual, self.contraction, error, error <= self.allowed)
        return Solution(self.x.reshape(self.shape), convergence)

    def advance(self) -> None:
        """One evaluation for each sample at work."""
        now = self.at_work
        mixing = now.mixes & (now.debt < self.most_debt)
        x = torch.where(mixing[:, None], self._mixed(), now.image) if bool(mixing.any()) else now.image
        image = self.step(x.reshape(-1, *self.shape[1:]), now.rows).flatten(1)
        self.count += 1
        size = _norm(image - x)
        kept = ~mixing | (size <= LARGEST_GROWTH * now.size)
        move, difference = x - now.x, image - now.image
        distance = _norm(move)
        far = distance > NEAR * self.eps * now.scale  # nearer points differ by their roundings
        ratio = torch.where(far, _norm(difference) / distance, 0.0).nan_to_num()
        now.contraction = torch.maximum(now.contraction, ratio)
        won = torch.log(size / now.size) / torch.log(ratio.clamp(max=self.limit))  # in steps of Picard's
        lost = torch.where(kept, torch.where(mixing & far, (1 - won).nan_to_num(), 0.0), 1.0)
        now.debt = (now.debt + lost).clamp(min=-CREDIT)
        now.mixes = kept
        self._remember(kept, difference, difference - move)
        now.x, now.image = torch.where(kept[:, None], x, now.x), torch.where(kept[:, None], image, now.image)
        now.size = torch.where(kept, size, now.size)
        self._look()

    def _mixed(self) -> Tensor:
        """Anderson's combination of the last images."""
        now = self.at_work
        lengths = now.gram.diagonal(dim1=1, dim2=2).double().sqrt()
        lengths = torch.where(lengths > 0, lengths, 1.0)
        gram = now.gram.double() / (lengths[:, :, None] * lengths[:, None, :])
        gram.diagonal(dim1=1, dim2=2).add_(self.tikhonov)
        right = (now.changes @ (now.image - now.x)[:, :, None])[:, :, 0].double() / lengths
        weights = torch.linalg.solve_ex(gram, right).result / lengths
        mixed: Tensor = now.image - (weights.to(now.image.dtype)[:, None, :] @ now.images)[:, 0]
        return mixed

    def _remember(self, kept: Tensor, image: Tensor, change: Tensor) -> None:
        """Puts differences in the place of the oldest ones, where they are kept."""
        if self.method == "picard":
            return
        now, place = self.at_work, self.count % MEMORY
        now.images[:, place] = torch.where(kept[:, None], image, now.images[:, place])
        now.changes[:, place] = torch.where(kept[:, None], change, now.changes[:, place])
        products = (now.changes @ now.changes[:, place, :, None])[:, :, 0]
        now.gram[:, place] = products
        now.gram[:, :, place] = products

    def _look(self) -> None:
        """Keeps the best image, which is nearer to the fixed point than its point, and lets go of who is done."""
        now = self.at_work
        now.scale = torch.maximum(self.unit.index_select(0, now.rows), torch.maximum(_norm(now.x), _norm(now.image)))
        relative = torch.where(now.size == 0, 0.0, now.size / now.scale)
        better = ~(relative >= now.relative)  # NaN too: the sample is lost, and says so
        now.best = torch.where(better[:, None], now.image, now.best)
        now.relative = torch.where(better, relative, now.relative)
        progress = now.size < PROGRESS * now.mark
        now.stalled = torch.where(progress, 0.0, now.stalled + 1)
        now.mark = torch.where(progress, now.size, now.mark)
        at_floor = (relative <= FLOOR * self.eps) & (now.stalled >= self.patience)
        done = (relative <= self.target) | at_floor | ~relative.isfinite()
        if self.count >= self.most:
            done = torch.ones_like(done)
        if bool(done.any()):
            finished = now.select(done.nonzero().flatten())
            self.x[finished.rows] = finished.best
            self.residual[finished.rows] = finished.relative
            self.contraction[finished.rows] = finished.contraction
            self.evaluations[finished.rows] = self.count
            self.at_work = now.select((~done).nonzero().flatten())


def accuracy(dtype: torch.dtype) -> float:
    """The relative error that counts as converged where no tolerance is named: 1e-6 in float32, 1e-12 in float64."""
    return {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 16 * torch.finfo(dtype).eps)


def _norm(x: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=None if x.dtype == torch.float64 else torch.float32)
    return found
