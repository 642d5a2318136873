"""Files that are written completely or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it, so that no reader sees a partial file.

    Raises:
        OSError: the file cannot be written; an existing file is kept.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file to write", str(path))
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # as open() would: the umask decides
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
