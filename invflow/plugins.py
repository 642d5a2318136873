"""Plug-ins that a user names: Python files that register bijections, nets, heads or priors."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from .errors import InvflowError


def load_plugin(path: Path) -> None:
    """Runs a Python file, once for each process that needs what it registers.

    Running a file is trusting it: nothing in a spec, a run or a checkpoint ever names one.

    Raises:
        InvflowError: there is no such file, or it raises.
    """
    if not path.is_file():
        raise InvflowError(f"{path}: no such plug-in; expected a Python file that registers something")
    name = f"invflow_plugin_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise InvflowError(f"{path}: a plug-in is expected to be a Python file, its name ending in .py")
    module = importlib.util.module_from_spec(found)
    before = sys.modules.get(name)
    sys.modules[name] = module  # so that what it defines can be pickled
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise InvflowError(f"{path}: the plug-in does not load: {type(error).__name__}: {error}") from error
