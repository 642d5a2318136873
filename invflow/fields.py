"""The JSON fields of a registered class, which are its constructor's annotated parameters."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PydanticSchemaGenerationError, ValidationError, create_model
from pydantic_core import ErrorDetails
from torch import nn

from .bijection import Bijection
from .errors import InvflowError
from .part import Part

FILLED_BY_BUILDER = frozenset({"shape", "in_shape", "out_shape", "context_shape"})
"""Parameters that are not JSON fields: the builder fills them, Python users pass them."""

REQUIRED = inspect.Parameter.empty
Kind = Literal["value", "layer", "layers", "net", "parts"]

LISTS: Mapping[Kind, type] = {"layers": Bijection, "parts": Part}
"""The kinds of fields that are lists of documents, and the class of what they hold."""
_CLASSES: Mapping[Kind, type] = {"layer": Bijection, "net": nn.Module}


@dataclass(frozen=True)
class JsonField:
    """One field of a document.

    Attributes:
        kind: ``"value"`` is plain JSON, validated by pydantic; ``"layer"`` and ``"net"`` are documents of their own,
            ``"layers"`` and ``"parts"`` are lists of them.
    """

    name: str
    kind: Kind
    annotation: Any
    default: Any
    description: str

    @property
    def required(self) -> bool:
        return self.default is REQUIRED


class FieldSet:
    """The JSON fields of one class."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        _, *parameters = _signature(cls).parameters.values()
        self.signature = inspect.Signature(parameters)
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                raise TypeError(f"{cls.__name__}: a registered constructor cannot take **{name}: name each field")
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise TypeError(f"{cls.__name__}: {name!r} is positional-only; a JSON field is passed by its name")
            if parameter.kind is parameter.VAR_POSITIONAL and name != parameters[0].name:
                raise TypeError(f"{cls.__name__}: other parameters than *{name} are passed by name: put them after it")
            if name in ("type", "note", "context"):
                raise TypeError(f"{cls.__name__}: {name!r} has another meaning in a document; rename the parameter")
            if parameter.annotation is parameter.empty and name not in FILLED_BY_BUILDER:
                raise TypeError(f"{cls.__name__}: parameter {name!r} needs a type annotation: it is a JSON field")

    @functools.cached_property
    def fields(self) -> Mapping[str, JsonField]:
        """Name -> field, in the constructor's order."""
        try:
            # Without parameters there may be no constructor, and nothing to resolve names in.
            hints = typing.get_type_hints(self.cls.__init__, include_extras=True) if self.signature.parameters else {}  # type: ignore[misc]
        except NameError as error:
            raise TypeError(f"{self.cls.__name__}: an annotation cannot be resolved: {error}") from None
        descriptions = argument_descriptions(inspect.getdoc(self.cls) or "")
        found = {}
        for name, parameter in self.signature.parameters.items():
            if name in FILLED_BY_BUILDER:
                continue
            variadic = parameter.kind is parameter.VAR_POSITIONAL
            kind = _kind(hints[name], variadic)
            if variadic and kind not in LISTS:
                raise TypeError(f"{self.cls.__name__}: only *{name}: Bijection or *{name}: Part can be variadic")
            default = () if variadic else parameter.default
            found[name] = JsonField(name, kind, hints[name], default, descriptions.get(name, ""))
        return types.MappingProxyType(found)

    @functools.cached_property
    def values(self) -> type[BaseModel]:
        """The pydantic model of the plain fields."""
        # Aliases, because names such as `copy`, `json` or `_k` have a meaning in pydantic.
        definitions: dict[str, Any] = {}
        for name in self.plain:
            field = self.fields[name]
            default = ... if field.required else field.default
            described = Field(default, alias=name, description=field.description or None)
            definitions[f"field_{name}"] = field.annotation, described
        config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
        try:
            return create_model(self.cls.__name__, __config__=config, **definitions)
        except PydanticSchemaGenerationError as error:
            raise TypeError(f"{self.cls.__name__}: a parameter's type has no JSON form: {error.message}") from None

    @functools.cached_property
    def plain(self) -> tuple[str, ...]:
        """The names of the plain fields."""
        return tuple(name for name, field in self.fields.items() if field.kind == "value")

    def validate(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of plain fields, checked and converted as in a document; absent ones stay absent.

        Raises:
            pydantic.ValidationError: a value is invalid.
        """
        # From JSON text, so that Python's tuples and JSON's arrays meet the same strict rules.
        checked = self.values.model_validate_json(_encode(values))
        return {name: getattr(checked, f"field_{name}") for name in values}

    def canonical(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The plain fields as JSON data, without those that have their default value."""
        checked = self.values.model_validate_json(_encode(values))
        return checked.model_dump(mode="json", by_alias=True, exclude_defaults=True)


def checked_constructor(cls: type, fields: FieldSet) -> Any:
    """``cls.__init__`` that validates its plain arguments by the fields' types and records all of them."""
    construct, signature = cls.__init__, _signature(cls)  # type: ignore[misc]

    @functools.wraps(construct)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{cls.__name__}() {error}") from None
        given = bound.arguments
        try:
            given.update(fields.validate({name: given[name] for name in fields.plain if name in given}))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InvflowError(f"{cls.__name__}: {place}: {describe(first)}") from None
        parts = {name: given[name] for name, field in fields.fields.items() if field.kind != "value" and name in given}
        for name, part in parts.items():
            field = fields.fields[name]
            if field.kind == "layers":
                continue  # the class refuses what is none, with its position
            base = LISTS[field.kind] if field.kind in LISTS else _CLASSES[field.kind]
            optional = part is None and field.default is None
            for one in part if field.kind in LISTS else () if optional else (part,):
                if not isinstance(one, base):
                    raise InvflowError(f"{cls.__name__}: {name}: expected a {base.__name__}, got {type(one).__name__}")
        # A constructor may change its arguments; the record and the defaults must not change with them.
        recorded = {name: value if name in parts else copy.deepcopy(value) for name, value in list(given.items())[1:]}
        construct(*bound.args, **bound.kwargs)
        if type(self) is cls:
            kept = frozenset(name for name, part in parts.items() if _is_kept(self, name, part))
            vars(self).update(_arguments=recorded, _kept=kept)

    init.__signature__ = signature  # type: ignore[attr-defined]  # for a subclass without its own constructor
    return init


def _signature(cls: type) -> inspect.Signature:
    """The signature of the constructor itself: a class that overrides ``__new__`` hides it."""
    owner = next(one for one in cls.__mro__ if "__init__" in vars(one))
    # Without its own constructor, a class has Module's, which accepts anything and which torch.compile replaces.
    return inspect.signature(_no_arguments if owner in (nn.Module, object) else cls.__init__)  # type: ignore[misc]


def _no_arguments(self: Any) -> None:
    """The constructor of a class that does not define one."""


def _is_kept(module: object, name: str, part: Any) -> bool:
    """Whether the module holds this part, unwrapped, under its parameter's name."""
    held = getattr(module, name, None)
    if isinstance(part, tuple) and isinstance(held, nn.ModuleList):
        return len(part) == len(held) and all(a is b for a, b in zip(part, held, strict=True))
    return held is part and isinstance(held, nn.Module)


def describe(error: ErrorDetails) -> str:
    """A pydantic error as one clause: what was expected and what was given."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("too_long", "too_short"):
        bound, limit = ("at most", "max_length") if kind == "too_long" else ("at least", "min_length")
        return f"expected {bound} {counted(context[limit], 'item')}, got {context['actual_length']}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{message[:1].lower()}{message[1:]}, got {shortened(error['input'])}"


def counted(number: int, noun: str) -> str:
    """``1 item``, ``2 items``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def cut(text: str, limit: int = 60) -> str:
    """A text of at most ``limit`` characters."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def quoted(word: object) -> str:
    """A name from a document in quotes, shortened."""
    return repr(cut(str(word)))


def shortened(value: Any, limit: int = 60) -> str:
    """A value as JSON of at most ``limit`` characters."""
    return cut(json.dumps(value, default=repr, ensure_ascii=False), limit)


def argument_descriptions(docstring: str) -> dict[str, str]:
    """The descriptions of the parameters in the ``Args:`` section of a docstring.

    Examples:
        >>> argument_descriptions('''Scales.
        ...
        ... Args:
        ...     factor: what to multiply by,
        ...         not zero.
        ...     *layers: the chain.
        ... ''')
        {'factor': 'what to multiply by, not zero.', 'layers': 'the chain.'}
    """
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", docstring, re.MULTILINE)
    if section is None:
        return {}
    items = re.findall(r"^    \*?(\w+):\s*(.*(?:\n {5,}.*)*)", section.group(1), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in items}


def _kind(annotation: Any, variadic: bool) -> Kind:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    for option in typing.get_args(annotation) if is_union else [annotation]:
        if isinstance(option, type) and issubclass(option, Part):
            return "parts"
        if isinstance(option, type) and issubclass(option, nn.Module):
            return "net" if not issubclass(option, Bijection) else "layers" if variadic else "layer"
    return "value"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise InvflowError(f"expected plain data (numbers, strings, lists), got {type(value).__name__}")


_encode = json.JSONEncoder(default=_plain).encode
