"""One pass on a chosen basis: what norms normalize by, and what is told of each call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.diagnosis.norm_record import Basis
from batchnorm.diagnosis.passes import Passes
from batchnorm.diagnosis.sites import EverySite
from batchnorm.diagnosis.trial import outstanding
from batchnorm.models.calling import call_on_batch
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


def passes_of(model: nn.Module, data: list[torch.Tensor], metric=None) -> Passes:
    return Passes(model, EverySite(model), data, call_on_batch, metric)


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


def test_a_pass_on_stored_statistics_is_eval_mode(net, batches) -> None:
    outputs: list[torch.Tensor] = []
    passes_of(net, batches, lambda output, batch: outputs.append(output) or 0.0).run(Basis("stored"))
    with torch.no_grad():
        torch.testing.assert_close(outputs[0], net(batches[0]), rtol=0, atol=0)


def test_another_eps_is_the_norms_for_one_pass(net, batches) -> None:
    passes = passes_of(net, batches, lambda output, batch: float(output.std()))
    (site,) = (site for site in passes.sites.known if site.name == "bn1")
    before = passes.run(Basis("stored")).metric
    with_eps = passes.run(Basis("stored", eps={site: 10.0})).metric
    net.bn1.eps = 10.0
    assert with_eps == passes.run(Basis("stored")).metric != before


def test_what_is_outstanding_falls_to_nothing_on_population_statistics(net, batches) -> None:
    net.bn2.reset_running_stats()
    passes = passes_of(net, batches)
    assert outstanding(passes.run(Basis("stored")), Basis("stored")) > 0.1
    batchnorm.recalibrate(net, batches)
    assert outstanding(passes.run(Basis("stored")), Basis("stored")) < 1e-6
