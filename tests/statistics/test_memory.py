"""A limit of memory, as a number or in words; and what is free where nobody names one."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from batchnorm.errors import ArgumentTypeError, ShapeError
from batchnorm.statistics.memory import limit_of

MODEL = nn.Identity()


@pytest.mark.parametrize(
    ("memory", "limit"),
    [
        (0, 0),
        (1234, 1234),
        (1.5e9, 1.5e9),
        ("7", 7),
        ("7 B", 7),
        (" 4GB ", 4e9),
        ("4 gib", 4 * 2**30),
        (".5k", 500),
        ("2KiB", 2048),
        ("1.25 Mi", 1.25 * 2**20),
        ("3m", 3e6),
        ("1TB", 1e12),
        ("1TiB", 2**40),
        (float("inf"), float("inf")),
    ],
)
def test_bytes_and_units(memory: int | float | str, limit: float) -> None:
    assert limit_of(memory, MODEL) == limit


@pytest.mark.parametrize("memory", ["", "GB", "4 G B", "4PB", "-4GB", "1e9", "4,5GB", "1i", "nan", True, [4], b"4GB"])
def test_what_is_no_number_of_bytes_is_told(memory: object) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        limit_of(memory, MODEL)  # type: ignore[arg-type]
    said = f"recalibrate: memory={memory!r}: expected a number of bytes, or a text such as '4GB'."
    assert str(caught.value) == said


@pytest.mark.parametrize("memory", [-1, -0.5, float("nan")])
def test_less_than_nothing_is_told(memory: float) -> None:
    with pytest.raises(ShapeError, match=f"memory={memory}: expected a number of bytes, 0 or more"):
        limit_of(memory, MODEL)


MEMINFO = "MemTotal:  64000 kB\nMemFree:   1000 kB\nMemAvailable:  8000 kB\n"


@pytest.mark.parametrize(
    ("meminfo", "most", "current", "free"),
    [
        (MEMINFO, None, None, 8000 * 1024),  # no control group
        (MEMINFO, "max", "5000", 8000 * 1024),  # one without a limit
        (MEMINFO, "6000000", "5000000", 1_000_000),  # what it leaves is less
        (MEMINFO, "6000000", "7000000", 0),
        (MEMINFO, "99999999999", "0", 8000 * 1024),
        (None, "6000000", "5000000", 1_000_000),
        (None, None, None, 2**32),  # nobody tells
        ("MemTotal: 64000 kB\n", None, None, 2**32),
        ("MemAvailable: many kB\n", None, None, 2**32),
    ],
)
def test_without_a_limit_it_is_half_of_what_is_free(
    meminfo: str | None, most: str | None, current: str | None, free: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"/proc/meminfo": meminfo, "/sys/fs/cgroup/memory.max": most, "/sys/fs/cgroup/memory.current": current}

    def read(self: Path, *args: object, **kwargs: object) -> str:
        text = texts[str(self)]
        if text is None:
            raise FileNotFoundError(str(self))
        return text

    monkeypatch.setattr(Path, "read_text", read)
    assert limit_of(None, MODEL) == free / 2
