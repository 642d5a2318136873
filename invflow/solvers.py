"""Fixed points of contractions, for each sample separately, with a report on their accuracy; and of triangular maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .progress import progress

Method: TypeAlias = Literal["anderson", "picard"]
Step: TypeAlias = Callable[[Tensor, Tensor], Tensor]

MEMORY = 8
"""The number of past differences that Anderson's method combines. If few directions are near the limit (128
dimensions, contraction 0.97, to an error of 1e-6), 5 differences need 23 evaluations, 8 need 16, 10 need 14."""

LARGEST_GROWTH = 2.0
"""A mixed step is undone if its residual is larger than the last one times this. Later steps make up for smaller
growth: a bound at the largest residual of a Picard step costs up to 6 more evaluations if f has kinks."""

TIKHONOV = 1e-8
"""Regularisation of Anderson's least squares, relative to the size of each difference; 10 eps if that is more."""

LARGEST_DEBT = 1.0
CREDIT = 3.0
"""A sample continues with Picard's method when Anderson's has lost `LARGEST_DEBT` evaluations against it. Gains offset
losses up to `CREDIT` evaluations, so that old gains do not hide new losses for long."""

PROGRESS = 0.9
PATIENCE = 3
"""A residual near the rounding errors has reached its floor if it has not fallen by the factor `PROGRESS` for
`PATIENCE` more evaluations than Picard's method needs for that in the worst case."""

ROUNDING = 0.25
"""The root mean square of one rounding error per number, in units of eps."""

NEAR = 1e3
"""Points nearer to each other than this, in units of eps, give no estimate of the contraction."""

MOST_EVALUATIONS = 10_000

FLOOR = 64
"""A residual is near the rounding errors up to this, in units of eps; if it stalls above, rounding is not the cause."""

SETTLED = 4
"""A number has settled if it changes by at most this, in units of its own eps: roundings change it by 1 or 2."""


@dataclass(frozen=True)
class Convergence:
    """How well a fixed point was found; each entry has the shape ``(batch,)``.

    Attributes:
        evaluations: the number of evaluations of the map for the sample.
        residual: ``|f(x) - x| / max(|x|, |f(x)|, |beside|)``, with root mean squares; the divisor is at least the
            smallest normal number, below which rounding errors grow no smaller.
        contraction: the largest ratio ``|f(x) - f(x')| / |x - x'|`` observed.
        error: an estimate of ``|x - x*|`` in the same unit: the residual plus the rounding error of evaluating f,
            divided by ``1 - contraction``.
        converged: whether that error is within the tolerance, or the residual within what was permitted.
    """

    evaluations: Tensor
    residual: Tensor
    contraction: Tensor
    error: Tensor
    converged: Tensor

    @property
    def failed(self) -> list[int]:
        """The indices of the samples that have not converged."""
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
    """A fixed point and the report on its convergence."""

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
    permitted: float = 0.0,
    beside: Tensor | None = None,
    max_evaluations: int | None = None,
) -> Solution:
    """The fixed point ``x = f(x)`` of a contraction, for each sample of a batch separately.

    Picard's method repeats ``x <- f(x)``: each step reduces the error by the factor L, the Lipschitz constant of f.
    Anderson's method takes the combination of the last points whose residuals cancel best; if f is nearly linear, it is
    as good as GMRES. It compares the progress of its steps with the contraction that it observes: a sample that falls
    behind continues with Picard's method, and a step that makes the residual much larger is undone.

    A sample that has converged, is not finite, or makes no more progress is not evaluated again. So the result for a
    sample does not depend on the others.

    Args:
        step: ``f(x, rows)`` for a part of the batch; ``rows`` are the indices of its samples.
        start: the first x, ``(batch, ...)``.
        contraction: L, below 1.
        method: "anderson" or "picard".
        tolerance: the relative error at which to stop, which ``residual / (1 - L)`` bounds; with None, the solver
            continues until rounding errors keep the residual from falling, and the tolerance is `accuracy`.
        permitted: a relative residual that counts as converged in any case: what rounding errors of f leave.
        beside: states that x is computed from, ``(batch, ...)``: what their roundings make is no error of x, however
            small x is; by default the first x.
        max_evaluations: the limit for each sample; by default what Picard's method needs in the worst case.

    Examples:
        >>> solution = solve(lambda x, rows: 1 + x / 2, torch.zeros(3, 1), contraction=0.5)
        >>> solution.x.flatten().tolist(), solution.convergence.failed
        ([2.0, 2.0, 2.0], [])
    """
    if not start.numel():
        nothing = start.new_zeros(start.shape[0])
        return Solution(start.clone(), Convergence(nothing.long(), nothing, nothing, nothing, nothing == 0))
    known = start if beside is None else beside
    solver = _Solver(step, start, known, contraction, method, tolerance, permitted, max_evaluations)
    while len(solver.at_work.rows):
        solver.advance()
    return solver.solution()


