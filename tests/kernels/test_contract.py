from __future__ import annotations

import pytest
import torch

from batchnorm.kernels.contract import Backend, Gradients, Reduced, Transform, normalizers
from batchnorm.moments import Moments


class Recorder(Backend):
    """Knows the split phases only, and notes what they are given."""

    name = "recorder"

    def __init__(self):
        self.calls = []

    def refusal(self, request):
        return None

    def moments(self, x, mask=None):
        self.calls.append(("moments", mask))
        return Moments.of(x, mask=mask)

    def normalize(self, x, transform):
        self.calls.append(("normalize", transform))
        return x

    def backward_reduce(self, dy, x, transform):
        self.calls.append(("backward_reduce", transform))
        return Reduced(*[torch.ones(x.shape[1], dtype=torch.float64)] * 3)

    def backward_input(self, dy, x, transform, reduced):
        self.calls.append(("backward_input", reduced))
        return Gradients(dy, None)


def test_the_fused_phases_are_made_of_the_split_ones():
    backend, x = Recorder(), torch.tensor([[1.0], [3.0]])
    nothing = torch.empty(0)
    weight, mask = torch.ones(1), torch.ones(2, 1, dtype=torch.bool)
    y, moments = backend.train_forward(x, Transform(nothing, nothing, weight, activation="relu", mask=mask), eps=0.25)
    (_, given_mask), (_, given) = backend.calls
    assert y is x
    assert moments.mean.tolist() == [2.0]
    assert given_mask is mask
    assert given.mean.tolist() == [2.0]
    assert given.rstd.tolist() == [1.25**-0.5]
    assert given.weight is weight
    assert given.activation == "relu"
    assert given.mask is mask

    backend.calls.clear()
    gradients, reduced = backend.train_backward(x, x, given)
    assert [name for name, _ in backend.calls] == ["backward_reduce", "backward_input"]
    assert backend.calls[1][1] is reduced
    assert gradients.input is x


def test_normalizers_use_the_biased_variance():
    moments = Moments.of(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    mean, rstd = normalizers(moments, 3.0)  # variances 1 and 0
    assert mean.tolist() == [2.0, 5.0]
    assert rstd.tolist() == [0.5, pytest.approx(3**-0.5, rel=1e-15)]


def test_a_channel_without_values_has_variance_zero():
    mean, rstd = normalizers(Moments.zero(2), 0.25)
    assert mean.tolist() == [0.0, 0.0]
    assert rstd.tolist() == [2.0, 2.0]
