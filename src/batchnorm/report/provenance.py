"""Where a report comes from: what ran, on which model and data, when, and with which software."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

__all__ = ["Provenance", "command", "source"]

_sources: ContextVar[dict[str, list[str]] | None] = ContextVar("sources", default=None)
"""The command that runs, and the files that it read; None in Python code."""


@dataclass(frozen=True)
class Provenance:
    """What is known of a result beside itself.

    Attributes:
        call: the function that returned it, ``"batchnorm.fold"``.
        model: class, parameters and norms, in words.
        data: what the model was run on, in words.
        device: of the parameters.
        date: when it was done, in UTC.
    """

    call: str = ""
    model: str = ""
    data: str = ""
    device: str = ""
    date: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    def rows(self) -> list[tuple[str, str]]:
        """Return it as names and values, with the command that runs and its files; without what nobody knows.

        Pages are the same byte by byte where ``SOURCE_DATE_EPOCH`` says the date, in seconds since 1970.
        """
        sources = {kind: ", ".join(names) for kind, names in (_sources.get() or {}).items()}
        data = "; ".join(filter(None, (sources.get("data"), self.data)))
        by = sources.get("command") or f"Python{f', {self.call}' * bool(self.call)}"
        rows = (
            ("model", " from ".join(filter(None, (self.model, sources.get("model"))))),
            ("weights", sources.get("weights", "")),
            ("data", data),
            ("device", self.device),
            ("date", (_epoch() or self.date).isoformat(timespec="seconds")),
            ("software", _software()),
            ("made by", by),
        )
        return [(name, value) for name, value in rows if value]


def _epoch() -> datetime | None:
    """Return the date that the environment sets, see https://reproducible-builds.org/specs/source-date-epoch."""
    told = os.environ.get("SOURCE_DATE_EPOCH", "")
    try:
        return datetime.fromtimestamp(int(told), timezone.utc)
    except (ValueError, OverflowError, OSError):
        return None


def _software() -> str:
    packages = [f"{name} {found}" for name in ("batchnorm", "torch") if (found := _version(name))]
    return ", ".join([*packages, f"Python {platform.python_version()}"])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def command(line: str) -> Iterator[None]:
    """Have reports that are written while the body runs say which command wrote them."""
    token = _sources.set({"command": [line]})
    try:
        yield
    finally:
        _sources.reset(token)


def source(kind: str, name: str) -> None:
    """Note what the command that runs has read: ``kind`` is ``"model"``, ``"weights"`` or ``"data"``.

    Outside of a command nothing happens.
    """
    sources = _sources.get()
    if sources is not None and name not in sources.setdefault(kind, []):
        sources[kind].append(name)
