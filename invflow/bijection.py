"""The contract that every layer keeps: `Bijection`, and `Injection` for layers that add dimensions."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._torch import (
    Constants,
    Converted,
    DispatchMode,
    Filled,
    Gathered,
    constant_to_compiler,
    constants,
    made_by_sharding,
    weights,
)
from .arguments import one_line
from .context import Context, ContextShape, Names, make_context
from .errors import InvflowError, NumericsError, ShapeError
from .numerics.modes import FLOAT, NONE, REAL_ARITHMETIC, Level, Limit, Mode, least
from .state import Shape, State, require_tensor, shape_of, zero_log_det, zeros

_LOG_DETS = ("forward_and_log_det", "inverse_and_log_det")


def _is_abstract(cls: type) -> bool:
    """Whether methods are still to be overridden; the class is being made, so ABC does not know yet."""
    return any(getattr(getattr(cls, name, None), "__isabstractmethod__", False) for name in dir(cls))


def _require_whole(module: nn.Module, keys: Any) -> None:
    """The hook of `Handled`: gives constants that were left out their place, and refuses weights that were."""
    if isinstance(module, Converted):
        module.converted()  # with assign=True, a load converts too
    tensors = dict(weights(module)) | dict(constants(module))
    placed = [tensor for tensor in tensors.values() if not tensor.is_meta]
    if not placed:
        return
    like = next((tensor for tensor in placed if tensor.is_floating_point()), placed[0])
    for part in module.modules():
        if isinstance(part, Constants):
            part.settle(like)
    tensors |= dict(constants(module))
    left, place = [name for name, tensor in tensors.items() if tensor.is_meta], "on the meta device"
    if not left and keys.missing_keys:  # named as the module that was loaded names them
        missing = tuple(f".{key}" for key in keys.missing_keys)
        absent = [name for name in tensors if any(key.endswith(f".{name}") for key in missing)]
        left, place = [name for name in absent if bool(tensors[name].isnan().any())], "NaN"
    if left:
        raise InvflowError(
            f"{type(module).__name__} expects a state_dict with all of its weights, because it was built on the meta "
            f"device: without {left[0]!r}, which stays {place} ({len(left)} of {len(tensors)} tensors do), it is no "
            "model; load a whole one"
        )


class Handled(Gathered, Filled):
    """A module that is never silently half loaded.

    After `load_state_dict`, `assign=True` and `strict=False` included, all of its tensors are on the meta device or
    none is, and none that was left out is what the memory held.

    Raises:
        InvflowError: `load_state_dict` left out a weight that has no value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_require_whole)  # type: ignore[no-untyped-call]


