"""From modules back to the document that builds them."""

from __future__ import annotations

import json
from typing import Any

from ..arguments import arguments_of
from ..context import named
from ..fields import LISTS
from ..models import Classifier, Flow
from ..registry import REGISTRY_OF, Registry, bijections, heads, nets, priors
from ..sequential import Sequential
from ..state import Shape
from .nodes import TopLevel
from .text import refusal
from .versions import SPEC_VERSION


def to_spec(model: Sequential | Classifier | Flow, input_shape: Shape | None = None) -> dict[str, Any]:
    """The document that builds the same chain or model; defaults are left out.

    Args:
        model: a chain, a classifier or a flow made of registered classes.
        input_shape: the shape of the input, without the batch; required if the chain was not built from a spec.

    Raises:
        SpecError: a part is not registered, or there is no input shape.

    Examples:
        >>> from invflow.bijections import Psi
        >>> to_spec(Sequential(Psi(2)), input_shape=(1, 4, 4))["layers"]
        [{'type': 'psi', 'block_size': 2}]
    """
    chain = model.bijection if isinstance(model, Classifier | Flow) else model
    if not isinstance(chain, Sequential):
        raise refusal(f"to_spec expects a Sequential or a model with one, got {type(chain).__name__}")
    shape = input_shape or chain.declared_shape
    if shape is None:
        raise refusal("this chain was not built from a spec: name its input, to_spec(chain, input_shape=(1, 28, 28))")
    model_shape = chain.declared_context_shape if isinstance(model, Sequential) else model.context_shape
    declared = {"shape": shape, "context_shape": model_shape}
    options = TopLevel.model_construct(backprop=chain.backprop, numerics=chain.numerics, monitor=chain.monitor)
    document: dict[str, Any] = {
        "spec_version": SPEC_VERSION,
        "input": json.loads(json.dumps({name: extents for name, extents in declared.items() if extents is not None})),
        "layers": [_document(layer, bijections) for layer in chain],
        **options.model_dump(mode="json", include={"backprop", "numerics", "monitor"}, exclude_defaults=True),
    }
    if isinstance(model, Classifier | Flow) and model.context_net is not None:
        made, net = model.context_net.out_shapes, model.context_net
        documents = {name: {**_document(net.of(name), nets), "out_shape": list(made[name])} for name in made}
        document["context_net"] = named(documents)
    if isinstance(model, Classifier):
        document["head"] = _document(model.head, heads)
    if isinstance(model, Flow):
        document["prior"] = _document(model.prior, priors)
        if model.dequantizer is not None:
            document["dequantization"] = _document(model.dequantizer.bijection, bijections)
    return document


def _document(module: object, registry: Registry[Any]) -> dict[str, Any]:
    tag = registry.tag_of(type(module))
    arguments = arguments_of(module)
    if tag is None or arguments is None:
        how = "register" if registry is bijections else f"register_{registry.noun}"
        raise refusal(
            f"{type(module).__name__} is not a registered {registry.noun}, so a spec cannot name it; make it a class "
            f"with annotated constructor parameters and decorate it with @invflow.{how}('acme.name')"
        )
    field_set = registry.fields(type(module))
    document = {"type": tag, **field_set.canonical({n: arguments[n] for n in field_set.plain if n in arguments})}
    sees = getattr(module, "sees", ...)
    if sees is not ...:
        document["context"] = list(sees) if isinstance(sees, tuple) else sees
    for name, field in field_set.fields.items():
        current = arguments.get(name)
        if field.kind == "value" or current is None:
            continue
        inside = REGISTRY_OF[field.kind]
        if field.kind in LISTS:
            document[name] = [_document(one, inside) for one in current]
        else:
            document[name] = _document(current, inside)
    return document
