"""How sure a measurement is as a whole, and how many batches a tolerance would take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batchnorm.statistics.outcome import Outcome


def outcome(batches: int, *uncertainties: float) -> Outcome:
    tallies: Any = {i: SimpleNamespace(overall_uncertainty=lambda u=u: u) for i, u in enumerate(uncertainties)}
    return Outcome(tallies, batches)


def test_the_least_certain_norm_counts() -> None:
    assert outcome(10, 0.1, 0.3, 0.2).uncertainty == 0.3
    assert outcome(10).uncertainty == 0.0


@pytest.mark.parametrize(
    ("batches", "uncertainty", "tolerance", "needed"),
    [
        (10, 0.2, 0.1, 40),  # half the error takes four times the batches
        (10, 0.2, 0.2, 10),
        (10, 0.1, 0.3, 2),  # 10/9, rounded up
        (3, 0.0, 0.1, 1),
        (1, torch.inf, 0.1, None),
    ],
)
def test_errors_fall_with_the_root_of_the_number(
    batches: int, uncertainty: float, tolerance: float, needed: int | None
) -> None:
    assert outcome(batches, uncertainty).needed(tolerance) == needed