class Bijection(Handled, ABC):
    """An invertible map between states, with its log-determinant.

    A subclass overrides `forward` and `inverse`; then `forward_and_log_det` and `inverse_and_log_det`, both of them, or
    it says ``volume_preserving = True``; and `output_shape` if it takes anything but one tensor whose shape it keeps.
    Everything else has a safe default, which a layer overrides if it can say more.

    Every subclass promises: no hidden state (no caches, no in-place change of the caller's tensors); forward and
    inverse agree under the same weights, in train mode too; no lambdas or closures in attributes, so that every model
    pickles.

    Raises:
        TypeError: the class defines no log-determinants and does not preserve volume.

    Examples:
        >>> class Negate(Bijection):
        ...     volume_preserving = True
        ...
        ...     def forward(self, x, context=None):
        ...         return -x
        ...
        ...     def inverse(self, y, context=None):
        ...         return -y
        >>> Negate().forward_and_log_det(torch.tensor([[1.0, 2.0]]))
        (tensor([[-1., -2.]]), tensor([0.]))
    """

    # ---------------------------------------------------------------- The map

    gathered_calls: ClassVar[tuple[str, ...]] = ("inverse", "forward_and_log_det", "inverse_and_log_det")

    @abstractmethod
    def forward(self, x: Any, context: Any = None) -> Any:
        """``y = f(x)``."""

    @abstractmethod
    def inverse(self, y: Any, context: Any = None) -> Any:
        """``x = f^-1(y)``."""

    # ------------------------------------------------------------- Its volume

    volume_preserving: ClassVar[bool] = False
    """Whether ``|det dy/dx|`` is 1 everywhere, so that the log-determinants below are zeros."""

    def forward_and_log_det(self, x: Any, context: Context = None) -> tuple[Any, Tensor]:
        """``(y, log |det dy/dx|)``, the second of shape ``(batch,)``, dtype and device of the input."""
        return self(x, context), zero_log_det(x)

    def inverse_and_log_det(self, y: Any, context: Context = None) -> tuple[Any, Tensor]:
        """``(x, log |det dx/dy|)``, the second the negative of the forward one at x."""
        return self.inverse(y, context), zero_log_det(y)

    @property
    def log_det_is_estimated(self) -> bool:
        """Whether the log-determinant is an unbiased or truncated estimate rather than its exact value."""
        return False

    # -------------------------------------------------------------- Its shape

    def output_shape(self, shape: Shape) -> Shape:
        """The shape of ``self(x)`` for an ``x`` of this shape. The default takes one tensor and keeps its shape.

        Raises:
            ShapeError: the layer does not take a state of this shape.
        """
        return require_tensor(self.tag, shape)

    def input_shape(self, shape: Shape) -> Shape:
        """The shape of ``self.inverse(y)`` for a ``y`` of this shape.

        The default runs the inverse of a copy on zeros, without a context; a bijection that cannot run without its
        context overrides it.

        Raises:
            ShapeError: the inverse does not take a state of this shape.
        """
        if type(self).output_shape is Bijection.output_shape:
            return self.output_shape(shape)
        probe = copy.deepcopy(self).eval()
        like = next(probe.parameters(), torch.empty(0))
        try:
            with torch.no_grad():
                x: State = probe.inverse(zeros(shape, dtype=like.dtype, device=like.device))
        except ShapeError:
            raise
        except Exception as error:
            raise ShapeError(
                f"the inverse of {self.tag} does not run on zeros of shape {shape} without a context "
                f"({type(error).__name__}: {error}); override its input_shape"
            ) from error
        return shape_of(x)

    @property
    def surjective(self) -> bool:
        """Whether every state of the output's shape is an image: false for an `Injection` and a chain with one."""
        return True

    @property
    def invertible(self) -> bool:
        """Whether there is an inverse at all: false for a `joint`, which runs forward only, and a chain with one."""
        return True

    @classmethod
    def net_shapes(cls, shape: Shape, fields: Mapping[str, Any]) -> Mapping[str, tuple[Shape, Shape]]:
        """The shapes that a layer's nets map when it is built from a spec: parameter -> (input shape, output shape).

        Args:
            shape: the shape of the state that the layer takes.
            fields: the layer's own plain fields by name, defaults included.

        Returns:
            One entry for each parameter that is a net; a net without an entry keeps the state's shape.
        """
        return {}

    # ---------------------------------------------------------- Its exactness

    numerics: Mode = FLOAT
    """The numerics it computes in, set by `set_numerics`."""

    @property
    def limit(self) -> Limit:
        """The best level that the inverse can reach with its present parameters, and the reason why it is no better."""
        return REAL_ARITHMETIC

    @property
    def exactness(self) -> Level:
        """The level that the inverse reaches in the numerics that were set; its limit, if they make no difference."""
        return self.limit.level

    @property
    def inverse_tolerance(self) -> float | None:
        """The relative error at which an iterative inverse stops; None if it runs until rounding stops it."""
        return None

    @property
    def rounding_growth(self) -> float:
        """How many times the roundings of a closed form a round trip may add up.

        It is above 1 for a map through logarithms, because an exponential multiplies their rounding errors by their
        size, and for a map of an interval longer than 1, whose ends are rounded.
        """
        return 1.0

    def set_numerics(self, numerics: Mode) -> None:
        """Sets what the layer computes in; a chain calls this for each of its layers.

        The default stores ``numerics``; a bijection that computes differently on a grid calls their methods.

        Raises:
            NumericsError: the layer's limit is below their level.
        """
        level, reason = self.limit
        if least([level, numerics.level]) != numerics.level:
            raise NumericsError(f"{self.tag} cannot be {numerics.level}: {reason}")
        self.numerics = numerics

    # ------------------------------------------------------ What else is known

    tag: ClassVar[str]
    """The name in specs and messages, set by `register`; the class's name if it is not registered."""

    sees: Names = ...
    """What a chain hands the layer of its context: the entry of a name, those of several, all (...), or None."""

    examples: ClassVar[Sequence[tuple[dict[str, Any], Shape]]] = ()
    """``(fields, shape)`` pairs that documentation and property tests start from: the JSON fields of a layer without
    its type, and an input shape that it accepts."""

    @property
    def domain(self) -> str:
        """The set of inputs: ``"reals"``, ``"positive"``, ``"unit"`` for (0, 1), or ``"symmetric"`` for (-1, 1)."""
        return "reals"

    @property
    def codomain(self) -> str | None:
        """The set of outputs, likewise; None if it is not known, and then tests invert images only."""
        return "reals" if self.domain == "reals" else None

    @property
    def cheap_inverse(self) -> bool:
        """Whether the inverse costs about as much as the forward, so that training may recompute inputs with it."""
        return False

    @property
    def traceable(self) -> bool:
        """Whether `torch.compile` can hold it in one graph: its control flow does not depend on the data."""
        return True

    @constant_to_compiler
    def draws(self, backwards: bool, shape: Shape, context_shape: ContextShape) -> bool:
        """Whether the layer, in the mode that it is in, draws random numbers for an input of this shape.

        A copy of it runs on the meta device; a layer that cannot be run there may draw some.
        """
        mode = _Draws()  # type: ignore[no-untyped-call]
        try:
            # From within torch.compile this runs as an ordinary call does, while the surrounding code is traced.
            probe = copy.deepcopy(self).to("meta")
            like = next((weight for weight in probe.parameters() if weight.is_floating_point()), torch.empty(0))
            x = zeros(shape, batch=2, dtype=like.dtype, device="meta")
            context = make_context(lambda one: torch.zeros((2, *one), dtype=like.dtype, device="meta"), context_shape)
            with torch.no_grad(), mode:
                (probe.inverse if backwards else probe)(x, context)
        except Exception:
            return True
        return mode.found

    @property
    def may_be_flat(self) -> bool:
        """Whether slopes may be so small that y is the same floating-point number for distant x.

        The inverse then returns one of them, and is judged by its image: ``|f(f^-1(y)) - y|``.
        """
        return False

    def lipschitz_bounds(self) -> tuple[float, float]:
        """Upper bounds of the Lipschitz constants of the map and of its inverse; infinite if none is known.

        The norm of a tuple state is the Euclidean norm of all its numbers.
        """
        return math.inf, math.inf

    @property
    def awaits_data(self) -> bool:
        """Whether `initialize` still has to run: true for an ActNorm that has seen no data and a chain with one."""
        return False

    def initialize(self, x: Any, context: Context = None) -> None:
        """Initialises parameters from a batch of inputs, if the layer does so."""

    @property
    def building_cost(self) -> int:
        """The operations of the constructor that are not proportional to the number of weights, about 10^10 a second.

        They are counted on the meta device, before a model is built from a spec (`Limits.operations`).
        """
        return 0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if made_by_sharding(cls):
            return  # it is the same map
        cls.tag = cls.__name__
        own = vars(cls)
        if "volume_preserving" not in own and not own.keys().isdisjoint(_LOG_DETS):
            cls.volume_preserving = False  # its base class preserves volume
        missing = [name for name in _LOG_DETS if getattr(cls, name) is getattr(Bijection, name)]
        if missing and cls.volume_preserving is not True and not _is_abstract(cls):
            raise TypeError(
                f"{cls.__name__} has no {' and no '.join(missing)}: override both, or, if |det dy/dx| is 1 everywhere, "
                "say volume_preserving = True in the class"
            )

    def __repr__(self) -> str:
        """The class with the arguments it was constructed with, on one line."""
        return one_line(self)


