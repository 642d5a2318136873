"""From validated documents to layers: shapes flow through them, and each is built for the shape that it gets."""

from __future__ import annotations

import contextlib
import copy
import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import nn

from .._torch import constants
from ..bijection import Bijection
from ..context import ContextShape, entries_of_shape, make_context, seen
from ..errors import InvflowError, ShapeError, SpecError
from ..fields import LISTS, quoted, shortened
from ..nets.contract import takes_context
from ..numerics.modes import FLOAT
from ..part import Part
from ..sequential import Sequential
from ..state import Path, Shape, TensorShape, flat_size, leaf_paths, make_state, part_of, shape_of, with_part
from ..wires import Wired, shape_after
from .document import Spec
from .limits import OBJECT, STATE_TENSOR, Limits
from .nodes import Node
from .text import JsonPath

T = TypeVar("T")
Placed: TypeAlias = tuple[Node, JsonPath]

# What constructors raise if fields are valid one by one, but not together; anything else is a bug.
_REFUSALS = (ValueError, RuntimeError, OverflowError)


class LayerBuilder:
    """Constructs the layers of one spec; with ``count``, equal layers only once.

    Args:
        spec: the spec.
        limits: the bounds that it must respect.
        count: whether only costs are counted, on the meta device.
    """

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
        self._counted: dict[tuple[int, Shape, str], tuple[Bijection, Shape, int, int]] = {}

    @contextlib.contextmanager
    def seeing(self, node: Node, path: JsonPath) -> Iterator[None]:
        """Inside, the context is what a document sees of it."""
        around = self.context
        try:
            self.context = seen(around, node.sees)
        except ShapeError as error:
            raise self.error((*path, "context"), error) from error
        yield
        self.context = around

    def count_layer(self, node: Node, path: JsonPath, shape: Shape) -> tuple[Bijection, Shape]:
        """`layer`, counted against the limits; equal documents that meet equal shapes have equal sizes and costs."""
        key = id(node), shape, str(self.context)
        if key in self._counted:
            self._spend(self._counted[key][3], path)
        else:
            before = self.operations
            layer, after = self.layer(node, path, shape)
            self._counted[key] = layer, after, numbers_of(layer), self.operations - before
        layer, after, numbers, _ = self._counted[key]
        self.spend_parameters(numbers, path)
        return layer, after

    def layer(self, node: Node, path: JsonPath, shape: Shape, backwards: bool = False) -> tuple[Bijection, Shape]:
        """The layer that takes a state of this shape, and the shape of its result; backwards, with its inverse."""
        fields = node.field_set.fields
        holds_layers = any(fields[name].kind in ("layer", "layers") for name in node.children)
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
        self.check_state(after, path)
        self._check_map(node, path, bijection, *((after, shape) if backwards else (shape, after)))
        return bijection, after

    def _construct_layer(self, node: Node, path: JsonPath, shape: Shape, backwards: bool) -> Bijection:
        """The module of a layer; its inner layers and nets are built for the parts of the state that they act on."""
        around = self.numerics
        self.numerics = self._numerics(node, path)
        with self.seeing(node, path):
            children = {**self._inner_layers(node, path, shape, backwards), **self._inner_nets(node, path, shape)}
            filled = {"shape": shape, "context_shape": self.context}
            bijection = cast(Bijection, self.construct(node, path, filled, children))
        if self.numerics.on_grid:
            self._ask(bijection.set_numerics, path, self.numerics)
        self.numerics = around
        return bijection

    def _inner_layers(self, node: Node, path: JsonPath, shape: Shape, backwards: bool) -> dict[str, Any]:
        """The inner layers of a layer, by field, each built for the shape it gets."""
        fields: dict[str, list[Placed]] = {}
        for name, child in node.children.items():
            kind = node.field_set.fields[name].kind
            if kind == "layers" and isinstance(child, tuple):
                fields[name] = [(inner, (*path, name, i)) for i, inner in enumerate(child)]
            elif kind == "layer" and isinstance(child, Node):
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
                built[i], after = self.layer(*placed[i], before, backwards)
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
        second, _ = self.layer(node, path, other, backwards)
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
            with self.seeing(net, place):
                filled = {"in_shape": mapped[0], "out_shape": mapped[1], "context_shape": self.context}
                found[name] = self.construct(net, place, filled, {})
                self.check_net(net, place, found[name], *mapped)
        return found

    def check_net(self, node: Node, path: JsonPath, net: nn.Module, shape_in: Shape, shape_out: Shape) -> None:
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
        if layer.invertible and made != numbers and (layer.surjective or made < numbers):
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

    def construct(self, node: Node, path: JsonPath, filled: dict[str, Any], children: dict[str, Any]) -> Any:
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
            if (
                type(made) is not node.cls
            ):  # the inverse of an inverse is the layer inside, which may see something else
                message = f"the inverse of an inverse is the layer inside: give that its context, not {node.tag}"
                raise self.error((*path, "context"), message)
            cast(Any, made).sees = node.sees
        if self.count:
            inside = itertools.chain.from_iterable(
                child if isinstance(child, list) else [child] for child in children.values()
            )
            objects = _objects(made) - sum(map(_objects, inside)) if isinstance(made, nn.Module) else 1
            self._spend(OBJECT * objects + getattr(made, "building_cost", 0), path)
        return made

    def _parts(self, node: Node, path: JsonPath, name: str) -> list[Part]:
        placed = enumerate(cast(tuple[Node, ...], node.children.get(name, ())))
        return [self.construct(child, (*path, name, i), {}, {}) for i, child in placed]

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

    def check_state(self, shape: Shape, path: JsonPath) -> None:
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

    def check_context(self, shape: ContextShape, path: JsonPath) -> None:
        numbers = sum(map(flat_size, entries_of_shape(shape)))
        if numbers > self.limits.state:
            raise self.error(path, f"a context of {numbers} numbers, the limit is {self.limits.state}")

    def _spend(self, operations: int, path: JsonPath) -> None:
        self.operations += operations
        most = self.limits.operations
        if self.operations > most:
            message = f"building takes {self.operations} operations up to here, the limit is {most}"
            raise self.error(path, message)

    def spend_parameters(self, numbers: int, path: JsonPath) -> None:
        self.parameters += numbers
        most = self.limits.parameters
        if self.parameters > most:
            raise self.error(path, f"{self.parameters} parameters up to here, the limit is {most}")


def _ships(cls: type) -> bool:
    """Whether a class belongs to this library or to PyTorch, which are tested."""
    return cls.__module__.partition(".")[0] in ("invflow", "torch")


def numbers_of(module: nn.Module) -> int:
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
