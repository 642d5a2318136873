"""The command line, one file per verb. Heavy libraries are imported only by the verbs that use them."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from .. import __version__
from ..bijections.implicit import NotConverged
from ..errors import InvflowError, LocalStatisticsWarning, UnfinishedWarning
from . import (
    analyse,
    check,
    compare,
    diff,
    doctor,
    evaluate,
    freeze,
    import_weights,
    interpolate,
    plot_psi,
    plot_solver,
    report,
    sample,
    schema,
    show,
    train,
)
from .output import err, out

MODULES = (
    train,
    evaluate,
    report,
    analyse,
    freeze,
    compare,
    check,
    show,
    diff,
    schema,
    plot_psi,
    plot_solver,
    interpolate,
    sample,
    import_weights,
    doctor,
)
VERBS: tuple[Callable[..., None], ...] = tuple(vars(module)[module.__name__.split(".")[-1]] for module in MODULES)
"""The verbs in the order of ``invflow --help``, each the function that has its module's name.

The help lists the first sentence of each docstring, of at most 59 characters.
"""

TRAIN_EXTRA = frozenset({"lightning", "scipy", "sklearn", "tensorboard"})
"""The packages of the extra ``train`` by their import names: the core does not install them."""

app = typer.Typer(name="invflow", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
for verb in VERBS:
    app.command()(verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"invflow {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Declarative invertible neural networks: check, train, invert."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its status; a user's mistake is one line and status 2."""
    with warnings.catch_warnings():
        warnings.showwarning = functools.partial(_warn, warnings.showwarning)
        try:
            status = app(arguments or sys.argv[1:] or ["--help"], standalone_mode=False)
        except TyperException as error:
            status = _complain(error.format_message())
        except InvflowError as error:
            status = _complain(str(error))
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in TRAIN_EXTRA:
                raise
            status = _complain(f"{error.name} is not installed; training needs it: pip install 'invflow[train]'")
        except OSError as error:
            name = error.filename
            where = "" if name is None else f"{os.fsdecode(name) if isinstance(name, bytes) else name}: "
            status = _complain(f"{where}{error.strerror or error}")
    sys.exit(status if isinstance(status, int) else 0)


def _warn(show: Callable[..., None], message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    """Print a warning of this library as one line, without its place in the code."""
    if issubclass(category, NotConverged | UnfinishedWarning | LocalStatisticsWarning):
        _complain(str(message))
    else:
        show(message, category, *rest, **more)


def _complain(message: str) -> int:
    """Print one line for a user's mistake and return its exit status."""
    err.print(f"invflow: {message}")
    return 2
