"""From a validated spec to modules: shapes flow through the layers, and each layer is built for the shape it gets."""

from __future__ import annotations

import contextlib
import copy
import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import nn

from .._torch import constants
from ..bijection import Bijection
from ..context import ContextShape, entries_of_shape, make_context, seen
from ..errors import InvflowError, ShapeError, SpecError
from ..fields import LISTS, quoted, shortened
from ..models import Classifier, ContextNet, Dequantizer, Flow, Hybrid, Prior
from ..nets.contract import takes_context
from ..numerics.modes import FLOAT
from ..part import Part
from ..registry import bijections
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
from .limits import DEFAULT_LIMITS, OBJECT, STATE_TENSOR, Limits
from .text import JsonPath

T = TypeVar("T")
Placed: TypeAlias = tuple[Node, JsonPath]

# What constructors raise if fields are valid one by one, but not together; anything else is a bug.
_REFUSALS = (ValueError, RuntimeError, OverflowError)


def build(source: SpecSource, *, limits: Limits = DEFAULT_LIMITS) -> Sequential:
    """The chain of bijections that a spec describes, without its head or prior.

    If the spec has a context_net, the chain is given what that makes of the context.

    Args:
        source: a file's path, a dict, or a Spec.
        limits: the bounds that the spec must respect; they are checked before memory is allocated.

    Raises:
        SpecError: with the place of every fault.

    Examples:
        >>> chain = build({"input": {"shape": [1, 4, 4]}, "layers": [{"type": "psi", "block_size": 2}]})
        >>> chain.output_shape((1, 4, 4))
        (4, 2, 2)
    """
    return _build(load_spec(source, limits=limits), limits).chain


def build_model(source: SpecSource, *, limits: Limits = DEFAULT_LIMITS) -> Classifier | Flow:
    """The model that a spec describes: its chain with its head, a `Classifier`, with its prior, a `Flow`, or with both.

    Raises:
        SpecError: with the place of every fault; also if the spec has neither.
    """
    spec = load_spec(source, limits=limits)
    built = _build(spec, limits)
    if built.head is None and built.prior is None:
        raise spec.error((), "a model needs a head or a prior, the spec has neither; use build to get only the chain")
    try:
        if built.prior is None:
            return Classifier(built.chain, cast(nn.Module, built.head), built.context_net)
        more = built.context_net, built.dequantizer
        if built.head is None:
            return Flow(built.chain, built.prior, *more)
        return Hybrid(built.chain, built.head, built.prior, *more)
    except InvflowError as error:
        place = ("prior",) if isinstance(error, ShapeError) else ("head",)
        raise spec.error(place, error) from error


def count(spec: Spec, limits: Limits = DEFAULT_LIMITS) -> _Builder:
    """The cost of a spec's model, counted on the meta device: faults and sizes show before memory is allocated."""
    builder = _Builder(spec, limits, count=True)
    with torch.device("meta"):
        builder.everything()
    return builder


class Built(NamedTuple):
    """What a spec describes."""

    chain: Sequential
    head: nn.Module | None
    prior: Prior | None
    context_net: ContextNet | None
    dequantizer: Dequantizer | None


def _build(spec: Spec, limits: Limits) -> Built:
    count(spec, limits)
    return _Builder(spec, limits, count=False).everything()


