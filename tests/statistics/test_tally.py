"""What one norm has met: counted by call and by batch, with its uncertainty, and merged over processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.statistics.estimators import Pooled, Within
from batchnorm.statistics.parts import Parts
from batchnorm.statistics.sites import Sites
from batchnorm.statistics.tally import Tally, merge_spreads, merge_tallies


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)


def add(tally: Tally, batch: int, *values: float, first: bool = True) -> Tally:
    met = Moments.of(column(*values)) if values else Moments.zero(1)
    tally.add(met, batch, first=first, fewest=len(values), most=len(values))
    return tally


def test_calls_batches_and_single_values_are_counted() -> None:
    tally = Tally(Pooled(1), 1e-5)
    add(tally, 0, 1.0, 3.0)
    add(tally, 0, 5.0, first=False)  # again in the same forward pass, on one value
    add(tally, 1)  # nothing valid: no call that counts
    add(tally, 2, 7.0, 9.0)
    assert (tally.batches, tally.calls, tally.single_calls) == (2, 3, 1)
    assert tally.estimator.pooled == Moments.of(column(1, 3, 5, 7, 9))
    assert len(tally.spread.groups) == 2


def test_batches_that_were_joined_count_as_they_do_alone() -> None:
    x = torch.arange(12.0, dtype=torch.float64).view(6, 2)
    joined, alone = Tally(Pooled(2), 0.0), Tally(Pooled(2), 0.0)
    joined.add_parts(Parts.of(x, 3), 4, first=True)
    for index, part in enumerate(x.split(2), 4):
        alone.add(Moments.of(part), index, first=True, fewest=2, most=2)
    for tally in (joined, alone):
        assert (tally.batches, tally.calls, tally.single_calls) == (3, 3, 0)
    torch.testing.assert_close(joined.uncertainty(), alone.uncertainty())
    single = Tally(Pooled(2), 0.0)
    single.add_parts(Parts.of(x, 6), 0, first=False)
    assert (single.batches, single.calls, single.single_calls) == (0, 6, 6)


def test_uncertainty_is_the_larger_error_in_standard_deviations() -> None:
    tally = add(add(Tally(Pooled(1), 1.0), 0, 1.0, 3.0), 1, 3.0, 5.0)
    # means 2 and 4 of halves: se = √(2/1 · (¼ + ¼)) = 1; v = 2 and of both halves about 3: se(v) = 0
    mean, variance = tally.standard_errors()
    assert (mean.item(), variance.item()) == (pytest.approx(1.0), pytest.approx(0.0))
    assert tally.uncertainty().tolist() == pytest.approx([1 / 3**0.5])  # v + ε = 3
    assert tally.overall_uncertainty() == pytest.approx(1 / 3**0.5)


def test_a_single_batch_knows_nothing_of_its_errors() -> None:
    tally = add(Tally(Pooled(1), 1e-5), 0, 1.0, 3.0)
    assert tally.overall_uncertainty() == torch.inf


class Ranks:
    """Several processes, each of which gives what the others will be told it gave."""

    size = 2

    def __init__(self, *others: Any) -> None:
        self.others, self.given = list(others), []

    def agree(self, value: Any) -> list[Any]:
        self.given.append(value)
        return [value, self.others.pop(0)]


MODEL = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1))


@pytest.mark.parametrize("estimator", [Pooled, Within])
def test_two_processes_hold_together_what_one_would(estimator: type[Pooled] | type[Within]) -> None:
    sites = Sites(MODEL, None)
    site, second = sites.known
    mine = add(add(Tally(estimator(1), 1e-5), 0, 1.0, 2.0), 1, 3.0, 8.0)
    theirs = add(add(Tally(estimator(1), 1e-5), 2, 4.0, 4.0), 3, 9.0)
    only_theirs = add(Tally(estimator(1), 1e-5), 0, 5.0, 7.0)
    whole = add(add(add(add(Tally(estimator(1), 1e-5), 0, 1.0, 2.0), 1, 3.0, 8.0), 2, 4.0, 4.0), 3, 9.0)
    ranks = Ranks({site.address: theirs, second.address: only_theirs})
    merged = merge_tallies(ranks, sites, {site: mine})  # type: ignore[arg-type]
    assert list(merged) == [site, second]
    for key in ("batches", "calls", "single_calls"):
        assert getattr(merged[site], key) == getattr(whole, key)
        assert getattr(merged[second], key) == getattr(only_theirs, key)
    torch.testing.assert_close(merged[site].estimator.statistics(), whole.estimator.statistics())
    assert merged[site].spread is mine.spread
    assert merged[second].spread.groups == ()
    pooled = whole.estimator.pooled
    ranks.others.append({site.address: theirs.spread.deviations(pooled), second.address: torch.zeros(3, 1).double()})
    merge_spreads(ranks, merged)  # type: ignore[arg-type]
    torch.testing.assert_close(merged[site].standard_errors(), whole.standard_errors())


def test_one_process_is_asked_nothing() -> None:
    sites = Sites(MODEL, None)
    tallies = {sites.known[0]: Tally(Pooled(1), 1e-5)}
    alone: Any = SimpleNamespace(size=1)
    assert merge_tallies(alone, sites, tallies) == tallies
    merge_spreads(alone, tallies)
