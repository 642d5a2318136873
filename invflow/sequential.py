"""Chains of bijections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ._torch import Converted
from .arguments import arguments_of
from .bijection import Bijection
from .bijections.inverse import Inverse
from .context import Context, ContextShape, require_context, spread
from .errors import NumericsError, ShapeError
from .numerics.modes import FLOAT, NONE, Level, Limit, Mode, Numerics, least
from .registry import register
from .reversible import Backprop, Monitor, Reconstruction, run_chain
from .state import (
    Path,
    Shape,
    State,
    batch_size,
    common_dtype,
    fitting_batch,
    leaves,
    part_of,
    require_state,
    shape_of,
    with_part,
)
from .steps import Step, steps_inside
from .wires import Ask, Several, call, total

_COUPLINGS = [
    {"type": "split"},
    {"type": "additive_coupling", "net": {"type": "mlp"}},
    {"type": "additive_coupling", "net": {"type": "mlp", "hidden": [3]}},
    {"type": "merge"},
]

_CONTEXT = "the context of the chain"


@register("sequential")
class Sequential(Converted, Several):
    """A chain in data order: ``Sequential(a, b, c)(x) == c(b(a(x)))``; its log-determinant is the sum of theirs.

    Use it for a part of a network that is trained, or rounded, in a way of its own.

    Chains nest and behave as sequences: ``len``, iteration, ``chain[2]``, ``chain[1:3]`` (a chain that shares its
    layers with this one), ``chain[::-1]`` (the inverse chain).

    Args:
        *layers: the bijections, first applied first; no layers make the identity.
        backprop: what training keeps of the intermediate states: "stored" keeps all of them, "reversible" none that a
            cheap inverse can recompute, "checkpoint" the inputs of the layers.
        monitor: what "reversible" does if a layer's input comes back different from numbers kept of it: "repair" the
            gradients before they leave backward and keep that input from then on, "warn", "raise" an error, or "anchor"
            (warn, and keep that input from then on); "off" keeps and compares nothing.
        numerics: how exact the inverse must be: ``{"mode": "float"}``, or "snap", "grid", "exact" with their options.
            Every layer must be able to reach it. In "exact", conditioners become integer networks.

    Attributes:
        reconstruction: the errors that the monitor measured in backward, by layer, and the anchors.
        declared_shape: the input shape of the spec that the chain was built from, or None.
        declared_output_shape: likewise, the shape of the output.
        declared_context_shape: likewise, the shape of the context.
        own_numerics: the numerics it was constructed with; ``numerics`` may be those of a surrounding chain.

    Examples:
        >>> from invflow.bijections import Psi, Split
        >>> chain = Sequential(Psi(2), Split())
        >>> chain.output_shape((1, 4, 4))
        ((2, 2, 2), (2, 2, 2))
        >>> chain[::-1].output_shape(((2, 2, 2), (2, 2, 2)))
        (1, 4, 4)
    """

    examples = [({"layers": []}, (2, 3)), ({"layers": _COUPLINGS}, (5,))]
    declared_shape: Shape | None = None
    declared_output_shape: Shape | None = None
    declared_context_shape: ContextShape = None
    _dtype: torch.dtype | None = None

    def __init__(
        self,
        *layers: Bijection,
        backprop: Backprop = "stored",
        monitor: Monitor = "repair",
        numerics: Numerics = FLOAT,
    ) -> None:
        super().__init__(*layers)
        self.backprop = backprop
        self.own_numerics = numerics
        if numerics.on_grid:
            self.set_numerics(numerics)
        elif numerics != FLOAT and not self.invertible:
            raise NumericsError(
                f"{numerics.mode} rounds what the inverse returns, and the chain has none: it has a joint"
            )
        self.numerics = numerics
        self.monitor = monitor
        self.reconstruction = Reconstruction()
        self.converted()

    @classmethod
    def wiring(cls, count: int, shape: Ask, fields: Mapping[str, Any]) -> Sequence[tuple[int, Path]]:
        """Every layer on all of the state."""
        return [(position, ()) for position in range(count)]

    @property
    def taken_apart(self) -> bool:
        return self._is_bare and self.own_numerics == FLOAT

    @property
    def inverts(self) -> bool:
        return self.backprop != "checkpoint"

    @property
    def limit(self) -> Limit:
        own = self.numerics.limit
        return own if own != NONE else super().limit

    @property
    def exactness(self) -> Level:
        return least([self.numerics.limit.level, super().exactness])

    def set_numerics(self, numerics: Mode) -> None:
        """Sets the numerics of every layer.

        Raises:
            NumericsError: a layer cannot reach their level, or this chain has different numerics of its own.
        """
        if self.own_numerics not in (FLOAT, numerics):
            raise NumericsError(
                f"sequential has numerics of its own, {self.own_numerics.model_dump()}, in a chain with "
                f"{numerics.model_dump()}; set them once, on the outermost chain"
            )
        super().set_numerics(numerics)

    @property
    def cheap_inverse(self) -> bool:
        return not self.numerics.rounds and super().cheap_inverse

    def converted(self) -> None:
        """Keeps the dtype of the weights, because to find it takes longer than a small layer."""
        self._dtype = common_dtype(self)

    def admit(self, state: Any, context: Context = None, *, backwards: bool = False) -> Any:
        """Refuses what the chain was not built for; every call begins with this.

        Args:
            state: the input, or, ``backwards``, that of the inverse.
            context: the context, if there is one.
            backwards: see above.

        Returns:
            The context, of as many rows as the state; a single row is repeated.

        Raises:
            ShapeError: another shape than the spec's, another dtype than that of the weights, something else than
                tensors with a batch, or a context that is missing, not wanted, or of another batch or shape.
        """
        shape = self.declared_output_shape if backwards else self.declared_shape
        if fitting_batch(state, shape, self._dtype) is None:
            # The dtype is found again, because weights may have been replaced.
            require_state("the inverse of the chain" if backwards else "the chain", shape, common_dtype(self), state)
        if context is None and self.declared_context_shape is None:
            return None
        rows, batch = self.require_context(context), batch_size(state)
        if rows not in (1, batch):
            raise ShapeError(f"{_CONTEXT}: expected one row, or one for each of {batch} samples, got {rows} rows")
        return spread(context, batch)

    def require_context(self, context: Context) -> int:
        """The number of rows of a context, which must be one that the chain was built for.

        Raises:
            ShapeError: a context that is missing, not wanted, or of other names, shapes or dtypes.
        """
        wanted, declared = self.declared_context_shape, self.declared_shape is not None
        if context is None:
            if wanted is not None:
                raise ShapeError(f"the chain expects a context of shape {wanted}, got none; pass it after the state")
            return 0
        if declared and wanted is None:
            raise ShapeError("the chain expects no context, got one; give the spec's input a context_shape, or omit it")
        alike = all(getattr(entry, "dtype", None) == self._dtype for entry in leaves(context))
        return require_context(_CONTEXT, wanted, common_dtype(self) if declared and not alike else None, context)

    def initialize(self, x: Any, context: Context = None) -> None:
        super().initialize(x, self.admit(x, context))

    def _run(self, given: State, context: Context, *, log_det: bool, backwards: bool) -> tuple[Any, Any]:
        context = self.admit(given, context, backwards=backwards)
        state = self.numerics.enter(given)
        if self.backprop != "stored" and torch.is_grad_enabled():
            steps = self._steps(shape_of(state), backwards)
            record = self.reconstruction
            state, log_det_of_all = run_chain(
                steps, state, context, log_det=log_det, monitor=self.monitor, record=record
            )
        else:
            # The loop of `Wired` without its wires, because every layer acts on the whole state.
            changes: list[Tensor] = []
            layers: Any = [*self.layers][::-1] if backwards else self.layers
            try:
                for layer in layers:
                    asked = log_det and not layer.volume_preserving
                    state, change = call(layer, state, context, asked, backwards)
                    if change is not None:
                        changes.append(change)
            except (NumericsError, ShapeError) as error:
                self._blame(layer, error)
            log_det_of_all = total(changes, state) if log_det else None
        return self.numerics.leave(state) if backwards else state, log_det_of_all

    def steps(self, shape: Shape | None = None, *, backwards: bool = False) -> list[Step]:
        """The steps that the chain consists of, each with what constant-memory training does with its input.

        Args:
            shape: of the input; of the input of `inverse` if ``backwards``. The default is the shape that the chain was
                built for; a chain of plain layers and chains needs none.
            backwards: whether to return the steps of the inverse.
        """
        if not self._is_its_wires:  # a subclass that may do more than its layers do
            return [Step("", self, (), backwards, self.cheap_inverse)]
        return self._steps(shape, backwards)

    def _steps(self, shape: Shape | None, backwards: bool) -> list[Step]:
        invertible = self.backprop == "reversible"
        if backwards and self.declared_shape is not None:
            # Derived from the forward steps, whose shapes every layer had to know when the chain was built.
            forwards = steps_inside(self, self.declared_shape, backwards=False, invertible=invertible)
            found = [step.turned(invertible and step.reversible) for step in reversed(forwards)]
        else:
            told = self.declared_shape if shape is None else shape
            found = steps_inside(self, told, backwards=backwards, invertible=invertible)
        for step in found if self.reconstruction.anchors else ():
            step.reversible = step.reversible and step.name not in self.reconstruction.anchors
        return found

    def states_after(
        self, x: State, context: Context, chosen: Callable[[Bijection], bool]
    ) -> Iterator[tuple[Step | None, Any]]:
        """The state after each of the `steps` whose layer is chosen, with that step, and the last state, with None.

        Training keeps of the states in between what ``backprop`` says.
        """
        context = self.admit(x, context)
        state, group = self.numerics.enter(x), list[Step]()
        for step in (*self.steps(shape_of(x)), None):
            if step is not None:
                group.append(step)
            if step is not None and not chosen(step.layer):
                continue
            if group and self.backprop != "stored" and torch.is_grad_enabled():
                state, _ = run_chain(
                    group, state, context, log_det=False, monitor=self.monitor, record=self.reconstruction
                )
            else:
                for one in group:
                    state = one.after(state, context)
            group = []
            yield step, state

    def trace(self, x: State, context: Context = None) -> list[State]:
        """Every intermediate state: the input, then the state after each of the `steps`."""
        context = self.admit(x, context)
        states = [self.numerics.enter(x)]
        for step in self.steps(shape_of(x)):
            states.append(step.after(states[-1], context))
        return states

    def shapes(self, shape: Shape) -> list[Shape]:
        """The shape of every state of `trace` for an input of this shape."""
        found = [shape]
        for step in self.steps(shape):
            found.append(step.shape_after(found[-1]))
        return found

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Bijection]:
        return iter(self.layers)  # type: ignore[arg-type]

    @overload
    def __getitem__(self, index: int) -> Bijection: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
    def __getitem__(self, index: int | slice) -> Bijection:
        layers = list(self)
        if not isinstance(index, slice):
            return layers[index]
        if index.step not in (None, 1, -1):
            raise ShapeError(f"a slice of a Sequential expects step 1 or -1 (the inverse chain), got {index.step}")
        forwards = sorted(range(len(layers))[index])
        # Data are on their grid only at the beginning of the chain.
        snaps = self.numerics.about_data and forwards[:1] == [0]
        numerics: Any = FLOAT if self.numerics.about_data and not snaps else self.numerics
        if index.step == -1 and not snaps:
            backwards = (Inverse(layers[i]) for i in reversed(forwards))
            return Sequential(*backwards, backprop=self.backprop, monitor=self.monitor, numerics=numerics)
        inside = (layers[i] for i in forwards)
        part = Sequential(*inside, backprop=self.backprop, monitor=self.monitor, numerics=numerics)
        return part if index.step != -1 else Sequential(Inverse(part), backprop=self.backprop, monitor=self.monitor)

    def __repr__(self) -> str:
        """One layer a line, with the shape after each if the input's shape is known."""
        lines = _lines(self, self.declared_shape)
        width = max(len(text) for text, _ in lines)
        return "\n".join(text if shape is None else f"{text:<{width}}  {shape}" for text, shape in lines)


def _lines(several: Several, shape: Shape | None) -> list[tuple[str, Shape | None]]:
    """Each line of the repr of a list of layers, with the shape of the part of the state after it."""
    name = type(several).__name__
    if not len(several.layers):
        return [(f"{name}()", shape)]
    options = {} if isinstance(several, Sequential) else arguments_of(several) or {}
    given = ", ".join(f"{key}={value!r}" for key, value in options.items() if not isinstance(value, tuple))
    lines = [(f"{name}({given}", shape)]
    known = shape is not None
    paths = [wire.path for wire in several.wires(lambda: shape or ())] if known else [()] * len(several.layers)
    for position, (layer, path) in enumerate(zip(several.layers, paths, strict=True)):
        before: Shape | None = part_of(shape, path) if known else None
        after = None if before is None else layer.output_shape(before)  # type: ignore[operator]
        inside = _lines(layer, before) if isinstance(layer, Several) else [(repr(layer), after)]
        lines += [(f"{'  ' if line else f'  ({position}): '}{text}", of) for line, (text, of) in enumerate(inside)]
        shape = with_part(shape, path, after) if known else None
    return [*lines, (")", None)]
