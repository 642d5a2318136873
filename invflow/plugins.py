"""Plug-ins: Python files, named by the user, that register bijections, nets, heads or priors."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

from .errors import InvflowError


def load_plugin(path: Path) -> None:
    """Runs a Python file; each process that needs its classes must do so.

    Running a file means trusting it: specs, runs and checkpoints never name one.

    Raises:
        InvflowError: the file does not exist, or it raises.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such plug-in"
        raise InvflowError(f"{path}: {what}; expected a Python file that registers something")
    # Two files of the same name are two modules; loading a file again replaces its module.
    name = f"invflow_plugin_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise InvflowError(f"{path}: a plug-in is expected to be a Python file, its name ending in .py")
    module = importlib.util.module_from_spec(found)
    before = sys.modules.get(name)
    sys.modules[name] = module  # so that its classes can be pickled
    sys.path.insert(0, str(path.resolve().parent))  # for imports of its neighbours
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise InvflowError(f"{path}: the plug-in does not load: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
