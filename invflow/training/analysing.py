"""The analyses of a trained model on the data of its task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..diagnostics.analysis import (
    LEADING,
    Analysis,
    Separation,
    Spectrum,
    chosen_depths,
    has_derivative,
    is_dense,
    largest_state,
    separations,
    spectra,
)
from ..errors import DataError, InvflowError
from ..measures import LARGEST_JACOBIAN
from ..models import Classifier
from ..samples import Batch, DataSet, InMemory, Samples, Subset
from ..sequential import Sequential
from .data import ordered_loader
from .tasks import Task, evaluating

DEPTHS = 12
INPUTS = 3
TRAIN_SAMPLES = 1000
TEST_SAMPLES = 2000
MOST_FEATURES = 2**26
"""The most numbers in the states of all samples at a depth, in float64 half a GiB; of larger states there are fewer."""

INTEGER_NETS = (
    "no singular values: the chain is exact, and integer nets have no derivatives; analyse the float model that it was "
    "made of, the run that was frozen, or the folder float in this one"
)
ON_GRID = "the chain rounds to a grid, which its derivatives leave out"
REARRANGES = "no singular values: the chain moves numbers only, so that each of them is 1"
NO_CLASSES = "no separation: the data name no two classes"
OWN_CONTEXT = "the features of a sample are computed given its own context, which may tell its class"


def analyse(
    task: Task[Any],
    *,
    depths: int = DEPTHS,
    inputs: int = INPUTS,
    train_samples: int = TRAIN_SAMPLES,
    test_samples: int = TEST_SAMPLES,
    dense: int = LARGEST_JACOBIAN,
    leading: int = LEADING,
    seed: int = 0,
    separate: bool = True,
    announce: Callable[[str], None] = lambda line: None,
) -> Analysis:
    """What applies to a model of: singular values of its Jacobian, linear separation and contraction, by depth.

    Grey levels of a density's images are taken in the middle of their steps, without noise.

    Args:
        task: the model and its data.
        depths: the largest number of depths, at least 2, see `chosen_depths`.
        inputs: the number of test samples at which singular values are computed, the first of those that are drawn.
        train_samples: how many samples the classifiers learn from, at most.
        test_samples: how many they are measured on, at most.
        dense: the largest state, in numbers, of which the Jacobian itself is made.
        leading: how many singular values of a larger one are computed.
        seed: draws the samples.
        separate: whether the linear separation and the contraction are computed, if the data have classes.
        announce: called with a description of each part before it is computed.

    Raises:
        InvflowError: nothing applies, an option is out of range, or a result is not finite.
        DataError: the data do not fit the model, or cannot be read.
    """
    least = {"depths": (depths, 2), "inputs": (inputs, 1), "dense": (dense, 0), "leading": (leading, 1)}
    least |= {"train_samples": (train_samples, 1), "test_samples": (test_samples, 1)}
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise InvflowError(f"analyse expects {name} of at least {smallest}, got {value}")
    chain, data = task.model.bijection, task.data
    if chain.declared_shape not in (None, data.shape):
        raise DataError(f"{data.name} has samples of shape {data.shape}, the model expects {chain.declared_shape}")
    most = max(1, MOST_FEATURES // largest_state(chain, data.shape))
    train = drawn(data.train, min(train_samples, most), seed)
    test = drawn(data.test, min(test_samples, most), seed)
    places = chosen_depths(chain, data.shape, depths)
    notes = _notes(chain, data, places)
    found: list[Spectrum] = []
    if not {INTEGER_NETS, REARRANGES} & set(notes):
        with evaluating(task.model, task.float64_device):
            (some,) = _for_chain(task, InMemory(*test.first(inputs)), task.float64_device)
            sizes = {"dense": dense, "leading": leading}
            found = spectra(chain, some.values, some.context, depths=places, announce=announce, **sizes)
    rows: list[Separation] = []
    accuracy, counts = None, (0, 0)
    if separate and NO_CLASSES not in notes:
        scores = task.model.scores if isinstance(task.model, Classifier) else None
        with evaluating(task.model, task.device):
            known, asked = (_for_chain(task, samples, task.device) for samples in (train, test))
            rows, accuracy = separations(chain, known, asked, depths=places, scores=scores, announce=announce)
        counts = len(train), len(test)
    elif not found:
        raise InvflowError(f"nothing to analyse: {'; '.join(notes)}")
    exact = is_dense(chain, data.shape, dense, leading)
    return Analysis(found, exact, rows, accuracy, *counts, notes, task.model.caveat)


def _notes(chain: Sequential, data: DataSet, depths: list[int]) -> list[str]:
    """What does not apply to a chain and its data, or not without a word."""
    derivative, classes = has_derivative(chain, data.shape), data.classes > 1
    said = {
        INTEGER_NETS: not derivative,
        ON_GRID: derivative and any(step.layer.numerics.on_grid for step in chain.steps(data.shape)),
        REARRANGES: depths == [0],
        NO_CLASSES: not classes,
        OWN_CONTEXT: classes and data.context_shape is not None,
    }
    return [note for note, applies in said.items() if applies]


def drawn(samples: Samples, count: int, seed: int) -> Samples:
    """Some of the samples, drawn at random: they may be stored class after class. Of a loader, the first."""
    if samples.own_batches() is not None:
        return InMemory(*samples.first(count))
    return Subset(samples, torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:count])


def _for_chain(task: Task[Any], samples: Samples, device: torch.device) -> list[Batch]:
    """Batches as the chain takes them, on a device."""
    found = []
    for batch, *_ in ordered_loader(samples):
        there = batch._replace(values=task.centered(batch.values)).to(device)
        found.append(there._replace(context=task.model.for_layers(there.context)))
    return found
