"""From modules back to the document that builds them again."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..arguments import arguments_of
from ..bijection import Bijection
from ..errors import SpecError
from ..models import Classifier, Flow
from ..numerics.modes import FLOAT
from ..registry import Registry, bijections, heads, nets, priors
from ..sequential import Sequential
from ..state import Shape, is_tensor_shape
from .versions import SPEC_VERSION


def to_spec(model: Sequential | Classifier | Flow, input_shape: Shape | None = None) -> dict[str, Any]:
    """The document that builds the same chain, or the same model, again; defaults are left out.

    Args:
        model: a chain, a classifier or a flow made of registered classes.
        input_shape: the shape of the input, without the batch; needed where the chain was not built from a spec.

    Raises:
        SpecError: a part that is not registered, or no input shape.

    Examples:
        >>> from invflow.bijections import Psi
        >>> to_spec(Sequential(Psi(2)), input_shape=(1, 4, 4))["layers"]
        [{'type': 'psi', 'block_size': 2}]
    """
    chain = model.bijection if isinstance(model, Classifier | Flow) else model
    if not isinstance(chain, Sequential):
        raise _refusal(f"to_spec expects a Sequential or a model with one, got {type(chain).__name__}")
    shape = input_shape or chain.declared_shape
    if shape is None:
        raise _refusal("this chain was not built from a spec: name its input, to_spec(chain, input_shape=(1, 28, 28))")
    declared: dict[str, Any] = {"shape": _as_lists(shape)}
    if chain.declared_context_shape is not None:
        declared["context_shape"] = list(chain.declared_context_shape)
    document: dict[str, Any] = {
        "spec_version": SPEC_VERSION,
        "input": declared,
        "layers": [_document(layer, bijections) for layer in chain],
    }
    if chain.backprop != "stored":
        document["backprop"] = chain.backprop
    if chain.numerics != FLOAT:
        document["numerics"] = chain.numerics.model_dump(mode="json", exclude_defaults=True)
    if chain.monitor != "warn":
        document["monitor"] = chain.monitor
    if isinstance(model, Classifier):
        document["head"] = _document(model.head, heads)
    if isinstance(model, Flow):
        document["prior"] = _document(model.prior, priors)
    return document


def _document(module: nn.Module, registry: Registry[Any]) -> dict[str, Any]:
    tag = registry.tag_of(type(module))
    arguments = arguments_of(module)
    if tag is None or arguments is None:
        how = "register" if registry is bijections else f"register_{registry.noun}"
        raise _refusal(
            f"{type(module).__name__} is no registered {registry.noun}, so a spec cannot name it; make it a class "
            f"with annotated constructor parameters and decorate that with @invflow.{how}('acme.name')"
        )
    field_set = registry.fields(type(module))
    document = {"type": tag, **field_set.canonical({n: arguments[n] for n in field_set.plain if n in arguments})}
    for name, field in field_set.fields.items():
        if field.kind == "value" or name not in arguments:
            continue
        current = arguments[name]
        if field.kind == "layers":
            document[name] = [_document(layer, bijections) for layer in current]
        elif current is not None:
            document[name] = _document(current, bijections if isinstance(current, Bijection) else nets)
    return document


def _as_lists(shape: Shape) -> list[Any]:
    return list(shape) if is_tensor_shape(shape) else [_as_lists(part) for part in shape]  # type: ignore[arg-type]


def _refusal(message: str) -> SpecError:
    return SpecError([{"path": "", "line": None, "column": None, "message": message}])
