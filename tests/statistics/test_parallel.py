"""One pass on the statistics of each batch, as long as a tolerance asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm.errors import BatchError, EmptyStreamError
from batchnorm.models.calling import call_on_batch
from batchnorm.statistics.estimators import Pooled
from batchnorm.statistics.outcome import Outcome
from batchnorm.statistics.parallel import measure_in_parallel
from batchnorm.statistics.ranks import Alone
from batchnorm.statistics.sites import Sites


def model() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.BatchNorm1d(2, affine=False)).double()


def batches(number: int) -> list[Tensor]:
    x = torch.randn(number, 8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return list(x * 3 + torch.arange(number).view(-1, 1, 1))


def measured(stream: Any, tolerance: float | None = None, ranks: Any = None) -> tuple[Outcome, Sites, int]:
    net, advanced = model(), []
    sites = Sites(net, None)
    outcome = measure_in_parallel(
        net, call_on_batch, stream, sites, Pooled, ranks or Alone(), tolerance, lambda: advanced.append(1)
    )
    return outcome, sites, len(advanced)


def test_each_norm_meets_what_the_batchs_own_statistics_make_of_it() -> None:
    data = batches(3)
    outcome, sites, advanced = measured(data)
    assert (outcome.batches, advanced) == (3, 3)
    first, second = (outcome.tallies[site].estimator.pooled for site in sites.known)
    torch.testing.assert_close(first.mean, torch.cat(data).mean(0))
    normalized = torch.cat([(x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in data])
    torch.testing.assert_close(second.variance(), normalized.var(0, correction=0))


@pytest.mark.parametrize(
    ("tolerance", "walked"),
    [
        (None, 40),
        (1e9, 8),  # the first look is after 8 batches
        (0.0, 40),
    ],
)
def test_a_tolerance_ends_the_stream(tolerance: float | None, walked: int) -> None:
    taken = []

    def stream() -> Iterator[Tensor]:
        for batch in batches(40):
            taken.append(1)
            yield batch

    outcome, _, advanced = measured(stream(), tolerance)
    assert (outcome.batches, len(taken), advanced) == (walked, walked, walked)


def test_later_looks_are_a_quarter_further_on() -> None:
    looks: list[int] = []

    class Counting(Alone):
        def agree(self, value: Any) -> list[Any]:
            if isinstance(value, int) and not isinstance(value, bool):
                looks.append(value)
            return [value]

    measured(batches(20), 0.0, Counting())
    assert looks == [8, 10, 13, 17, 20]


def test_nothing_at_all_is_an_error_but_not_of_one_process_among_several() -> None:
    with pytest.raises(EmptyStreamError, match="at least one batch"):
        measured([])

    class Second:
        """The other process has measured two batches, and its stream has ended."""

        rank, size = 1, 2

        def agree(self, value: Any) -> list[Any]:
            return [2 if value == 0 and not isinstance(value, bool) else value, value]

    outcome, _, _ = measured([], ranks=Second())
    assert (outcome.batches, outcome.tallies) == (2, {})
    with pytest.raises(EmptyStreamError):
        measured([], ranks=type("Third", (Second,), {"agree": lambda self, value: [value, value]})())


def test_a_batch_on_which_the_model_fails_is_named_with_its_cause() -> None:
    with pytest.raises(BatchError, match=r"Sequential failed on batch 1 \(counting from 0\)") as caught:
        measured([*batches(1), torch.zeros(3, 5).double()])
    assert caught.value.__cause__ is not None