class _Draws(DispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether an operator that draws random numbers ran."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class Injection(Bijection):
    """A map that adds dimensions: ``inverse(forward(x))`` is x, but not every y is an image.

    `inverse` is a left inverse; it returns some x even if y is not an image. An injection may stand in a trunk below a
    head, and trains in constant memory. It has no log-determinant, so no prior can stand on it, and it cannot be run
    backwards. A subclass overrides `forward`, `inverse` and `output_shape`.

    Examples:
        >>> class Twice(Injection):
        ...     def output_shape(self, shape):
        ...         return (2 * shape[0],)
        ...
        ...     def forward(self, x, context=None):
        ...         return torch.cat([x, x], 1)
        ...
        ...     def inverse(self, y, context=None):
        ...         return y.chunk(2, 1)[0]
        >>> Twice()(torch.tensor([[1.0]]))
        tensor([[1., 1.]])
    """

    surjective = False
    codomain = None

    @abstractmethod
    def output_shape(self, shape: Shape) -> Shape: ...

    def forward_and_log_det(self, x: Any, context: Context = None) -> tuple[Any, Tensor]:
        """Raises ShapeError: an injection's Jacobian is not square."""
        raise ShapeError(f"{self.tag} adds dimensions, so it has no log-determinant; use it below a head, not a prior")

    def inverse_and_log_det(self, y: Any, context: Context = None) -> tuple[Any, Tensor]:
        """Raises ShapeError: an injection's Jacobian is not square."""
        return self.forward_and_log_det(y, context)


class Rearrangement(Bijection):
    """A map that moves numbers and changes none: exact for every dtype, of log-determinant 0, an isometry.

    A subclass overrides `forward` and `inverse`, and `output_shape` and `input_shape` if the shape changes.
    """

    volume_preserving = True
    limit = NONE
    cheap_inverse = True

    def lipschitz_bounds(self) -> tuple[float, float]:
        return 1.0, 1.0
