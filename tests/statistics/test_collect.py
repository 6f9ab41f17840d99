"""What norms meet is measured by the backend that dispatch chooses."""

from __future__ import annotations

import pytest
import torch

import batchnorm
from batchnorm.functional import register, unregister, use_backend
from batchnorm.kernels import Reference
from batchnorm.kernels.native import NATIVE, missing

needs_native = pytest.mark.skipif(missing is not None, reason="there are no native kernels here")


@pytest.fixture
def served(monkeypatch):
    """The names of the backends that have measured, in order."""
    names = []

    def noted(cls):
        measure = cls.moments

        def moments(self, x, mask=None):
            names.append(self.name)
            return measure(self, x, mask)

        monkeypatch.setattr(cls, "moments", moments)

    noted(type(NATIVE))
    noted(Reference)
    return names


VERBS = {
    "recalibrate": lambda model, batches: batchnorm.recalibrate(model, batches),
    "recalibrate, parallel": lambda model, batches: batchnorm.recalibrate(model, batches, order="parallel"),
    "diagnose": lambda model, batches: batchnorm.diagnose(model, batches),
}


@needs_native
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("backend", [None, "native", "reference", "torch"])
def test_verbs_measure_by_the_backend_that_the_user_asks_for(verb, backend, served):
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    batches = [torch.randn(16, 3, generator=generator) for _ in range(3)]
    if backend is None:
        VERBS[verb](model, batches)
    else:
        with use_backend(backend):
            VERBS[verb](model, batches)
    # torch's own has no phases, so that the choice is as free as if nothing were forced
    assert set(served) == {"reference" if backend == "reference" else "native"}


def test_a_registered_backend_measures_for_recalibrate():
    class Counting(Reference):
        name, calls = "counting", 0

        def moments(self, x, mask=None):
            type(self).calls += 1
            return super().moments(x, mask)

    register(Counting())
    try:
        batchnorm.recalibrate(torch.nn.Sequential(torch.nn.BatchNorm1d(2)), [torch.randn(4, 2)])
    finally:
        unregister("counting")
    assert Counting.calls > 0
