"""The arguments that a registered class was constructed with, and their display on one line."""

from __future__ import annotations

from typing import Any

from torch import nn


def arguments_of(module: object) -> dict[str, Any] | None:
    """The arguments that an object of a registered class was constructed with; None for any other object.

    For a module that it keeps under its parameter's name, the current one is returned: it may have been replaced.
    """
    recorded: dict[str, Any] | None = vars(module).get("_arguments")
    if recorded is None:
        return None
    kept = {name: getattr(module, name) for name in vars(module)["_kept"] if hasattr(module, name)}
    return recorded | {name: tuple(part) if isinstance(part, nn.ModuleList) else part for name, part in kept.items()}


def one_line(module: Any) -> str:
    """``Class(argument=value, net=Net(argument=value))`` on one line, if the arguments were recorded."""
    arguments = arguments_of(module)
    if arguments is None:
        is_module = isinstance(module, nn.Module)
        inside = (module.extra_repr() or ("..." if [*module.children()] else "")) if is_module else ""
    else:
        inside = ", ".join(
            ", ".join(map(one_line, value)) if _are_recorded(value) else f"{name}={_shown(value)}"
            for name, value in arguments.items()
            if not name.endswith("shape") and value != ()
        )
    return f"{type(module).__name__}({inside})"


def _shown(value: Any) -> str:
    return one_line(value) if isinstance(value, nn.Module) else repr(value)


def _are_recorded(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(one, nn.Module) or hasattr(one, "_arguments") for one in value)
