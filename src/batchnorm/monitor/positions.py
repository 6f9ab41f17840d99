r"""Which positions of a feature map are looked at: of a large one some rows, at equal distances.

Neighbouring rows resemble each other, so that a part of them says nearly as much about a sample's mean and variance as
all do, and reading memory is what a watch costs. Of a map of H rows, sample number n of a stream shows the rows

.. math:: r \equiv n \pmod k

so that, over k samples, every row is looked at equally often: mean and variance over a stream are those of all
positions (border and middle alike), while each sample's own numbers are noisier. That noise is in the scatter from
sample to sample, of which all standard errors are made: that of a mean grows by 8 % where 4 of 56 rows are looked at,
if neighbours are alike over 5 positions and a tenth of the variance lies between samples. k divides H where H has a
divisor of about that size; else rows of samples that show one row more than others weigh a little less. Maps of fewer
than 1,024 positions are read whole: in one piece they take no longer than some of their rows.

Source: Cochran 1977, "Sampling Techniques", ch. 8 (systematic sampling).
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

from torch import Tensor

__all__ = ["distance", "looked_at", "parts", "rows_in_place"]

_WORTH = 2**14  # values of a sample: of fewer all are read, for the calls would cost more than the memory
_WHOLE = 2**10  # positions: smaller maps are read in one go faster than in rows, which have too few values each
_SHORT = 8  # values in a row: of fewer, the kernels would read one by one
_ROWS = 4  # are left at least
_FARTHEST = 16


def _rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return how many rows the positions of an input (N, C, *space) make, and of how many positions each."""
    space = shape[2:]
    width = space[-1] if len(space) > 1 else 1
    return prod(space) // max(width, 1), width


@lru_cache(maxsize=4096)
def distance(shape: tuple[int, ...]) -> int:
    """Return k: every k-th row of a sample is looked at.

    >>> distance((8, 64, 112, 112)), distance((8, 64, 14, 14))
    (16, 1)
    """
    if len(shape) < 3 or prod(shape[1:]) < _WORTH or prod(shape[2:]) < _WHOLE:
        return 1
    rows, _ = _rows_of(shape)
    most = max(1, min(rows // _ROWS, _FARTHEST))
    return next((k for k in range(most, most // 2, -1) if rows % k == 0), most)


@lru_cache(maxsize=4096)
def looked_at(shape: tuple[int, ...]) -> int:
    """Return about how many positions of each sample are looked at."""
    return max(1, prod(shape[2:]) // distance(shape))


@lru_cache(maxsize=4096)
def rows_in_place(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return how an input (N, C, *space) is read in rows that lie in one piece each, where it can be.

    Returns:
        (N, C, rows, width), then the strides of the first three, then k: every k-th row is looked at; or None.
    """
    k = distance(shape)
    rows, width = _rows_of(shape)
    if k > 1 and width < _SHORT:
        return None
    dense = all(at == size * next for at, size, next in zip(strides[2:], shape[3:], strides[3:], strict=False))
    if strides[-1] == 1 and dense:  # the positions of a channel lie in one piece
        sizes = (1, rows * width) if k == 1 else (rows, width)
        return (*shape[:2], *sizes, *strides[:2], width, k)
    return (*shape, *strides[:3], k) if len(shape) == 4 and strides[3] == 1 else None


def _as_rows(x: Tensor) -> Tensor:
    """Return an input (N, C, *space) as (N, C, rows, width): copied if it lies so that rows have no one distance."""
    return x if x.dim() == 4 else x.reshape(*x.shape[:2], *_rows_of(x.shape))


def parts(x: Tensor, first: int) -> list[Tensor]:
    """Return what is looked at of an input (N, C, *space): (n, C, rows, width) of its samples, in their order.

    Args:
        x: the input.
        first: number of its first sample in the stream.
    """
    k = distance(x.shape)
    if k == 1:
        return [x]
    x = _as_rows(x)
    height, width = x.shape[2:]
    sample, channel, row, column = x.stride()
    start = x.storage_offset()
    found = []
    for at, rounds, count, offset, rows in _runs(len(x), first % k, height, k):
        seen = x.as_strided(
            (rounds, count, x.shape[1], rows, width),
            # the next sample begins one row further down
            (k * sample, sample + row, channel, k * row, column),
            start + at * sample + offset * row,
        )
        found.append(seen[0] if rounds == 1 else seen.reshape(rounds * count, *seen.shape[2:]))
    return found


@lru_cache(maxsize=4096)
def _runs(samples: int, first: int, height: int, k: int) -> tuple[tuple[int, int, int, int, int], ...]:
    """Return runs of samples of which each begins one row below the last: where, rounds, how many, first row, rows.

    Where k divides the height, whole rounds of k samples are one run.
    """
    runs: list[tuple[int, int, int, int, int]] = []
    i = 0
    while i < samples:
        offset = (first + i) % k
        rounds = (samples - i) // k
        if offset == 0 and rounds and height % k == 0:
            runs.append((i, rounds, k, 0, height // k))
            i += rounds * k
            continue
        # up to where rows begin anew, or where a sample shows one row less
        end = height % k if offset < height % k else k
        count = min(end - offset, samples - i)
        runs.append((i, 1, count, offset, (height - offset + k - 1) // k))
        i += count
    return tuple(runs)
