"""From a checked spec to modules: shapes flow through the layers, and each is constructed for what reaches it."""

from __future__ import annotations

import copy
import itertools
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..bijection import Bijection
from ..errors import InvflowError, NumericsError, ShapeError, SpecError
from ..fields import quoted, shortened
from ..models import Classifier, Flow, Prior
from ..nets.contract import takes_context
from ..numerics.modes import FLOAT
from ..registry import bijections, nets
from ..sequential import Sequential
from ..state import (
    Path,
    Shape,
    TensorShape,
    flat_size,
    is_tensor_shape,
    leaf_paths,
    make_state,
    part_of,
    shape_of,
    with_part,
)
from ..wires import Wired, shape_after
from .document import Node, Spec, SpecSource, load_spec
from .limits import DEFAULT_LIMITS, Limits
from .text import JsonPath

T = TypeVar("T")

# What constructors raise for values that pass each on its own but do not fit together; anything else is a bug.
_REFUSALS = (ValueError, RuntimeError, OverflowError)


def build(source: SpecSource, *, limits: Limits = DEFAULT_LIMITS) -> Sequential:
    """The chain of bijections that a spec describes; its head or prior, if it has one, is left out.

    Args:
        source: a file's path, a dict, or a Spec.
        limits: what the spec is refused for, before memory is taken.

    Raises:
        SpecError: with the place of every fault.

    Examples:
        >>> chain = build({"input": {"shape": [1, 4, 4]}, "layers": [{"type": "psi", "block_size": 2}]})
        >>> chain.output_shape((1, 4, 4))
        (4, 2, 2)
    """
    spec = load_spec(source, limits=limits)
    return _build(spec, limits)[0]


def build_model(source: SpecSource, *, limits: Limits = DEFAULT_LIMITS) -> Classifier | Flow:
    """The model that a spec describes: its chain with its head, a `Classifier`, or with its prior, a `Flow`.

    Raises:
        SpecError: with the place of every fault; also where the spec has neither.
    """
    spec = load_spec(source, limits=limits)
    chain, above = _build(spec, limits)
    if above is None:
        raise spec.error((), "a model needs a head or a prior, got a spec without; use build for the chain alone")
    if spec.prior is None:
        return Classifier(chain, above)
    try:
        return Flow(chain, cast(Prior, above))
    except ShapeError as error:
        raise spec.error(("prior",), error) from error


def _build(spec: Spec, limits: Limits) -> tuple[Sequential, nn.Module | None]:
    # First on the meta device: whatever is wrong or too large shows before memory is taken.
    with torch.device("meta"):
        _Builder(spec, limits, count=True).everything()
    return _Builder(spec, limits, count=False).everything()


