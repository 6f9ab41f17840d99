"""Writing what was measured into a model's buffers, and reporting it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from batchnorm.nn.select import NormModule
from batchnorm.statistics.agreement import Borrowed
from batchnorm.statistics.buffers import written
from batchnorm.statistics.outcome import Outcome
from batchnorm.statistics.population import LayerPopulation, Population
from batchnorm.statistics.ranks import Ranks
from batchnorm.statistics.result import LayerStatistics, MeasurementPlan, RecalibrateResult, Written
from batchnorm.statistics.sites import Left, NothingToMeasure, Site, Sites
from batchnorm.statistics.tally import Tally
from batchnorm.statistics.values import new_values

__all__ = ["finish"]


def finish(
    plan: MeasurementPlan, sites: Sites, outcome: Outcome, ranks: Ranks, borrowed: Borrowed
) -> RecalibrateResult:
    """Write what was measured into the buffers, in all processes or in none, and report it."""
    tallies = outcome.tallies
    replies = ranks.agree((list(sites.left.values()), sites.unknown_calls))  # a functional norm is met where it runs
    left = list(dict.fromkeys(one for found, _ in replies for one in found))
    if not (tallies or left or sites.known):
        raise NothingToMeasure(
            "recalibrate: the model called no batch norm with running statistics, so there is nothing to recalibrate."
        )
    left += sites.not_met({site.name for site in tallies})
    if any(calls for _, calls in replies):
        left.append(Left("(functional)", "its running statistics are not buffers of the model"))
    layers: list[LayerStatistics] = []
    changes: list[tuple[Tensor, Tensor]] = []
    before: list[Written] = []
    for site, tally in tallies.items():
        new = new_values(site, tally)
        old = {key: getattr(site.owner, key).detach().clone() for key in new}
        changes += [(getattr(site.owner, key), value) for key, value in new.items()]
        before += [Written(f"{site.name}.{key}".lstrip("."), site.owner, key, value) for key, value in old.items()]
        layers.append(_layer(site, tally, old, new))
    kept = borrowed.to_keep((item.owner, item.key) for item in before)
    changes += [(getattr(owner, key), value) for _, owner, key, value in kept]
    before += [Written(name, owner, key, getattr(owner, key).detach().clone()) for name, owner, key, _ in kept]
    if kept:
        outcome = replace(outcome, notes=(*outcome.notes, borrowed.note([name for name, *_ in kept])))
    population = Population({site.name: _population(site, tally) for site, tally in tallies.items()})
    result = RecalibrateResult(plan, outcome, layers, left, before, population)
    ranks.agree("ready to write")
    with written(changes):  # the last that happens: an interrupt after it would leave the new values
        ranks.agree("written")  # or else another process could not write its own
    return result


def _layer(site: Site, tally: Tally, old: dict[str, Tensor], new: dict[str, Tensor]) -> LayerStatistics:
    mean, variance, _ = site.keys
    return LayerStatistics(
        name=site.name,
        batches=tally.batches,
        calls=tally.calls,
        values=int(tally.estimator.pooled.count.min()),
        single_calls=tally.single_calls,
        eps=tally.eps,
        mean_before=old[mean],
        variance_before=old[variance],
        mean_after=new[mean],
        variance_after=new[variance],
        uncertainty=tally.uncertainty(),
    )


def _population(site: Site, tally: Tally) -> LayerPopulation:
    of_norm = isinstance(site.owner, NormModule)  # else a batch norm function was given buffers of that module
    return LayerPopulation(tally.estimator.pooled, *tally.standard_errors(), tally.batches, of_norm)
