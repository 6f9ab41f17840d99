"""The moments of a batch, by the backend that dispatch chooses."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from batchnorm.errors import InputError
from batchnorm.functional import dispatch, measure, moments, use_backend
from batchnorm.functional.measure import moments_of
from batchnorm.kernels import Reference
from batchnorm.kernels.native import missing
from batchnorm.moments import Moments


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + 7


def half_of(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.7


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_moments_are_those_of_the_batch(backend):
    x, mask = numbers(4, 3, 5).requires_grad_(), half_of(4, 5)
    with nullcontext() if backend is None else use_backend(backend):
        plain, masked = moments(x), moments(x, mask)
    assert torch.equal(plain.mean, Moments.of(x).mean)
    assert torch.equal(masked.m2, Moments.of(x, mask=mask).m2)
    assert not plain.mean.requires_grad


def test_moments_refuse_what_has_no_channels():
    with pytest.raises(InputError, match=r"moments: expected an input of shape \(N, C\)"):
        moments(torch.zeros(3))
    with pytest.raises(InputError, match=r"moments: expected a floating-point input; got torch.int64"):
        moments(torch.zeros(3, 2).long())


@pytest.mark.skipif(missing is not None, reason="there are no native kernels here")
def test_small_inputs_are_the_references_unless_any_size_is_asked_for(monkeypatch):
    monkeypatch.setattr(Reference, "moments", lambda *_: "reference")
    assert moments(numbers(4, 3)) == "reference"
    assert moments_of(numbers(4, 3), None) != "reference"


@pytest.mark.skipif(missing is not None, reason="there are no native kernels here")
def test_a_forced_backend_that_cannot_measure_says_so():
    x, mask = torch.ones(4, 2), torch.tensor([True, True, True, False])
    for measured in (moments, moments_of):
        with use_backend("native"), pytest.raises(InputError, match=r"use_backend\('native'\) .*: it takes no mask"):
            measured(x, mask)
    assert dispatch.choose_split(dispatch.Request(x, mask=mask)).name == "reference"


@pytest.mark.parametrize("masked", [False, True])
def test_the_reference_takes_large_inputs_in_parts(masked, monkeypatch):
    sizes, of_the_reference = [], Reference.moments

    def noted(self, x, mask=None):
        sizes.append(len(x))
        return of_the_reference(self, x, mask)

    monkeypatch.setattr(Reference, "moments", noted)
    monkeypatch.setattr(measure, "_CHUNK", 40)
    x, mask = numbers(10, 3, 5), half_of(10, 5) if masked else None
    with use_backend("reference"):
        found = moments(x, mask)
    exact = Moments.of(x, mask=mask)
    assert sizes == [2] * 5
    torch.testing.assert_close([found.count, found.mean, found.m2], [exact.count, exact.mean, exact.m2])
