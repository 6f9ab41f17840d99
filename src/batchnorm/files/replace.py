"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write; it takes the place of ``path`` at the end, all at once.

    However the body ends, ``path`` holds the old content or the new one, and nothing else is left behind.

    Raises:
        OSError: it cannot be written there, or a device or a pipe is there.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # a rename would put a file in the device's place
        raise OSError(errno.EINVAL, "a device or a pipe is no place for a file", str(path))
    # In the same directory, since a rename across file systems is no single step; with the same suffix, which some
    # writers check; under a name of its own, since another thread or process may write the same file.
    fresh = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
