"""The population statistics of every norm of a model, on a few batches that are at hand."""

from __future__ import annotations

from batchnorm.diagnosis.norm_record import NormRecord, Statistics
from batchnorm.diagnosis.passes import Pass, Passes
from batchnorm.errors import BatchNormError, ShapeError
from batchnorm.statistics.estimators import Pooled
from batchnorm.statistics.memory import limit_of
from batchnorm.statistics.ranks import Alone
from batchnorm.statistics.sequential.measure import Sequential
from batchnorm.statistics.sites import Site
from batchnorm.statistics.tally import Tally

__all__ = ["population_of"]


def population_of(passes: Passes, training: Pass) -> dict[Site, list[Statistics]]:
    """Return what each norm meets once every norm before it is on its population statistics.

    Where the sequential order cannot be had, because the model gives another result each time, it is what they meet
    while all normalize by the batch.

    Args:
        passes: the model and its batches.
        training: the pass on batch statistics, which has visited the norms that are to be measured.

    Raises:
        ShapeError: a norm met fewer than two values per channel in all.
    """
    met: dict[Site, NormRecord | Tally] = {**training.records}
    for site, record in training.records.items():
        _require_two(site, record)
    met.update({site: tally for site, tally in _sequential(passes).items() if site in met})
    return {site: [tally.estimator.statistics()] for site, tally in met.items()}


def _sequential(passes: Passes) -> dict[Site, Tally]:
    limit = limit_of(None, passes.model)
    measuring = Sequential(passes.model, passes.forward, passes.sites, Pooled, Alone(), limit=limit, cache=None)
    try:
        return measuring.measure(passes.batches, None, passes.advance).tallies
    except BatchNormError:
        return {}


def _require_two(site: Site, record: NormRecord) -> None:
    if bool(record.statistics[1].isnan().any()):
        raise ShapeError(
            f"diagnose: {site.name or 'the norm'}: a variance needs at least 2 values per channel; it met "
            f"{int(record.estimator.pooled.count.min())} in {record.calls} calls. Pass larger or more batches."
        )
