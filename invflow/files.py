"""Files that are written completely or not at all, and folders that one process writes at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it, so that no reader sees a partial file.

    Raises:
        OSError: the file cannot be written; an existing file is kept, and the error names it.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file to write", str(path))
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # a full disk names no file, and nobody knows the temporary one
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_partial(path: Path) -> None:
    """Remove what `write_atomically` left beside a file in processes that were killed. The caller owns the file."""
    for partial in path.parent.glob(f".{path.name}.*"):
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock that one process or thread holds at a time; it ends with its process, however that ends.

    Args:
        path: the lock's file, which is removed afterwards; a file that a killed process left locks nothing.
        wait: whether to wait until the lock is free.

    Raises:
        BlockingIOError: the lock is held, and ``wait`` is false.
    """
    import fcntl  # POSIX has it; the rest of the library works without

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.fstat(handle).st_nlink:  # else the holder before removed the file after it was opened here
                try:
                    yield
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        if os.path.samestat(os.fstat(handle), path.stat()):  # else somebody moved it: it's another's
                            path.unlink()
                return
        finally:
            os.close(handle)
