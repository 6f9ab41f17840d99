"""What a cure would bring, tried on another basis."""

from __future__ import annotations

from tests.diagnosis.conftest import passes_of

import batchnorm
from batchnorm.diagnosis.norm_record import Basis
from batchnorm.diagnosis.trial import outstanding


def test_what_is_outstanding_falls_to_nothing_on_population_statistics(net, batches) -> None:
    net.bn2.reset_running_stats()
    passes = passes_of(net, batches)
    assert outstanding(passes.run(Basis("stored")), Basis("stored")) > 0.1
    batchnorm.recalibrate(net, batches)
    assert outstanding(passes.run(Basis("stored")), Basis("stored")) < 1e-6
