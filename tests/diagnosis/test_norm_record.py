"""What a norm meets in a pass, call by call, and what it normalizes by meanwhile."""

from __future__ import annotations

import pytest
import torch
from tests.diagnosis.conftest import passes_of
from torch import nn

from batchnorm.diagnosis.norm_record import Basis
from batchnorm.moments import Moments


class Twice(nn.Module):
    """One norm, called on x and on 3 x + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.norm(x), self.norm(3 * x + 1)])


@pytest.fixture
def data() -> list[torch.Tensor]:
    return list(torch.randn(4, 32, 4, generator=torch.Generator().manual_seed(0)))


def test_calls_within_a_forward_pass_are_told_apart(data) -> None:
    done = passes_of(Twice().eval(), data).run(Basis("stored"))
    (meeting,) = done.meetings.values()
    whole = torch.cat(data)
    assert (meeting.calls, meeting.batches, meeting.samples, meeting.fewest) == (8, 4, 256, 32)
    for met, x in zip(meeting.per_call, (whole, 3 * whole + 1), strict=True):
        torch.testing.assert_close(met.mean, Moments.of(x).mean, rtol=1e-5, atol=1e-6)
    assert len(meeting.per_batch) == 4


def test_each_call_may_be_given_statistics_of_its_own(data) -> None:
    model = Twice().eval()
    outputs: list[torch.Tensor] = []
    passes = passes_of(model, data, lambda output, batch: outputs.append(output) or 0.0)
    (site,) = passes.sites.known
    whole = torch.cat(data)
    own = [(met.mean, met.variance(correction=1)) for met in (Moments.of(whole), Moments.of(3 * whole + 1))]
    passes.run(Basis("stored", {site: own}))
    both = torch.cat(outputs, 1)
    torch.testing.assert_close(both[0], both[1], rtol=1e-4, atol=1e-4)  # the same up to scale and shift before the norm
