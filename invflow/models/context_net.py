"""Nets that turn the context of a model into what its layers see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..context import Context, ContextShape, named, require_context, seen
from ..errors import InvflowError
from ..state import TensorShape, common_dtype


class ContextNet(nn.Module):
    """What the layers of a model see of its context: ``net(context)``, or ``net(entry)`` for each entry with a net.

    An entry that no net makes is handed on as it is. The weights are trained along with the model's, whose layers'
    gradients reach them through the context.

    Args:
        nets: by the entry that it makes, or, under the name "", a net that makes a context without names. What it takes
            is its attribute ``sees``, or the whole context.
        out_shapes: by the same names, the shapes that they return, without the batch.
        context_shape: the shape of the context that is given.

    Raises:
        InvflowError: the names do not fit.

    Examples:
        >>> import torch
        >>> from invflow.nets import MLP
        >>> net = ContextNet({"": MLP((10,), (4,))}, {"": (4,)}, (10,))
        >>> net(torch.zeros(5, 10)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self, nets: Mapping[str, nn.Module], out_shapes: Mapping[str, TensorShape], context_shape: ContextShape
    ) -> None:
        super().__init__()
        wrong = [name for name in nets if name and not name.isidentifier()]
        if not nets or nets.keys() != out_shapes.keys() or wrong or ("" in nets and len(nets) > 1):
            raise InvflowError(
                'a context_net expects a net and an out_shape by the name of each entry, identifiers, or of "" alone, '
                f"got nets of {', '.join(map(repr, nets))} and out_shapes of {', '.join(map(repr, out_shapes))}"
            )
        # A name of its own for each, because a module may not have those of some methods.
        self.nets = nn.ModuleDict({f"net_{name}": net for name, net in nets.items()})
        self.out_shapes = dict(out_shapes)
        self.context_shape = context_shape

    @property
    def made_shape(self) -> Any:
        """The shape of what the layers see."""
        if "" in self.out_shapes:
            return self.out_shapes[""]
        others = self.context_shape if isinstance(self.context_shape, Mapping) else {}
        return {**others, **self.out_shapes}

    def of(self, name: str) -> nn.Module:
        """The net that makes an entry."""
        return self.nets[f"net_{name}"]

    def require(self, context: Context) -> int:
        """The number of rows of a context, which must be of the shape and the dtype that the nets take.

        Raises:
            ShapeError: it is not.
        """
        return require_context("the context of the model", self.context_shape, common_dtype(self), context)

    def forward(self, context: Context) -> Any:
        """The context that the layers see."""
        self.require(context)
        made: dict[str, Tensor] = {}
        for name in self.out_shapes:
            net = self.of(name)
            made[name] = net(seen(context, getattr(net, "sees", ...)))
        return named({**(context if isinstance(context, Mapping) else {}), **made})