@dataclass
class _Samples:
    """The state of the samples that are not finished, one row each, flattened.

    Attributes:
        rows: their indices in the batch.
        x: the last point.
        image: f(x).
        size: the `_size` of the residual, ``image - x``.
        scale: the unit of errors.
        best: the image with the smallest relative residual so far.
        relative: that residual.
        mark: the size of the residual when it last fell by the factor `PROGRESS`.
        stalled: the number of evaluations since then.
        contraction: the largest ratio of distances so far.
        debt: the number of evaluations lost by mixing.
        mixes: whether there are differences to mix, and the last step was not undone.
        images: the last `MEMORY` differences of images, in units of the sizes of ``changes``; padded with zeros.
        changes: the last differences of residuals, each divided by its size.
        gram: the inner products of ``changes``, divided by the number of dimensions.
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
        """The samples in some of these rows."""
        return _Samples(**{field.name: getattr(self, field.name).index_select(0, kept) for field in fields(self)})


class _Solver:
    """The samples that are not finished, and the results of those that are."""

    def __init__(
        self,
        step: Step,
        start: Tensor,
        beside: Tensor,
        contraction: float,
        method: Method,
        tolerance: float | None,
        permitted: float,
        most: int | None,
    ) -> None:
        self.step, self.shape, self.method, self.limit = step, start.shape, method, contraction
        self.eps, self.tiny = torch.finfo(start.dtype).eps, torch.finfo(start.dtype).tiny
        self.patience = math.log(PROGRESS) / math.log(contraction) + PATIENCE
        enough = 2 * math.log(self.eps) / math.log(contraction) + self.patience
        self.most = most or min(math.ceil(enough), MOST_EVALUATIONS)
        self.target = self.eps / 2 if tolerance is None else tolerance * (1 - contraction)
        self.allowed, self.permitted = accuracy(start.dtype) if tolerance is None else tolerance, permitted
        self.tikhonov = max(TIKHONOV, 10 * self.eps)
        self.most_debt = LARGEST_DEBT if method == "anderson" else -math.inf  # Picard's method never mixes
        x = start.flatten(1)
        self.x, self.unit = x.clone(), _size(beside.flatten(1))
        rows, zero = torch.arange(len(x), device=x.device), torch.zeros_like(self.unit)
        self.evaluations, self.residual, self.contraction = torch.zeros_like(rows), zero + math.inf, zero.clone()
        self.count = 1
        image = step(start, rows).flatten(1)
        history = x.new_zeros(len(x), MEMORY, x.shape[1])
        self.at_work = _Samples(
            rows=rows, x=x, image=image, size=_size(image - x), scale=zero, best=image, relative=zero + math.inf,
            mark=zero + math.inf, stalled=zero, contraction=zero, debt=zero, mixes=rows < 0,
            images=history, changes=history.clone(), gram=x.new_zeros(len(x), MEMORY, MEMORY),
        )  # fmt: skip
        self._look()

    def solution(self) -> Solution:
        error = (self.residual + ROUNDING * self.eps) / (1 - self.contraction.clamp(max=self.limit))
        converged = (error <= self.allowed) | (self.residual <= self.permitted)
        convergence = Convergence(self.evaluations, self.residual, self.contraction, error, converged)
        return Solution(self.x.reshape(self.shape), convergence)

    def advance(self) -> None:
        """Takes one step for each sample that is not finished."""
        now = self.at_work
        mixing = now.mixes & (now.debt < self.most_debt)
        x = torch.where(mixing[:, None], self._mixed(), now.image) if bool(mixing.any()) else now.image
        image = self.step(x.reshape(-1, *self.shape[1:]), now.rows).flatten(1)
        self.count += 1
        size = _size(image - x)
        kept = ~mixing | (size <= LARGEST_GROWTH * now.size)
        move, difference = x - now.x, image - now.image
        distance = _size(move)
        far = distance > NEAR * self.eps * now.scale  # nearer points differ by rounding errors
        ratio = torch.where(far, _size(difference) / distance, 0.0).nan_to_num()
        now.contraction = torch.maximum(now.contraction, ratio)
        won = torch.log(size / now.size) / torch.log(ratio.clamp(max=self.limit))  # in steps of Picard's method
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
        gram = now.gram.double()
        gram.diagonal(dim1=1, dim2=2).add_(self.tikhonov)
        size = now.size[:, None].to(now.x.dtype)
        residual = (now.image - now.x) / size.clamp(min=self.tiny)
        right = (now.changes @ residual[:, :, None])[:, :, 0].double() / now.x.shape[1]
        weights = torch.linalg.solve_ex(gram, right).result.to(now.x.dtype)
        mixed: Tensor = now.image - size * (weights[:, None, :] @ now.images)[:, 0]
        return mixed

    def _remember(self, kept: Tensor, image: Tensor, change: Tensor) -> None:
        """Replaces the oldest differences by these, for the samples whose step is kept."""
        if self.method == "picard":
            return
        now, place = self.at_work, self.count % MEMORY
        unit = _size(change)[:, None].to(change.dtype).clamp(min=self.tiny)
        now.images[:, place] = torch.where(kept[:, None], image / unit, now.images[:, place])
        now.changes[:, place] = torch.where(kept[:, None], change / unit, now.changes[:, place])
        products = (now.changes @ now.changes[:, place, :, None])[:, :, 0] / change.shape[1]
        now.gram[:, place] = products
        now.gram[:, :, place] = products

    def _look(self) -> None:
        """Keeps the best image, which is nearer to the fixed point than x, and removes the samples that are done."""
        now = self.at_work
        now.scale = torch.maximum(self.unit.index_select(0, now.rows), torch.maximum(_size(now.x), _size(now.image)))
        now.scale = now.scale.clamp(min=self.tiny)
        relative = torch.where(now.size == 0, 0.0, now.size / now.scale)
        better = ~(relative >= now.relative)  # also if it is NaN, so that the report shows it
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


def _of_each_number(x: Tensor) -> Tensor:
    return SETTLED * x.abs()


@torch.no_grad()
def solve_triangular(
    step: Callable[[Tensor], Tensor],
    start: Tensor,
    most: int,
    who: str,
    rounding: Callable[[Tensor], Tensor] = _of_each_number,
) -> Tensor:
    """The fixed point ``x = f(x)`` of a map each of whose numbers depends on those before it alone, in some order.

    Jacobi's iteration ``x <- f(x)`` makes number k right in step k at the latest, whatever the later ones are, so that
    as many steps as numbers are enough. It ends as soon as no number changes beyond rounding, which is often long
    before; what is left is as small as the effect of one rounding of each number. It also ends if a number is no longer
    finite, because the next step may spread it to all others.

    Args:
        step: f, for the whole batch.
        start: the first x, ``(batch, ...)``.
        most: how many numbers depend on each other, at least: the largest number of steps.
        who: what is solved, for a bar that shows the steps if they take long.
        rounding: how much roundings change each number of x, in units of eps.

    Examples:
        >>> doubled_neighbour = lambda x: torch.nn.functional.pad(2 * x[:, :-1], (1, 0), value=1.0)
        >>> solve_triangular(doubled_neighbour, torch.zeros(1, 5), most=5, who="powers")
        tensor([[ 1.,  2.,  4.,  8., 16.]])
    """
    x, eps = start, torch.finfo(start.dtype).eps
    with progress(who, most) as advance:
        for _ in range(most):
            before, x = x, step(x)
            settled = (x - before).abs() <= eps * rounding(x)
            if bool(settled.all()) or not bool(x.isfinite().all()):
                break
            advance()
    return x


def accuracy(dtype: torch.dtype) -> float:
    """The relative error that counts as converged if no tolerance is given: 1e-6 in float32, 1e-12 in float64."""
    return {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 16 * torch.finfo(dtype).eps)


def _size(x: Tensor) -> Tensor:
    """The root mean square of each row; no square overflows or underflows."""
    if x.dtype != torch.float64 and x.device.type != "mps":  # float64 holds the square of every float32
        plain: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) / math.sqrt(x.shape[1])
        return plain
    largest = torch.linalg.vector_norm(x, math.inf, dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    found: Tensor = largest[:, 0] * (torch.linalg.vector_norm(x / largest, dim=1) / math.sqrt(x.shape[1]))
    return found
