"""One pass on a chosen basis: what norms normalize by, and what is told of each call."""

from __future__ import annotations

import torch
from tests.diagnosis.conftest import passes_of

from batchnorm.diagnosis.norm_record import Basis


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
