"""Files that appear whole or not at all; several together, or none of them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Together", "is_same", "replacing", "together"]

_LONGEST_SUFFIX = 32


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write; it takes the place of ``path`` at the end, all at once.

    However the body ends, ``path`` holds the old content or the new one, and nothing else is left behind. A new file
    has the rights that this process gives to new files; one that takes the place of another has the other's. A symbolic
    link stays one, and the file that it leads to is replaced.

    Raises:
        OSError: it cannot be written there, or a device or a pipe is there.
    """
    with together() as files:
        yield files.beside(path)


@contextmanager
def together(last: Sequence[Path] = ()) -> Iterator[Together]:
    """Let files be written beside the places of others, which they take at the end of the body: all of them or none.

    Args:
        last: whose places are taken after all others: those that were read, which nobody wants to lose if the process
            is killed in between.

    Raises:
        OSError: one cannot take its place. What was there before is there again.
    """
    files = Together(last)
    try:
        yield files
        files.take_places()
    finally:
        files.remove_rest()


@dataclass(frozen=True)
class _File:
    """A file being written: where, the place that it will take, its rights, and where the old one is kept meanwhile."""

    fresh: Path
    place: Path
    mode: int
    kept: Path


class Together:
    """Files being written beside the places that they will take."""

    def __init__(self, last: Sequence[Path] = ()) -> None:
        self._last = last
        self._files: list[_File] = []

    def beside(self, path: Path) -> Path:
        """Return the path of an empty file to write, which will take the place of ``path``.

        Raises:
            OSError: it cannot be written there, or a device or a pipe is there.
        """
        if path.exists() and not (path.is_file() or path.is_dir()):  # a rename would put a file in the device's place
            raise OSError(errno.EINVAL, "a device or a pipe is no place for a file", str(path))
        place = Path(os.path.realpath(path))
        fresh, kept = _next_to(place), _next_to(place)
        # from the start, so that nobody else reads what they were not to read
        old = stat.S_IMODE(place.stat().st_mode) if place.exists() else None
        os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if old is None else old | stat.S_IWUSR))
        self._files.append(_File(fresh, place, stat.S_IMODE(fresh.stat().st_mode) if old is None else old, kept))
        return fresh

    def take_places(self) -> None:
        """Put every file in its place; after an error, all that was there before."""
        for file in self._files:
            file.fresh.chmod(file.mode)  # some writers make the file anew, with rights of their own
        if len(self._files) == 1:
            self._files[0].fresh.replace(self._files[0].place)
            return
        files = sorted(self._files, key=lambda file: any(is_same(file.place, path) for path in self._last))
        taken: list[tuple[_File, bool]] = []
        try:
            for file in files:
                there = file.place.exists()
                if there:
                    _keep(file.place, file.kept)
                taken.append((file, there))
                file.fresh.replace(file.place)
        except BaseException:
            for file, there in reversed(taken):
                if not file.fresh.exists():  # it has taken its place
                    self._put_back(file, there)
            raise

    def _put_back(self, file: _File, there: bool) -> None:
        try:
            if there:
                file.kept.replace(file.place)
            else:
                file.place.unlink()
        except OSError:
            self._files.remove(file)  # the old content stays beside its place, under the name that it was kept by

    def remove_rest(self) -> None:
        """Remove what has not taken its place, and what was kept."""
        for file in self._files:
            for path in (file.fresh, file.kept):
                path.unlink(missing_ok=True)


def is_same(one: Path, other: Path) -> bool:
    """Return whether two paths lead to one file, also if it is not there yet: by links, ``./``, or letters' case."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    with contextlib.suppress(OSError):
        return one.samefile(other)
    return False


def _next_to(place: Path) -> Path:
    """Return a path for a file that is renamed to ``place`` later.

    In the same directory, since a rename across file systems is no single step; with the same suffix, which some
    writers check; under a short name of its own, since another thread or process may write the same file, and a long
    name may be the longest that there can be.
    """
    suffix = place.suffix if len(os.fsencode(place.suffix)) <= _LONGEST_SUFFIX else ""
    return place.with_name(f".{uuid.uuid4().hex}{suffix}")


def _keep(place: Path, kept: Path) -> None:
    """Let what is at a place also be at another."""
    try:
        os.link(place, kept)
    except OSError:  # a file system without links
        shutil.copy2(place, kept)
