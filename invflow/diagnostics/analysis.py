"""What a trained chain does layer by layer: singular values of its Jacobian, linear separation, and contraction.

Reference: Jacobsen, Smeulders, Oyallon: i-RevNet: Deep Invertible Networks, 2018, https://arxiv.org/abs/1802.07088
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bijection import Rearrangement
from ..context import Context
from ..errors import InvflowError
from ..measures import LARGEST_JACOBIAN, jacobian, with_context
from ..samples import Batch
from ..sequential import Sequential
from ..state import Shape, State, batch_size, flat_size, flatten, sample, shape_of
from ..steps import Step
from .conditioning import linearized
from .rounding import in_double

LEADING = 64
"""How many singular values of a large Jacobian are computed."""

ACCURACY = 1e-6
"""Of these, relative to the largest."""

REGULARIZATION = 1.0
"""The parameter C of the linear classifier, the inverse of its penalty's strength: scikit-learn's default."""

ROWS = 500
"""The number of samples whose distances to all others are computed at once."""

PAIRED = 2000
"""The largest number of test samples, the first, whose distances to each other are measured."""

INPUT, LOGITS = "input", "logits"


@dataclass(frozen=True)
class Spectrum:
    """The singular values of the Jacobian of a chain's first layers, at some inputs.

    Attributes:
        depth: how many of the chain's `steps` these are.
        layer: a description of the last of them, on one line.
        values: for each input its singular values, largest first.
    """

    depth: int
    layer: str
    values: list[list[float]]


@dataclass(frozen=True)
class Separation:
    """How well the features at a depth tell the classes of test samples.

    Attributes:
        depth: the number of the chain's `steps` before it; the logits count as one more.
        layer: a description of the last of them, on one line; "input" before the first, "logits" after the head.
        linear_accuracy: of logistic regression on the features, standardised by those of the training samples, with a
            fixed penalty.
        nearest_accuracy: of the class of the training sample with the nearest features, in the Euclidean norm.
        contraction: the mean distance between the features of test samples of the same class over that of different
            ones, of 2,000 of them at most: 1 if classes play no role, 0 if each class has become a point; NaN if there
            are no such pairs.
    """

    depth: int
    layer: str
    linear_accuracy: float
    nearest_accuracy: float
    contraction: float


@dataclass(frozen=True)
class Analysis:
    """The analyses of a trained model.

    Attributes:
        spectra: by depth; empty if the chain has no derivative, or moves numbers only.
        exact: whether all singular values were computed, from the Jacobian itself; if not, the leading ones, by Lanczos
            iteration with Jacobian-vector products.
        separations: by depth, the input first; empty if the data have no classes.
        test_accuracy: of the model's own head on the same test samples; None without a head or classes.
        train_samples: how many samples the classifiers learned from.
        test_samples: how many they were measured on.
        notes: what was left out, and what to keep in mind.
        caveat: see `invflow.models.caveat`.
    """

    spectra: list[Spectrum]
    exact: bool
    separations: list[Separation]
    test_accuracy: float | None
    train_samples: int
    test_samples: int
    notes: list[str]
    caveat: str

    def __repr__(self) -> str:
        values = f"{len(self.spectra)} spectra, {'all' if self.exact else 'leading'} singular values"
        classes = f"{len(self.separations)} depths, {self.train_samples} training and {self.test_samples} test samples"
        return f"<analysis: {values}; separation at {classes}>"


def chosen_depths(chain: Sequential, shape: Shape, most: int) -> list[int]:
    """The depths at which a chain is analysed, as numbers of its steps: 0, and after each layer that computes.

    A layer that only moves numbers changes neither singular values nor distances, nor what is linear.

    Args:
        chain: the chain.
        shape: of its input.
        most: the largest number of depths, at least 2; of more, some are chosen evenly, the first and last included.

    Examples:
        >>> from invflow.bijections import Affine, Psi
        >>> chosen_depths(Sequential(Psi(2), *(Affine(shape=(4, 1, 1)) for _ in range(4))), (1, 2, 2), 3)
        [0, 3, 5]
    """
    steps = enumerate(chain.steps(shape), start=1)
    found = [0, *(depth for depth, step in steps if not isinstance(step.layer, Rearrangement))]
    if len(found) <= most:
        return found
    return [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]


def has_derivative(chain: Sequential, shape: Shape) -> bool:
    """Whether autodiff has derivatives of a chain: all but integer nets, of which `exact` numerics consist."""
    return not any(step.layer.numerics.integer_nets for step in chain.steps(shape))


def spectra(
    chain: Sequential,
    x: State,
    context: Context = None,
    *,
    depths: Collection[int],
    dense: int = LARGEST_JACOBIAN,
    leading: int = LEADING,
    announce: Callable[[str], None] = lambda line: None,
) -> list[Spectrum]:
    """The singular values of ``d z_k / d x`` at each sample, where z_k is the state after k steps, in float64.

    Up to ``dense`` numbers, the Jacobian itself is made, step by step: ``J_k = D_k J_{k-1}``. Values smaller than the
    largest one on the way, times eps, are rounding errors. Of a larger one, the leading values are found by Lanczos
    iteration (ARPACK) with products of Jacobians and vectors, so that it is never made.

    Args:
        chain: has derivatives; a copy of it runs, in eval mode. Rounding to a grid counts as the identity.
        x: a batch of samples.
        context: the chain's context, if it has one.
        depths: the numbers of steps k; 0, where the Jacobian is the identity, is left out.
        dense: the largest state, in numbers, whose Jacobian is made.
        leading: how many values of a larger one are computed.
        announce: called with a description of each part before it is computed.

    Raises:
        InvflowError: the chain has integer nets, a derivative is not finite, or the iteration does not converge.

    Examples:
        >>> from invflow.bijections import Affine
        >>> layer = Affine(shape=(2,))
        >>> with torch.no_grad():
        ...     _ = layer.log_scale.copy_(torch.tensor([2.0, 0.5]).log())
        >>> found = spectra(Sequential(layer, layer), torch.zeros(1, 2), depths=[1, 2])
        >>> [[round(value, 6) for value in spectrum.values[0]] for spectrum in found]
        [[2.0, 0.5], [4.0, 0.25]]
    """
    context = chain.admit(x, context)
    if not has_derivative(chain, shape_of(x)):
        raise InvflowError("singular values expect a chain with derivatives, got one with integer nets")
    chain, x, context = in_double(chain, x, context)
    steps = chain.eval().steps(shape_of(x))
    wanted = sorted(depth for depth in set(depths) if depth > 0)
    measure = _of_jacobians if is_dense(chain, shape_of(x), dense, leading) else _of_iterations
    of_inputs = []
    for index in range(batch_size(x)):
        announce(f"singular values at input {index + 1} of {batch_size(x)}")
        of_inputs.append(measure(steps, sample(x, index), sample(context, index), wanted, leading))
    layers = [steps[depth - 1].title for depth in wanted]
    by_depth = [list(values) for values in zip(*of_inputs, strict=True)] or [[] for _ in wanted]
    return [Spectrum(*entries) for entries in zip(wanted, layers, by_depth, strict=True)]


def is_dense(chain: Sequential, shape: Shape, dense: int = LARGEST_JACOBIAN, leading: int = LEADING) -> bool:
    """Whether `spectra` makes the Jacobian itself: no state is larger than ``dense``, or it has few columns anyway."""
    return largest_state(chain, shape) <= dense or flat_size(shape) <= leading


def largest_state(chain: Sequential, shape: Shape) -> int:
    """The number of numbers in the largest state of a chain, for an input of this shape."""
    return max(map(flat_size, chain.shapes(shape)))


def _of_jacobians(
    steps: Sequence[Step], state: State, context: Context, depths: Sequence[int], leading: int
) -> list[list[float]]:
    """All singular values at each depth, largest first."""
    found, product = [], torch.eye(flat_size(shape_of(state))).to(flatten(state))
    for depth, step in enumerate(steps[: max(depths, default=0)], start=1):
        product = jacobian(with_context(step.after, context), state) @ product
        with torch.no_grad():
            state = step.after(state, context)
        _require_finite(product, step.name)
        if depth in depths:
            found.append(torch.linalg.svdvals(product).tolist())
    return found


def _of_iterations(
    steps: Sequence[Step], state: State, context: Context, depths: Sequence[int], leading: int
) -> list[list[float]]:
    """The leading singular values at each depth, largest first."""
    from scipy.sparse.linalg import ArpackError, LinearOperator, svds

    draws, found = np.random.default_rng(0), []
    for depth in depths:
        first, name = steps[:depth], steps[depth - 1].name
        products = linearized(lambda x, first=first: _after(first, x, context), state)  # type: ignore[misc]
        shape = flat_size(shape_of(_after(first, state, context))), flat_size(shape_of(state))
        operator = LinearOperator(shape, *(_on_arrays(one, name, state) for one in products), dtype=np.float64)
        start = draws.standard_normal(min(shape))
        if min(shape) <= leading:  # a joint has left few numbers
            rows = operator.rmatmat(np.eye(shape[0])) if shape[0] <= shape[1] else operator.matmat(np.eye(shape[1]))
            found.append(np.linalg.svd(rows, compute_uv=False).tolist())
            continue
        try:
            values = svds(operator, leading, v0=start, tol=ACCURACY, return_singular_vectors=False)
        except ArpackError as error:
            raise InvflowError(f"singular values up to layer {name}: {error}") from None
        found.append(sorted(map(float, values), reverse=True))
    return found


def _on_arrays(product: Callable[[Tensor], Tensor], name: str, state: State) -> Callable[[Any], Any]:
    """A product of the Jacobian up to a layer and a vector, for vectors of numpy."""
    like = flatten(state)

    def apply(v: Any) -> Any:
        made = product(torch.from_numpy(v.ravel().copy()).to(like)).cpu()
        _require_finite(made, name)
        return made.numpy()

    return apply


def _require_finite(made: Tensor, name: str) -> None:
    if not bool(made.isfinite().all()):
        raise InvflowError(f"singular values: the derivative up to layer {name} is not finite at this input")


def _after(steps: Sequence[Step], state: State, context: Context) -> State:
    for step in steps:
        state = step.after(state, context)
    return state


@torch.no_grad()
def separations(
    chain: Sequential,
    train: Sequence[Batch],
    test: Sequence[Batch],
    *,
    depths: Collection[int],
    scores: Callable[[Any], Tensor] | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> tuple[list[Separation], float | None]:
    """How well the states along a chain tell classes, to a linear and to a nearest-neighbour classifier.

    Both classifiers learn from training samples, at each depth anew, and are measured on test samples; see
    `Separation`. The states of all samples are kept at one depth at a time.

    Args:
        chain: in eval mode.
        train: batches of inputs with labels; their context is the chain's.
        test: likewise.
        depths: numbers of steps, 0 for the inputs.
        scores: the head, from the last state to logits, which are one more depth; None if there is none.
        announce: called with a description of each depth before it is measured.

    Returns:
        One entry for each depth, and the accuracy of the head on the test samples.

    Raises:
        InvflowError: fewer than two classes among the training samples, or features that are not finite.
    """
    learned, asked = (torch.cat([_labels(batch) for batch in batches]).cpu() for batches in (train, test))
    if not len(learned) or bool((learned == learned[0]).all()):
        raise InvflowError("separation expects training samples of at least two classes, got one; take more of them")
    found, accuracy = [], None
    pairs = zip(*(_features(chain, batches, depths, scores) for batches in (train, test)), strict=True)
    for (depth, layer, known), (_, _, features) in pairs:
        announce(f"separation after {layer}")
        if not (bool(known.isfinite().all()) and bool(features.isfinite().all())):
            raise InvflowError(f"separation: the features after {layer} are not finite")
        guesses, contraction = _by_distance(features, asked, known, learned)
        linear = _linear_accuracy(known, learned, features, asked)
        found.append(Separation(depth, layer, linear, _mean(guesses == asked), contraction))
        if layer == LOGITS:
            accuracy = _mean(features.argmax(1) == asked)
    return found, accuracy


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise InvflowError("separation expects samples with labels, got some without")
    return batch.labels


def _features(
    chain: Sequential, batches: Sequence[Batch], depths: Collection[int], scores: Callable[[Any], Tensor] | None
) -> Iterator[tuple[int, str, Tensor]]:
    """The states of all samples at each depth as rows in float64, with the depth and its layer; the logits at last."""
    contexts = [chain.admit(batch.values, batch.context) for batch in batches]
    states = [chain.numerics.enter(batch.values) for batch in batches]
    steps = chain.steps(shape_of(states[0]))

    def rows(parts: Sequence[Any]) -> Tensor:
        return torch.cat([flatten(part).cpu().double() for part in parts])

    if 0 in depths:
        yield 0, INPUT, rows(states)
    for depth, step in enumerate(steps, start=1):
        states = [step.after(state, context) for state, context in zip(states, contexts, strict=True)]
        if depth in depths:
            yield depth, step.title, rows(states)
    if scores is not None:
        yield len(steps) + 1, LOGITS, rows([scores(state) for state in states])


def _linear_accuracy(known: Tensor, learned: Tensor, features: Tensor, asked: Tensor) -> float:
    """The accuracy on the second samples of logistic regression on the first.

    The penalty is on the Euclidean norm of the weights, so that a rotation of the features changes nothing, nor does it
    to leave out directions that no training sample has: PCA bounds their number by that of the samples.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = LogisticRegression(C=REGULARIZATION, max_iter=10_000)
    model = make_pipeline(StandardScaler(), PCA(svd_solver="full"), classifier).fit(known.numpy(), learned.numpy())
    return float(model.score(features.numpy(), asked.numpy()))


def _by_distance(features: Tensor, asked: Tensor, known: Tensor, learned: Tensor) -> tuple[Tensor, float]:
    """The class of the nearest known sample, and the mean distance within classes over that between them."""
    guesses = [learned[torch.cdist(rows, known).argmin(1)] for rows in torch.split(features, ROWS)]
    some, classes = features[:PAIRED], asked[:PAIRED]
    sums, pairs = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for rows, labels in zip(torch.split(some, ROWS), torch.split(classes, ROWS), strict=True):
        # By differences: by products, the distance of near samples would be that of their rounding.
        distances = torch.cdist(rows, some, compute_mode="donot_use_mm_for_euclid_dist")
        same = labels[:, None] == classes
        sums += torch.stack([(distances * same).sum(), (distances * ~same).sum()])
        pairs += torch.stack([same.sum(), (~same).sum()])
    pairs[0] -= len(some)  # of samples with themselves, whose distance is 0
    within, between = (sums / pairs).tolist()
    return torch.cat(guesses), within / between if between else math.nan


def _mean(right: Tensor) -> float:
    return float(right.double().mean())
