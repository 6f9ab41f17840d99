"""In which order norms come, from the ways that batches took; and which norms have no place in such an order."""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter

from batchnorm.statistics.sites import Address

__all__ = ["order_of"]


def order_of(ways: Sequence[Sequence[Address]]) -> tuple[list[Address], set[Address]]:
    """Return an order in which every norm comes after all that some batch met before it; and the norms that have none.

    A norm that is called several times in one forward pass comes before and after whatever lies between, itself
    included; so do two norms that some batches meet in one order and some in the other.

    >>> order_of([["a", "b", "d"], ["a", "c", "d"]])
    (['a', 'b', 'c', 'd'], set())
    >>> order_of([["a", "b", "a", "c"]])
    (['b', 'c'], {'a'})
    """
    without: set[Address] = {site for way in ways for site in way if way.count(site) > 1}
    while True:
        sorter: TopologicalSorter[Address] = TopologicalSorter()
        for way in dict.fromkeys(map(tuple, ways)):
            left = [site for site in way if site not in without]
            for before, after in zip([None, *left], left, strict=False):
                sorter.add(after, *([] if before is None else [before]))
        try:
            return list(sorter.static_order()), without
        except CycleError as error:
            without.add(error.args[1][0])
