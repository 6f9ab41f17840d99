"""Rows of values as strips of colour: a picture for a page, and letters for a terminal."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["shades", "strip", "strongest"]

_MOST_CELLS = 256
_NEGATIVE, _POSITIVE, _BROKEN = (0, 114, 178), (213, 94, 0), (160, 30, 150)  # Okabe & Ito's blue and vermilion; purple
_SHADES = "·░▒▓█"


def strongest(values: Sequence[float], most: int) -> list[float]:
    """Return the values, or where there are more than ``most``, the strongest of each run of neighbours.

    What is not finite is stronger than everything.

    >>> strongest([0.0, -3.0, 1.0, 2.0], 2)
    [-3.0, 2.0]
    """
    if len(values) <= most:
        return list(values)
    edges = [i * len(values) // most for i in range(most + 1)]
    return [max(values[a:b], key=_strength) for a, b in pairwise(edges)]


def _strength(value: float) -> float:
    return abs(value) if math.isfinite(value) else math.inf


def strip(values: Sequence[float], limit: float) -> str:
    """Return one row as the address of a picture, one pixel a value: ``data:image/png;base64,...``.

    The colour's opacity is the size of the value, so that zero is the ground of the page, light or dark.
    """
    pixels = b"".join(_pixel(value, limit) for value in strongest(values, _MOST_CELLS))
    width = max(len(pixels) // 4, 1)
    header = struct.pack(">IIBBBBB", width, 1, 8, 6, 0, 0, 0)
    data = zlib.compress(b"\0" + (pixels or bytes(4)), 9)
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", data), _chunk(b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _pixel(value: float, limit: float) -> bytes:
    if not math.isfinite(value):
        return bytes((*_BROKEN, 255))
    colour = _NEGATIVE if value < 0 else _POSITIVE
    return bytes((*colour, round(255 * min(abs(value) / limit, 1.0)) if limit > 0 else 0))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def shades(values: Sequence[float], limit: float, most: int) -> str:
    """Return one row as letters, the darker the larger; ``!`` is not finite.

    >>> shades([0.0, 0.5, -1.0, float("nan")], 1.0, 10)
    '·▒█!'
    """
    return "".join(_shade(value, limit) for value in strongest(values, most))


def _shade(value: float, limit: float) -> str:
    if not math.isfinite(value):
        return "!"
    share = min(abs(value) / limit, 1.0) if limit > 0 else 0.0
    return _SHADES[round(share * (len(_SHADES) - 1))]