class _Builder:
    """Constructs the modules of one spec; with ``count`` it also keeps account of their size."""

    def __init__(self, spec: Spec, limits: Limits, count: bool) -> None:
        self.spec = spec
        self.limits = limits
        self.count = count
        self.numerics = spec.top.numerics  # of the chain that is being built
        self.parameters = 0
        self._tried: set[tuple[int, Shape]] = set()
        self._counted: dict[tuple[int, Shape], tuple[Bijection, Shape, int]] = {}

    def everything(self) -> tuple[Sequential, nn.Module | None]:
        shape = self.spec.input_shape
        self._check_state(shape, ("input", "shape"))
        layers: list[Bijection] = []
        for i, node in enumerate(self.spec.layers):
            layer, shape = self._top_layer(node, ("layers", i), shape)
            layers.append(layer)
        top = self.spec.top
        chain = Sequential(*layers, backprop=top.backprop, monitor=top.monitor, numerics=top.numerics)
        chain.declared_shape = self.spec.input_shape
        chain.declared_context_shape = self.spec.context_shape
        for name, document in (("head", self.spec.head), ("prior", self.spec.prior)):
            if document is not None:
                above = self._construct(document, (name,), {"shape": shape}, {})
                self._add_parameters(_size(above), (name,))
                return chain, above
        return chain, None

    def _top_layer(self, node: Node, path: JsonPath, shape: Shape) -> tuple[Bijection, Shape]:
        if not self.count:
            return self._layer(node, path, shape)
        # Equal documents that meet equal shapes are the same module as far as counting goes.
        key = (id(node), shape)
        if key not in self._counted:
            layer, after = self._layer(node, path, shape)
            self._counted[key] = (layer, after, _size(layer))
        layer, after, size = self._counted[key]
        self._add_parameters(size, path)
        return layer, after

    def _layer(self, node: Node, path: JsonPath, shape: Shape, backwards: bool = False) -> tuple[Bijection, Shape]:
        """The layer that takes a state of this shape, and the shape of what it returns; backwards the other way."""
        holds_layers = any(isinstance(child, tuple) or child.registry is bijections for child in node.children.values())
        if not backwards or holds_layers:
            bijection = self._construct_layer(node, path, shape, backwards)
            after = self._shape(shape_after, path, bijection, shape, backwards)
        else:
            # Constructor and nets want the incoming shape, which only a layer can tell: one that is built for a guess.
            with torch.device("meta"):
                guess = self._construct_layer(node, path, shape, backwards)
                after = self._shape(shape_after, path, guess, shape, True)
            bijection = self._construct_layer(node, path, after, backwards)
            again = self._shape(bijection.output_shape, path, after)
            if again != shape:
                raise self.spec.error(path, f"{node.tag} has no inverse at shape {shape}: it would return {again}")
        self._check_state(after, path)
        self._check_map(node, path, bijection, *((after, shape) if backwards else (shape, after)))
        return bijection, after

    def _construct_layer(self, node: Node, path: JsonPath, shape: Shape, backwards: bool) -> Bijection:
        """The module of a layer, what it holds built for the parts of a state of this shape that it acts on."""
        around = self.numerics
        self.numerics = self._numerics(node, path)
        children = {**self._inner_layers(node, path, shape, backwards), **self._inner_nets(node, path, shape)}
        filled = {"shape": shape, "context_shape": self.spec.context_shape}
        bijection = cast(Bijection, self._construct(node, path, filled, children))
        if self.numerics.on_grid:
            try:
                bijection.set_numerics(self.numerics)
            except NumericsError as error:
                raise self.spec.error(path, error) from error
        self.numerics = around
        return bijection

    def _inner_layers(self, node: Node, path: JsonPath, shape: Shape, backwards: bool) -> dict[str, Any]:
        """The layers that a layer holds, by field, each built for what reaches it."""
        fields: dict[str, list[tuple[Node, JsonPath]]] = {}
        for name, child in node.children.items():
            if isinstance(child, tuple):
                fields[name] = [(inner, (*path, name, i)) for i, inner in enumerate(child)]
            elif child.registry is bijections:
                fields[name] = [(child, (*path, name))]
        if issubclass(node.cls, Wired):
            every = list(itertools.chain.from_iterable(fields.values()))
            wiring = self._shape(node.cls.wiring, path, len(every), lambda: shape, _fields(node))
            if {i for i, _ in wiring} != set(range(len(every))):
                raise self.spec.error(path, f"wiring of {node.tag} has to place each of its {len(every)} layers")
            against = backwards is not node.cls.runs_backwards
            layers = iter(self._along(wiring, every, path, shape, against))
        else:
            # It says nothing of wires: those of each field are taken to act on the whole state in turn.
            layers = itertools.chain.from_iterable(
                self._along([(i, ()) for i in range(len(inner))], inner, path, shape, backwards)
                for inner in fields.values()
            )
        built = {name: [next(layers) for _ in inner] for name, inner in fields.items()}
        return {name: inner if isinstance(node.children[name], tuple) else inner[0] for name, inner in built.items()}

    def _along(
        self,
        wiring: Sequence[tuple[int, Path]],
        documents: Sequence[tuple[Node, JsonPath]],
        path: JsonPath,
        shape: Shape,
        backwards: bool,
    ) -> list[Bijection]:
        """Layers, each built for the part of the state that reaches it first."""
        built: dict[int, Bijection] = {}
        served: dict[int, dict[Shape, Shape]] = {}  # by layer: the shapes that it takes, with what it returns
        for i, part in reversed(wiring) if backwards else wiring:
            before = self._shape(part_of, path, shape, part)
            if i not in built:
                built[i], after = self._layer(*documents[i], before, backwards)
                served[i] = {before: after}
            elif before not in served[i]:
                served[i][before] = self._shape(shape_after, documents[i][1], built[i], before, backwards)
                self._check_shared(*documents[i], built[i], next(iter(served[i])), before, backwards)
            after = served[i][before]
            shape = with_part(shape, part, after)
        return [built[i] for i in range(len(documents))]

    def _check_shared(
        self, node: Node, path: JsonPath, layer: Bijection, first: Shape, other: Shape, backwards: bool
    ) -> None:
        """Refuses a layer whose weights, made for the first shape, do not fit the other that reaches it as well."""
        if not self.count:
            return  # the pass that counts has asked
        second, _ = self._layer(node, path, other, backwards)
        sizes, wanted = (
            {name: tuple(tensor.shape) for name, tensor in itertools.chain(one.named_parameters(), one.named_buffers())}
            for one in (layer, second)
        )
        if sizes != wanted:
            name = next(name for name in {**sizes, **wanted} if sizes.get(name) != wanted.get(name))
            raise self.spec.error(
                path,
                f"{node.tag} acts on parts of shapes {first} and {other}, and its weights fit one of them only: "
                f"{name} is {sizes.get(name)} for the first and {wanted.get(name)} for the other; "
                "give each part a layer of its own",
            )

    def _inner_nets(self, node: Node, path: JsonPath, shape: Shape) -> dict[str, Any]:
        """The nets that a layer holds, by field."""
        nodes = {name: child for name, child in node.children.items() if isinstance(child, Node)}
        nodes = {name: child for name, child in nodes.items() if child.registry is nets}
        if not nodes:
            return {}
        shapes = self._shape(node.cls.net_shapes, path, shape, _fields(node))  # type: ignore[attr-defined]
        if not isinstance(shapes, Mapping):
            raise self.spec.error(path, f"net_shapes of {node.tag} has to return a dict, got {type(shapes).__name__}")
        known = {name for name, field in bijections.fields(node.cls).fields.items() if field.kind == "net"}
        for name in sorted(shapes.keys() - known):
            raise self.spec.error(path, f"net_shapes of {node.tag} names {quoted(name)}, which is none of its nets")
        found = {}
        for name, child in nodes.items():
            mapped = shapes.get(name, (shape, shape))
            if not (isinstance(mapped, tuple) and len(mapped) == 2 and all(map(_is_shape, mapped))):
                message = f"net_shapes of {node.tag} has to give {name!r} a pair of shapes, got {shortened(mapped)}"
                raise self.spec.error(path, message)
            shape_in, shape_out = mapped
            filled = {"in_shape": shape_in, "out_shape": shape_out, "context_shape": self.spec.context_shape}
            found[name] = self._construct(child, (*path, name), filled, {})
            self._check_net(child, (*path, name), found[name], shape_in, shape_out)
        return found

    def _check_net(self, node: Node, path: JsonPath, net: nn.Module, shape_in: Shape, shape_out: Shape) -> None:
        """Refuses somebody else's net that returns another shape: arithmetic would broadcast what it returns."""
        if self.count or torch.empty(0).is_meta or _ships(type(net)) or not is_tensor_shape(shape_in):
            return
        context_shape = self.spec.context_shape if takes_context(net) else None
        given = [_middling(shape_in), *([] if context_shape is None else [_middling(context_shape)])]
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                found = shape_of(copy.deepcopy(net).eval()(*given))
        except Exception:
            return  # the layer will be tried, and says more
        if found != shape_out:
            raise self.spec.error(path, f"{node.tag} has to map {shape_in} to {shape_out}, and returns {found}")

    def _check_map(self, node: Node, path: JsonPath, layer: Bijection, shape: Shape, after: Shape) -> None:
        """Refuses a layer that does not do what it says: keep the number of numbers, run, and return that shape."""
        numbers, made = flat_size(shape), flat_size(after)
        if made != numbers and (layer.surjective or made < numbers):
            raise self.spec.error(
                path,
                f"{node.tag} turns {numbers} numbers into {made}, {shape} into {after}: that is no bijection; a layer "
                "that adds dimensions is an invflow.Injection",
            )
        trusted = isinstance(layer, Wired) or all(_ships(type(part)) for part in layer.modules())
        if not (self.count or trusted or torch.empty(0).is_meta or (id(node), shape) in self._tried):
            self._tried.add((id(node), shape))
            self._try(node, path, layer, shape, after)

    def _try(self, node: Node, path: JsonPath, layer: Bijection, shape: Shape, after: Shape) -> None:
        """Runs a layer, or one with a net, that somebody else wrote: a mistake shows here, and not in its first use."""
        x, context_shape = make_state(_middling, shape), self.spec.context_shape
        context = None if context_shape is None else _middling(context_shape)
        try:
            probe = copy.deepcopy(layer).eval()  # so that nothing of what is built moves
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                found = shape_of(probe(x, context))
                log_det = probe.forward_and_log_det(x, context)[1] if probe.surjective else torch.zeros(2)
        except InvflowError as error:
            raise self.spec.error(path, error) from error
        except Exception as error:
            message = f"{node.tag} does not run on a state of shape {shape}: {type(error).__name__}: {error}"
            raise self.spec.error(path, message) from error
        if found != after:
            message = f"{node.tag} says that it turns {shape} into {after}, and returns {found}; override output_shape"
            raise self.spec.error(path, message)
        if tuple(log_det.shape) != (2,):
            came = f"{tuple(log_det.shape)} for a batch of 2"
            raise self.spec.error(path, f"{node.tag} has to return log-determinants of shape (batch,), got {came}")

    def _numerics(self, node: Node, path: JsonPath) -> Any:
        """The numerics of the layers inside a layer: its own, or those of the chain around it."""
        own = node.values.get("numerics", FLOAT) if node.cls is Sequential else FLOAT
        if own in (FLOAT, self.numerics):
            return self.numerics
        if self.numerics.on_grid:
            outer, inner = (one.model_dump(exclude_defaults=True) for one in (self.numerics, own))
            message = f"a chain in {outer} numerics holds none with {inner}: name numerics once, at the chain outside"
            raise self.spec.error((*path, "numerics"), message)
        return own

    def _construct(self, node: Node, path: JsonPath, filled: dict[str, Any], children: dict[str, Any]) -> nn.Module:
        field_set = node.registry.fields(node.cls)
        arguments = {**node.values, **children}
        arguments.update({name: value for name, value in filled.items() if name in field_set.signature.parameters})
        variadic = [
            layer
            for name, field in field_set.fields.items()
            if field.kind == "layers"
            for layer in arguments.pop(name, ())
        ]
        try:
            return node.cls(*variadic, **arguments)
        except SpecError:
            raise
        except InvflowError as error:
            raise self.spec.error(path, error) from error
        except _REFUSALS as error:
            raise self.spec.error(path, f"{node.tag} cannot be made of these fields: {error}") from error
        except Exception as error:
            if _ships(node.cls):
                raise
            raise self.spec.error(path, f"{node.tag} cannot be made: {type(error).__name__}: {error}") from error

    def _shape(self, find: Callable[..., T], path: JsonPath, *arguments: Any) -> T:
        try:
            return find(*arguments)
        except ShapeError as error:
            raise self.spec.error(path, error) from error
        except Exception as error:
            raise self._foreign(error, path, find) from error

    def _foreign(self, error: Exception, path: JsonPath, find: Callable[..., Any]) -> Exception:
        """What somebody else's class raised, at its place; a bug of this library's stays what it is."""
        frames = traceback.walk_tb(error.__traceback__)
        names = [find.__module__, *(str(frame.f_globals.get("__name__")) for frame, _ in frames)]
        modules = {name.partition(".")[0] for name in names}
        return error if modules <= {"invflow", "torch"} else self.spec.error(path, f"{type(error).__name__}: {error}")

    def _check_state(self, shape: Shape, path: JsonPath) -> None:
        if not _is_shape(shape):
            message = f"expected the shape of a state, a tuple of whole numbers or of shapes, got {shortened(shape)}"
            raise self.spec.error(path, message)
        tensors = len(leaf_paths(shape))
        if tensors > self.limits.tensors:
            raise self.spec.error(path, f"a state of {tensors} tensors, the limit is {self.limits.tensors}")
        if flat_size(shape) > self.limits.state:
            message = f"a state of shape {shape} holds {flat_size(shape)} numbers, the limit is {self.limits.state}"
            raise self.spec.error(path, message)

    def _add_parameters(self, size: int, path: JsonPath) -> None:
        self.parameters += size
        if self.parameters > self.limits.parameters:
            raise self.spec.error(
                path, f"{self.parameters} parameters up to here, the limit is {self.limits.parameters}"
            )


def _fields(node: Node) -> dict[str, Any]:
    """The plain fields of a document, defaults included."""
    fields = node.registry.fields(node.cls)
    return {name: node.values.get(name, fields.fields[name].default) for name in fields.plain}


def _size(module: nn.Module) -> int:
    """How many numbers the weights and buffers of a module hold."""
    return sum(tensor.numel() for tensor in module.state_dict().values())


def _ships(cls: type) -> bool:
    """Whether a class comes with this library or with PyTorch: these are tested."""
    return cls.__module__.partition(".")[0] in ("invflow", "torch")


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, tuple) and (
        all(isinstance(size, int) for size in shape) or all(_is_shape(part) for part in shape)
    )


def _middling(shape: TensorShape) -> torch.Tensor:
    """Two samples that lie in every domain."""
    return torch.full((2, *shape), 0.5)
