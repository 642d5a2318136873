"""Property tests of registered bijections, in one line of a package's own test suite."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings

from ..context import make_context
from ..registry import bijections
from ..state import leaves, shape_of, zeros
from .checker import check_bijection, chosen, examine
from .report import Report
from .strategies import Case, cases, conditions
from .trial import Setting, Subject

COMPILES = "compiles"


def property_tests(*tags: str, skip: Collection[str] = ()) -> Callable[..., None]:
    """A pytest function that tests registered bijections in the same way as the built-in ones.

    Hypothesis draws documents, shapes, inputs, contexts, dtypes, modes and weights, and every property is checked on
    each example. The Hypothesis profile sets the number of examples; there is no deadline.

    Args:
        *tags: the types to test, as in a spec; they are registered, or advertised by an installed package.
        skip: the names of the properties to skip.

    Examples:
        >>> test_mine = property_tests("psi", "permute")  # a test module needs no more than this line
    """
    import pytest

    @pytest.mark.parametrize("tag", tags)
    def test(tag: str) -> None:
        check_examples(tag, skip)

        # The first examples compile, load and build: they exceed any deadline.
        @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
        @given(case=cases(tag), setting=conditions())
        def every_property(case: Case, setting: Setting) -> None:
            check_case(case, setting, skip)

        every_property()

    return test


def check_case(case: Case, setting: Setting, skip: Collection[str] = ()) -> Report:
    """Check every property of a drawn layer, or chain of layers, in one setting. Raises BijectionError.

    Only compilation is skipped: `check_examples` checks it once per type.
    """
    subject = Subject(case.bijection(seed=setting.seed), case.shape, case.context_shape)
    report = examine(subject, [setting], chosen(skip={COMPILES, *skip}), setting.seed)
    report = dataclasses.replace(report, subject=str(case.spec)).require_ok()
    _check_construction(case)
    return report


def check_examples(tag: str, skip: Collection[str] = ()) -> None:
    """Check that a registered type has examples, that they build, and that one of them compiles."""
    examples = [Case(({"type": tag, **fields},), shape) for fields, shape in bijections.find(tag).examples]
    assert examples, f"{tag} has no examples: it is neither documented nor tested"
    layers = [case.bijection() for case in examples]
    if COMPILES not in skip:
        check_bijection(layers[-1], examples[-1].shape, only=[COMPILES])


def _check_construction(case: Case) -> None:
    """Check that another instance loads the weights of the first, and that constructors work without memory."""
    first, other = case.chain(seed=0), case.chain(seed=1)
    assert list(first.state_dict()) == list(other.state_dict()), "two instances have different state_dict keys"
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.device("meta"):
        chain: Any = case.chain().eval()
        context = make_context(lambda one: torch.zeros(2, *one), case.context_shape)
        y = chain(zeros(case.shape, 2), context)
    assert all(leaf.is_meta for leaf in leaves(y)), "on the meta device, the constructor makes real tensors"
    assert shape_of(y) == chain.output_shape(case.shape)
