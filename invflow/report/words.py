"""The words in the diagram of a chain: what layers, nets and contexts are called, and what is said of them."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..arguments import arguments_of, one_line
from ..bijection import Bijection
from ..context import ContextShape, seen
from ..fields import cut, shortened
from ..nets.contract import Conditioned
from ..registry import Registry, bijections, nets
from ..registry import parts as registered_parts

WHOLE_CONTEXT = "the context"
LONGEST_VALUE = 60
LONGEST_ABOUT = 160
_SEED = re.compile(r"\bseed[= ]\d+")


def about(cls: type) -> str:
    """What the instances of a class do: the first line of its docstring, without backticks.

    Examples:
        >>> from invflow.bijections import Merge
        >>> about(Merge)
        'Concatenates a pair, the inverse of Split: (a, b) → cat(a, b). Log-determinant 0.'
    """
    first = inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]
    return cut(first.replace("`", "").replace("->", "→"), LONGEST_ABOUT)


def fields_of(module: object, registry: Registry[Any]) -> tuple[str, ...]:
    """The plain fields that have not their default value, each as ``name value``."""
    arguments = arguments_of(module)
    if arguments is None or registry.tag_of(type(module)) is None:
        return ()
    known = registry.fields(type(module))
    given = known.canonical({name: arguments[name] for name in known.plain if name in arguments})
    return tuple(
        f"{name} {value if isinstance(value, str) else shortened(value, LONGEST_VALUE)}"
        for name, value in given.items()
    )


def nets_of(layer: Bijection) -> tuple[str, ...]:
    """The nets of a layer, and a list of parts that it holds, each on one line."""
    found = []
    arguments = arguments_of(layer)
    if arguments is None or bijections.tag_of(type(layer)) is None:
        return ()
    for name, field_ in bijections.fields(type(layer)).fields.items():
        if field_.kind == "net" and arguments.get(name) is not None:
            found.append(f"{name}: {named(arguments[name], nets)}")
        elif field_.kind == "parts":
            found.append(f"{name}: {_listed(arguments[name])}")
    return tuple(found)


def named(module: object, registry: Registry[Any]) -> str:
    """A net or a part: its tag, its fields, and the parts that it is made of."""
    fields = ", ".join(fields_of(module, registry))
    text = f"{registry.name_of(type(module))}{f' ({fields})' if fields else ''}"
    parts = parts_of(module, registry)
    return f"{text} [{parts}]" if parts else text


def parts_of(module: object, registry: Registry[Any]) -> str:
    """The parts that a net, a part or a head is made of; empty if there are none."""
    arguments = arguments_of(module)
    if arguments is None or registry.tag_of(type(module)) is None:
        return ""
    lists = (name for name, one in registry.fields(type(module)).fields.items() if one.kind == "parts")
    return ", ".join(_listed(arguments[name]) for name in lists if arguments.get(name))


def _listed(parts: Iterable[object]) -> str:
    """Parts one after another, equal ones counted."""
    texts = [(text, len([*some])) for text, some in itertools.groupby(named(part, registered_parts) for part in parts)]
    return ", ".join(text if times == 1 else f"{times} x {text}" for text, times in texts)


def sees(layer: Bijection, context: ContextShape) -> str:
    """What the nets of a layer are given of the context; empty for nothing."""
    if context is None:
        return ""
    for one in layer.modules():
        if isinstance(one, Conditioned) and getattr(one, "net", None) is not None and one.net_takes_context:
            names = getattr(one.net, "sees", ...)
            if names is not None:
                return names if isinstance(names, str) else names_of(seen(context, names))
    return ""


def names_of(context: ContextShape) -> str:
    """The names of the entries of a context."""
    if context is None:
        return ""
    return ", ".join(context) if isinstance(context, Mapping) else WHOLE_CONTEXT


def alike(layer: Bijection) -> str:
    """A text that is equal for layers that are alike: in fields, nets and sizes. Seeds may differ."""
    inside = [(type(one).__name__, getattr(one, "sees", ...)) for one in layer.modules()]
    sizes = [tuple(weight.shape) for weight in layer.parameters()]
    return f"{_SEED.sub('seed', one_line(layer))}{inside}{sizes}"


def reseeded(text: str) -> str:
    """A text about a layer that stands for others with other seeds."""
    return _SEED.sub("seeds of their own", text)