class _Builder:
    """Constructs the modules of one spec; with ``count``, equal layers only once."""

    def __init__(self, spec: Spec, limits: Limits, count: bool) -> None:
        self.spec = spec
        self.error = spec.error
        self.limits = limits
        self.count = count
        self.numerics = spec.top.numerics  # of the chain that is being built
        self.context = spec.context_shape  # of what is seen at the place that is being built
        self.parameters = 0
        self._tried: set[tuple[int, Shape, str]] = set()
        self.operations = 0
        self._counted: dict[tuple[int, Shape], tuple[Bijection, Shape, int, int]] = {}

    def everything(self) -> Built:
        shape = self.spec.input_shape
        self._check_state(shape, ("input", "shape"))
        self._check_context(self.context, ("input", "context_shape"))
        context_net = self._context_net() if self.spec.context_nets else None
        if context_net is not None:
            self.context = context_net.made_shape
            self._check_context(self.context, ("context_net",))
        layers: list[Bijection] = []
        for i, node in enumerate(self.spec.layers):
            layer, shape = (self._count_layer if self.count else self._layer)(node, ("layers", i), shape)
            layers.append(layer)
        top = self.spec.top
        chain = Sequential(*layers, backprop=top.backprop, monitor=top.monitor, numerics=top.numerics)
        chain.declared_shape, chain.declared_output_shape = self.spec.input_shape, shape
        chain.declared_context_shape = self.context
        above: dict[str, Any] = {"head": None, "prior": None}
        for name, document in (("head", self.spec.head), ("prior", self.spec.prior)):
            if document is not None:
                self.context = self.spec.context_shape
                with self._seeing(document, (name,)):
                    filled = {"shape": shape, "context_shape": self.context}
                    above[name] = self._construct(document, (name,), filled, {})
                if self.count:
                    self._spend_parameters(_numbers(above[name]), (name,))
        dequantizer = None if self.spec.dequantization is None else self._dequantizer(self.spec.dequantization)
        return Built(chain, **above, context_net=context_net, dequantizer=dequantizer)

    def _dequantizer(self, node: Node) -> Dequantizer:
        """The flow of the noise of pixels, which are its context."""
        shape, place = self.spec.input_shape, ("dequantization",)
        if not is_tensor_shape(shape):
            raise self.error(place, f"dequantization is for images, got a tuple state of shape {shape}")
        self.numerics, self.context = FLOAT, shape
        layer, after = (self._count_layer if self.count else self._layer)(node, place, shape)
        if after != shape or not layer.surjective:
            raise self.error(place, f"dequantization must map {shape} to {shape}, but returns {after}")
        chain = Sequential(layer)
        chain.declared_shape = chain.declared_output_shape = chain.declared_context_shape = shape
        return Dequantizer(chain)

    def _context_net(self) -> ContextNet:
        """The net from the context to what the layers see."""
        place: JsonPath = ("context_net",)
        if self.context is None:
            raise self.error(place, "a context_net expects a context: give the input a context_shape")
        if self.numerics.integer_nets:
            message = "exact numerics cannot have a context_net, whose floating-point output depends on the batch"
            raise self.error(place, message)
        made = {}
        for name, node in self.spec.context_nets.items():
            path = (*place, name) if name else place
            with self._seeing(node.net, path):
                if not isinstance(self.context, tuple):
                    came = "none" if self.context is None else ", ".join(map(repr, self.context))
                    message = f'a context_net takes one entry of the context, got {came}; name it, as "context"'
                    raise self.error(path, message)
                filled = {"in_shape": self.context, "out_shape": node.out_shape}
                self.context = None  # the net is called with what it sees, and with nothing beside
                made[name] = self._construct(node.net, path, filled, {})
                self._check_net(node.net, path, made[name], filled["in_shape"], node.out_shape)
            if self.count:
                self._spend_parameters(_numbers(made[name]), path)
        out_shapes = {name: node.out_shape for name, node in self.spec.context_nets.items()}
        return ContextNet(made, out_shapes, self.context)

    @contextlib.contextmanager
    def _seeing(self, node: Node, path: JsonPath) -> Iterator[None]:
        """Inside, the context is what a document sees of it."""
        around = self.context
        try:
            self.context = seen(around, node.sees)
        except ShapeError as error:
            raise self.error((*path, "context"), error) from error
        yield
        self.context = around

    def _count_layer(self, node: Node, path: JsonPath, shape: Shape) -> tuple[Bijection, Shape]:
        """`_layer`, counted against the limits; equal documents that meet equal shapes have equal sizes and costs."""
        key = id(node), shape
        if key in self._counted:
            self._spend(self._counted[key][3], path)
        else:
            before = self.operations
            layer, after = self._layer(node, path, shape)
            self._counted[key] = layer, after, _numbers(layer), self.operations - before
        layer, after, numbers, _ = self._counted[key]
        self._spend_parameters(numbers, path)
        return layer, after

    def _layer(self, node: Node, path: JsonPath, shape: Shape, backwards: bool = False) -> tuple[Bijection, Shape]:
        """The layer that takes a state of this shape, and the shape of its result; backwards, with its inverse."""
        holds_layers = any(isinstance(child, tuple) or child.registry is bijections for child in node.children.values())
        if not backwards or holds_layers:
            bijection = self._construct_layer(node, path, shape, backwards)
            after = self._ask(shape_after, path, bijection, shape, backwards)
        else:
            # Constructor and nets need the incoming shape, which only a layer can tell: one built for a guessed shape.
            with torch.device("meta"):
                guess = self._construct_layer(node, path, shape, backwards)
                after = self._ask(shape_after, path, guess, shape, True)
            bijection = self._construct_layer(node, path, after, backwards)
            again = self._ask(bijection.output_shape, path, after)
            if again != shape:
                raise self.error(path, f"{node.tag} has no inverse at shape {shape}: it would return {again}")
        self._check_state(after, path)
        self._check_map(node, path, bijection, *((after, shape) if backwards else (shape, after)))
        return bijection, after

    def _construct_layer(self, node: Node, path: JsonPath, shape: Shape, backwards: bool) -> Bijection:
        """The module of a layer; its inner layers and nets are built for the parts of the state that they act on."""
        around = self.numerics
        self.numerics = self._numerics(node, path)
        with self._seeing(node, path):
            children = {**self._inner_layers(node, path, shape, backwards), **self._inner_nets(node, path, shape)}
            filled = {"shape": shape, "context_shape": self.context}
            bijection = cast(Bijection, self._construct(node, path, filled, children))
        if self.numerics.on_grid:
            self._ask(bijection.set_numerics, path, self.numerics)
        self.numerics = around
        return bijection

    def _inner_layers(self, node: Node, path: JsonPath, shape: Shape, backwards: bool) -> dict[str, Any]:
        """The inner layers of a layer, by field, each built for the shape it gets."""
        fields: dict[str, list[Placed]] = {}
        for name, child in node.children.items():
            if isinstance(child, tuple):
                fields[name] = [(inner, (*path, name, i)) for i, inner in enumerate(child)]
            elif child.registry is bijections:
                fields[name] = [(child, (*path, name))]
        if issubclass(node.cls, Wired):
            every = list(itertools.chain.from_iterable(fields.values()))
            wiring = self._ask(node.cls.wiring, path, len(every), lambda: shape, node.plain())
            if {i for i, _ in wiring} != set(range(len(every))):
                raise self.error(path, f"wiring of {node.tag} must place each of its {len(every)} layers")
            against = backwards is not node.cls.runs_backwards
            layers = iter(self._along(wiring, every, path, shape, against))
        else:
            # Without wires, the layers of each field are assumed to act on the whole state in turn.
            layers = itertools.chain.from_iterable(
                self._along([(i, ()) for i in range(len(inner))], inner, path, shape, backwards)
                for inner in fields.values()
            )
        built = {name: [next(layers) for _ in inner] for name, inner in fields.items()}
        return {name: inner if isinstance(node.children[name], tuple) else inner[0] for name, inner in built.items()}

    def _along(
        self, wires: Sequence[tuple[int, Path]], placed: Sequence[Placed], path: JsonPath, shape: Shape, backwards: bool
    ) -> list[Bijection]:
        """The layers, each built for the first part of the state that reaches it."""
        built: dict[int, Bijection] = {}
        served: dict[int, dict[Shape, Shape]] = {}  # by layer: the shapes that it takes, with what it returns
        for i, part in reversed(wires) if backwards else wires:
            before = self._ask(part_of, path, shape, part)
            if i not in built:
                built[i], after = self._layer(*placed[i], before, backwards)
                served[i] = {before: after}
            elif before not in served[i]:
                served[i][before] = self._ask(shape_after, placed[i][1], built[i], before, backwards)
                self._check_shared(*placed[i], built[i], next(iter(served[i])), before, backwards)
            after = served[i][before]
            shape = with_part(shape, part, after)
        return [built[i] for i in range(len(placed))]

    def _check_shared(
        self, node: Node, path: JsonPath, layer: Bijection, first: Shape, other: Shape, backwards: bool
    ) -> None:
        """Refuses a layer that acts on parts of two shapes if its weights fit only the first."""
        if not self.count:
            return  # checked in the pass that counts
        second, _ = self._layer(node, path, other, backwards)
        sizes, wanted = (
            {name: tuple(tensor.shape) for name, tensor in one.state_dict().items()} for one in (layer, second)
        )
        name = next((name for name in {**sizes, **wanted} if sizes.get(name) != wanted.get(name)), None)
        if name is not None:
            raise self.error(
                path,
                f"{node.tag} acts on parts of shapes {first} and {other}, but its weights fit only one of them: "
                f"{name} is {sizes.get(name)} for the first and {wanted.get(name)} for the other; "
                "give each part its own layer",
            )

    def _inner_nets(self, node: Node, path: JsonPath, shape: Shape) -> dict[str, Any]:
        """The nets of a layer, by field."""
        inner = {name: child for name, child in node.children.items() if node.field_set.fields[name].kind == "net"}
        if not inner:
            return {}
        shapes = self._ask(node.cls.net_shapes, path, shape, node.plain())  # type: ignore[attr-defined]
        if not isinstance(shapes, Mapping):
            raise self.error(path, f"net_shapes of {node.tag} must return a dict, got {type(shapes).__name__}")
        known = {name for name, field in node.field_set.fields.items() if field.kind == "net"}
        for name in sorted(shapes.keys() - known):
            raise self.error(path, f"net_shapes of {node.tag} names {quoted(name)}, which is not one of its nets")
        found = {}
        for name, child in inner.items():
            mapped = shapes.get(name, (shape, shape))
            if not (isinstance(mapped, tuple) and len(mapped) == 2 and all(map(_is_shape, mapped))):
                message = f"net_shapes of {node.tag} must give {name!r} a pair of shapes, got {shortened(mapped)}"
                raise self.error(path, message)
            net, place = cast(Node, child), (*path, name)
            with self._seeing(net, place):
                filled = {"in_shape": mapped[0], "out_shape": mapped[1], "context_shape": self.context}
                found[name] = self._construct(net, place, filled, {})
                self._check_net(net, place, found[name], *mapped)
        return found

    def _check_net(self, node: Node, path: JsonPath, net: nn.Module, shape_in: Shape, shape_out: Shape) -> None:
        """Refuses a foreign net that returns another shape, because arithmetic would broadcast its result."""
        if torch.empty(0).is_meta or all(_ships(type(one)) for one in net.modules()):
            return
        given = [make_state(_middling, shape_in)]
        if self.context is not None and takes_context(net):
            given.append(make_context(_middling, self.context))
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                found = shape_of(copy.deepcopy(net).eval()(*given))
        except Exception:
            return  # the trial run of the layer says more
        if found != shape_out:
            raise self.error(path, f"{node.tag} must map {shape_in} to {shape_out}, but returns {found}")

    def _check_map(self, node: Node, path: JsonPath, layer: Bijection, shape: Shape, after: Shape) -> None:
        """Refuses a layer that changes the number of dimensions, does not run, or returns another shape."""
        numbers, made = flat_size(shape), flat_size(after)
        if made != numbers and (layer.surjective or made < numbers):
            raise self.error(
                path,
                f"{node.tag} turns {numbers} numbers into {made}, {shape} into {after}, so it is not a bijection; a "
                "layer that adds dimensions is an invflow.Injection",
            )
        trusted = isinstance(layer, Wired) or all(_ships(type(part)) for part in layer.modules())
        key = id(node), shape, str(self.context)
        if not (trusted or torch.empty(0).is_meta or key in self._tried):
            self._tried.add(key)
            self._try(node, path, layer, shape, after)

    def _try(self, node: Node, path: JsonPath, layer: Bijection, shape: Shape, after: Shape) -> None:
        """Runs a foreign layer, or a layer with a foreign net, so that a mistake shows here, not in its first use."""
        x, context = make_state(_middling, shape), make_context(_middling, seen(self.context, node.sees))
        try:
            probe = copy.deepcopy(layer).eval()  # so that the layer itself does not change
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                found = shape_of(probe(x, context))
                log_det = probe.forward_and_log_det(x, context)[1] if probe.surjective else torch.zeros(2)
        except InvflowError as error:
            raise self.error(path, error) from error
        except Exception as error:
            message = f"{node.tag} does not run on a state of shape {shape}: {type(error).__name__}: {error}"
            raise self.error(path, message) from error
        if found != after:
            message = f"{node.tag} declares that it turns {shape} into {after}, but returns {found}"
            raise self.error(path, f"{message}; override output_shape")
        if tuple(log_det.shape) != (2,):
            came = f"{tuple(log_det.shape)} for a batch of 2"
            raise self.error(path, f"{node.tag} must return log-determinants of shape (batch,), got {came}")

    def _numerics(self, node: Node, path: JsonPath) -> Any:
        """The numerics of the layers inside a layer: its own, or those of the enclosing chain."""
        own = node.values.get("numerics", FLOAT) if node.cls is Sequential else FLOAT
        if own in (FLOAT, self.numerics):
            return self.numerics
        if self.numerics.on_grid:
            outer, inner = (one.model_dump(exclude_defaults=True) for one in (self.numerics, own))
            message = f"a chain in {outer} numerics cannot hold one with {inner}: set them once, on the outermost chain"
            raise self.error((*path, "numerics"), message)
        return own

    def _construct(self, node: Node, path: JsonPath, filled: dict[str, Any], children: dict[str, Any]) -> Any:
        """The object of a document; its parts, which depend on no shape, are constructed with it."""
        field_set = node.field_set
        parts = {name: self._parts(node, path, name) for name, f in field_set.fields.items() if f.kind == "parts"}
        arguments = {**node.values, **children, **parts}
        arguments.update({name: value for name, value in filled.items() if name in field_set.signature.parameters})
        lists = [name for name, field in field_set.fields.items() if field.kind in LISTS]
        variadic = [one for name in lists for one in arguments.pop(name, ())]
        try:
            made = node.cls(*variadic, **arguments)
        except SpecError:
            raise
        except InvflowError as error:
            raise self.error((*path, *error.place), error.message) from error
        except _REFUSALS as error:
            raise self.error(path, f"{node.tag} cannot be made from these fields: {error}") from error
        except Exception as error:
            if _ships(node.cls):
                raise
            raise self.error(path, f"{node.tag} cannot be made: {type(error).__name__}: {error}") from error
        if node.sees is not ...:
            made.sees = node.sees
        if self.count:
            inside = itertools.chain.from_iterable(
                child if isinstance(child, list) else [child] for child in children.values()
            )
            objects = _objects(made) - sum(map(_objects, inside)) if isinstance(made, nn.Module) else 1
            self._spend(OBJECT * objects + getattr(made, "building_cost", 0), path)
        return made

    def _parts(self, node: Node, path: JsonPath, name: str) -> list[Part]:
        placed = enumerate(cast(tuple[Node, ...], node.children.get(name, ())))
        return [self._construct(child, (*path, name, i), {}, {}) for i, child in placed]

    def _ask(self, find: Callable[..., T], path: JsonPath, *arguments: Any) -> T:
        """Calls a method; refusals, and errors of foreign classes, get their place, but not bugs of this library."""
        try:
            return find(*arguments)
        except InvflowError as error:
            raise self.error(path, error) from error
        except Exception as error:
            modules = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
            if {str(name).partition(".")[0] for name in (find.__module__, *modules)} <= {"invflow", "torch"}:
                raise
            raise self.error(path, f"{type(error).__name__}: {error}") from error

    def _check_state(self, shape: Shape, path: JsonPath) -> None:
        if not _is_shape(shape):
            message = f"expected the shape of a state, a tuple of whole numbers or of shapes, got {shortened(shape)}"
            raise self.error(path, message)
        tensors = len(leaf_paths(shape))
        if tensors > self.limits.tensors:
            raise self.error(path, f"a state of {tensors} tensors, the limit is {self.limits.tensors}")
        if flat_size(shape) > self.limits.state:
            message = f"a state of shape {shape} holds {flat_size(shape)} numbers, the limit is {self.limits.state}"
            raise self.error(path, message)
        if self.count:
            self._spend(STATE_TENSOR * tensors, path)

    def _check_context(self, shape: ContextShape, path: JsonPath) -> None:
        for extents in entries_of_shape(shape):
            if flat_size(extents) > self.limits.state:
                message = f"a context of shape {extents} holds {flat_size(extents)} numbers"
                raise self.error(path, f"{message}, the limit is {self.limits.state}")

    def _spend(self, operations: int, path: JsonPath) -> None:
        self.operations += operations
        most = self.limits.operations
        if self.operations > most:
            message = f"building takes {self.operations} operations up to here, the limit is {most}"
            raise self.error(path, message)

    def _spend_parameters(self, numbers: int, path: JsonPath) -> None:
        self.parameters += numbers
        most = self.limits.parameters
        if self.parameters > most:
            raise self.error(path, f"{self.parameters} parameters up to here, the limit is {most}")


def _ships(cls: type) -> bool:
    """Whether a class belongs to this library or to PyTorch, which are tested."""
    return cls.__module__.partition(".")[0] in ("invflow", "torch")


def _numbers(module: nn.Module) -> int:
    """The numbers in all weights, buffers and constants."""
    return sum(tensor.numel() for tensor in module.state_dict().values())


def _objects(module: nn.Module) -> int:
    """The number of modules, weights, buffers and constants."""
    return sum(1 for _ in itertools.chain(module.modules(), module.parameters(), module.buffers(), constants(module)))


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, tuple) and (all(isinstance(size, int) for size in shape) or all(map(_is_shape, shape)))


def _middling(shape: TensorShape) -> torch.Tensor:
    """Two samples that are in every domain."""
    return torch.full((2, *shape), 0.5)
