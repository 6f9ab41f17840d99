"""The time that the fewest possible bytes take, at the speed at which torch copies a tensor of the same size.

Bytes per element, in units of the element's size, for a norm in training:

    ================  =======================  ==============================================
    forward           2: read x, write y       3 where x has left the cache after the statistics
    backward          3: read x, dy; write dx  5 where x and dy have left it after the two sums
    + add, forward    1: read the residual
    + add, backward   1: write its gradient    and one bit an element, the sign before ReLU
    ================  =======================  ==============================================

ReLU costs nothing: its sign follows from what is read anyway, except behind an add. What has to stay in the cache is
one channel of x where channels are contiguous, and all of x in channels-last; it is taken to stay as soon as it is no
larger than the last-level cache, although several channels are worked on at a time and dy needs room as well. So the
limit is rather too low than too high. It is no bound of nature either: a copy writes a buffer that it has not read, and
a layer that writes over its input can do with less traffic per byte than the copy.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from benchmarks.train_step.cases import Layer

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def last_level_cache() -> int:
    """Return the size of the last-level cache in bytes; 0 where the system does not tell."""
    found = [(int(_read(index / "level")), _bytes(_read(index / "size"))) for index in _CACHES.glob("index*")]
    if found:
        return max(found)[1]
    try:
        return max(0, os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    except (OSError, ValueError):
        return 0


def fewest_bytes(case: Layer, cache: int) -> dict[str, float]:
    """Return the bytes that have to travel, by phase."""
    size = case.numel * case.itemsize
    needed = size // case.channels if case.layout == "nchw" else size
    stays = needed <= cache
    forward: float = size * (2 if stays else 3)
    backward: float = size * (3 if stays else 5)
    if "add" in case.work:
        forward += size
        backward += size + case.numel / 8
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}


def limits(case: Layer, cache: int, bytes_per_second: float) -> dict[str, float]:
    """Return the limit in seconds, by phase."""
    if not math.isfinite(bytes_per_second):
        return {}
    return {phase: count / bytes_per_second for phase, count in fewest_bytes(case, cache).items()}


def _read(path: Path) -> str:
    return path.read_text().strip()


def _bytes(text: str) -> int:
    return int(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else int(text)
