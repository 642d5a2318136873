"""Mutated valid documents, as from typos, merge conflicts or malice."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

SEEDS = [path.read_text() for path in sorted((Path(__file__).parent / "golden" / "v1").glob("*.json"))]


class Object(list):
    """A JSON object as a list of ``[key, value]``, so that a key can be repeated."""


def mutated(seed: int) -> str:
    """The text of a valid document after one to four mutations."""
    rng = random.Random(seed)
    document = json.loads(rng.choice(SEEDS), object_pairs_hook=_pairs)
    root = Object([["document", document]])  # so that the document itself stands somewhere, too
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        rng.choice(MUTATIONS)(rng, root)
    return written(root[0][1])


def written(value: Any) -> str:
    """JSON text with one member per line; NaN and numbers too large for a float are written as Python writes them."""
    if isinstance(value, Object):
        return "{" + ",\n".join(f"{json.dumps(key)}: {written(inner)}" for key, inner in value) + "}"
    if isinstance(value, list):
        return "[" + ",\n".join(map(written, value)) + "]"
    return json.dumps(value)


def _pairs(items: list[tuple[str, Any]]) -> Object:
    return Object([list(item) for item in items])


def _slots(container: Any) -> list[tuple[Any, int]]:
    """Every place of a value: the enclosing list and the index."""
    found: list[tuple[Any, int]] = []
    for i, entry in enumerate(container):
        slot = (entry, 1) if isinstance(container, Object) else (container, i)
        found.append(slot)
        value = slot[0][slot[1]]
        found += _slots(value) if isinstance(value, list) else []
    return found


def _containers(root: Object) -> list[Any]:
    """Every object and list that is not empty, the document itself included."""
    values = [holder[i] for holder, i in _slots(root)]
    return [value for value in values if isinstance(value, list)] or [Object()]


def delete(rng: random.Random, root: Object) -> None:
    container = rng.choice(_containers(root))
    if container:
        del container[rng.randrange(len(container))]


def duplicate(rng: random.Random, root: Object) -> None:
    container = rng.choice(_containers(root))
    if container:
        container.insert(rng.randrange(len(container) + 1), copy.deepcopy(rng.choice(container)))


def retype(rng: random.Random, root: Object) -> None:
    holder, i = rng.choice(_slots(root))
    holder[i] = copy.deepcopy(rng.choice(STRANGERS))


def adjust(rng: random.Random, root: Object) -> None:
    numbers = [(holder, i) for holder, i in _slots(root) if type(holder[i]) is int]
    if numbers:
        holder, i = rng.choice(numbers)
        holder[i] += rng.choice([-1, 1, 2])


def swap(rng: random.Random, root: Object) -> None:
    (first, i), (second, j) = rng.choice(_slots(root)), rng.choice(_slots(root))
    a, b = written(first[i]), written(second[j])
    if a not in b and b not in a:  # else one would hold itself
        first[i], second[j] = second[j], first[i]


def nest(rng: random.Random, root: Object) -> None:
    holder, i = rng.choice(_slots(root))
    for _ in range(rng.choice([1, 1, 1, 40])):
        holder[i] = rng.choice(WRAPPERS)(holder[i])


def rename(rng: random.Random, root: Object) -> None:
    objects = [container for container in _containers(root) if isinstance(container, Object) and container]
    if objects:
        keys = [key for one in objects for key, _ in one]
        member = rng.choice(rng.choice(objects))
        member[0] = rng.choice([member[0][1:], member[0] + "s", rng.choice(keys), "", "$var", "\ud800"])


MUTATIONS = [delete, duplicate, retype, adjust, swap, nest, rename]

STRANGERS = [
    *(None, True, False, 0, 1, -1, 2, 3, 10_001, 10**9, 2**53, 2**53 + 1, 10**30),
    *(4.0, 0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "psi", "conv", "2", "x" * 1000, "\ud800", "\N{SNOWMAN}"),
    *([], [1], [[1], [2]], [0, 1, 2], Object(), Object([["type", "psi"]]), Object([["$var", "two"]])),
]

WRAPPERS = [
    lambda value: [value],
    lambda value: Object([["type", "inverse"], ["layer", value]]),
    lambda value: Object([["type", "each"], ["layer", value]]),
    lambda value: Object([["type", "sequential"], ["layers", [value]]]),
    lambda value: Object([["type", "repeat"], ["times", 2], ["layers", [value]]]),
    lambda value: Object([["type", "repeat"], ["times", 1], ["with", Object([["a", [value]]])], ["layers", [value]]]),
    lambda value: Object([["$var", value]]),
    lambda value: Object([["$item", value]]),
]
