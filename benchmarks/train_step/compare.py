"""What rows say about each other: speed-ups, geometric means, the least, and how far the limit is."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.train_step.rows import Row

WHOLE = "forward+backward"
LAYOUTS = {"nchw": "NCHW", "nhwc": "channels-last", "rows": "rows"}
WORKS = {
    "norm": "norm",
    "norm+relu": "norm + ReLU",
    "norm+add+relu": "norm + add + ReLU",
    "norm+leaky_relu": "norm + LeakyReLU",
}


@dataclass(frozen=True)
class Speedup:
    """How often faster one competitor is than another over several shapes.

    Attributes:
        mean: the geometric mean.
        least: the smallest.
        where: the shape of the smallest.
        count: how many shapes.
    """

    mean: float
    least: float
    where: str
    count: int


class Rows:
    """Rows that can be asked."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.all = list(rows)

    def select(self, **columns: object) -> Rows:
        """Return the rows whose columns have these values; ``batch`` and ``shape_name`` are columns too."""
        return Rows(row for row in self.all if all(_column(row, name) == value for name, value in columns.items()))

    def values(self, column: str) -> list[object]:
        """Return the different values of a column, in the order of the rows."""
        return list(dict.fromkeys(_column(row, column) for row in self.all))

    def by_shape(self) -> dict[str, Row]:
        """Return the rows by their shape's name; there must be one for each."""
        return {shape_name(row["shape"]): row for row in self.all}

    def speedup(self, ours: str, rival: str) -> Speedup | None:
        """Return how often faster ``ours`` is, over the shapes that both have; None if there is none."""
        mine, theirs = self.select(competitor=ours).by_shape(), self.select(competitor=rival).by_shape()
        factors = {name: theirs[name]["median"] / row["median"] for name, row in mine.items() if name in theirs}
        if not factors:
            return None
        where = min(factors, key=lambda name: factors[name])
        return Speedup(statistics.geometric_mean(factors.values()), factors[where], where, len(factors))

    def over_limit(self, competitor: str) -> float | None:
        """Return the geometric mean of time ÷ limit; None where no limit is known."""
        ratios = [row["ratio"] for row in self.select(competitor=competitor).all if "ratio" in row]
        return statistics.geometric_mean(ratios) if ratios else None


def shape_name(shape: Sequence[int]) -> str:
    """Return C@H for pictures that are square, else N×C×….

    >>> shape_name([32, 64, 112, 112]), shape_name([60, 100])
    ('64@112', '60×100')
    """
    if len(shape) == 4 and shape[2] == shape[3]:
        return f"{shape[1]}@{shape[2]}"
    return "×".join(map(str, shape))


def _column(row: Row, name: str) -> object:
    if name == "shape_name":
        return shape_name(row["shape"])
    return row["shape"][0] if name == "batch" else row.get(name)
