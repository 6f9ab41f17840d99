"""What norms meet is measured by the backend that dispatch chooses."""

from __future__ import annotations

import pytest
import torch

import batchnorm
from batchnorm.errors import InputError
from batchnorm.functional import dispatch, register, unregister, use_backend
from batchnorm.kernels import Reference
from batchnorm.kernels.native import NATIVE, missing
from batchnorm.moments import Moments
from batchnorm.statistics import collect
from batchnorm.statistics.collect import moments_of

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


@needs_native
def test_a_forced_backend_that_cannot_measure_says_so():
    x, mask = torch.ones(4, 2), torch.tensor([True, True, True, False])
    with use_backend("native"), pytest.raises(InputError, match=r"use_backend\('native'\) .*: it takes no mask"):
        moments_of(x, mask)
    assert dispatch.choose_split(dispatch.Request(x, mask=mask)).name == "reference"


@pytest.mark.parametrize("masked", [False, True])
def test_the_reference_takes_large_inputs_in_parts(masked, served, monkeypatch):
    monkeypatch.setattr(collect, "_CHUNK", 40)
    x = torch.randn(10, 3, 5, generator=torch.Generator().manual_seed(0)) + 7
    mask = torch.rand(10, 5, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    with use_backend("reference"):
        found = moments_of(x, mask)
    exact = Moments.of(x, mask=mask)
    assert served == ["reference"] * 5
    torch.testing.assert_close([found.count, found.mean, found.m2], [exact.count, exact.mean, exact.m2])
