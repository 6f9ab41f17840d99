"""Population statistics in one training-like pass: all norms at once, on the statistics of each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import ceil, inf
from typing import Any

from torch.nn import Module

from batchnorm.models.calling import Forward
from batchnorm.statistics.collect import OnBatch
from batchnorm.statistics.estimators import Estimator
from batchnorm.statistics.failures import explained
from batchnorm.statistics.outcome import Outcome
from batchnorm.statistics.ranks import Ranks
from batchnorm.statistics.sites import Sites
from batchnorm.statistics.stream import empty_stream, numbered
from batchnorm.statistics.tally import merge_spreads, merge_tallies

__all__ = ["measure_in_parallel"]

_FIRST_LOOK = 8
_NEXT_LOOK = 1.25
"""With a tolerance the standard errors are looked at after 8 batches, and whenever there are a quarter more."""


def measure_in_parallel(
    model: Module,
    call: Forward,
    stream: Iterable[Any],
    sites: Sites,
    estimator: type[Estimator],
    ranks: Ranks,
    tolerance: float | None,
    advance: Callable[[], None],
) -> Outcome:
    """Run the model on every batch, or on as many as the tolerance asks for.

    Raises:
        BatchNormError: see :func:`batchnorm.statistics.recalibrate.recalibrate`.
    """
    collector = OnBatch(sites, estimator)
    walk = numbered("recalibrate", stream, allow_empty=ranks.size > 1)
    number, ended = 0, False
    look: float = inf if tolerance is None else _FIRST_LOOK
    while True:
        while not ended and number < look:
            number, ended = _step(model, call, collector, walk, number)
            if not ended:
                advance()
        tallies = merge_tallies(ranks, sites, collector.tallies)
        merge_spreads(ranks, tallies)
        outcome = Outcome(tallies, sum(ranks.agree(number)))
        # asked in every process: one whose stream has ended waits for the others
        if all(ranks.agree(ended)) or (tolerance is not None and outcome.uncertainty <= tolerance):
            break
        look = ceil(look * _NEXT_LOOK) if tolerance is not None else inf
    if outcome.batches == 0:
        raise empty_stream("recalibrate", type(stream).__name__)
    return outcome


def _step(model: Module, call: Forward, collector: OnBatch, walk: Any, number: int) -> tuple[int, bool]:
    """Run the model on the next batch; return how many there were, and whether that was all."""
    index, batch = next(walk, (-1, None))
    if index < 0:
        return number, True
    try:
        collector.run(index, partial(call, model, batch))
    except Exception as error:
        raise explained("recalibrate", error, model, index, batch, call) from error
    return index + 1, False
