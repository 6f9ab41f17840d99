"""Where a result says it comes from."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.nn.provenance import describe, saw, with_provenance
from batchnorm.report import Result


@dataclass
class Outcome(Result):
    batches: int = 0
    model: nn.Module | None = None

    def document(self):
        raise NotImplementedError

    def to_dict(self):
        raise NotImplementedError


def verb(**of):
    @with_provenance("verb", **of)
    def call(model, batches=(), example_inputs=None, result=None):
        for batch in batches:
            saw(batch)
        if isinstance(model, nn.Sequential):
            model.append(nn.BatchNorm1d(3))
        return result or Outcome(len(batches))

    return call


def test_the_model_is_described_as_it_was_before_the_verb():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    told = verb()(net).provenance
    assert (told.call, told.model, told.device) == ("batchnorm.verb", "Sequential, 18 parameters, 1 norm", "cpu")
    assert describe(net)[0] == "Sequential, 24 parameters, 2 norms"


def test_data_are_the_first_batch_the_count_and_the_example():
    batches = [(torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64)), (torch.zeros(2, 3), None)]
    told = verb()(nn.Identity(), batches, example_inputs=torch.zeros(1, 3)).provenance
    assert told.data == "example inputs float32 (1, 3); 2 batches; the first batch float32 (8, 3), int64 (8,)"
    assert verb()(nn.Identity(), batches[1:]).provenance.data == "1 batch; the first batch float32 (2, 3)"
    five = [torch.zeros(1)] * 5
    assert verb()(nn.Identity(), [five]).provenance.data.endswith("float32 (1,), …")


def test_a_verb_within_a_verb_sees_its_own_batches():
    inner = verb()

    @with_provenance("outer")
    def outer(model, batches):
        inner(model, [torch.zeros(5)])
        saw(batches[0])
        inner(model, [torch.zeros(6)])
        return Outcome(1)

    assert outer(nn.Identity(), [torch.zeros(7)]).provenance.data == "1 batch; the first batch float32 (7,)"
    saw(torch.zeros(1))  # outside of any verb: nobody asks


def test_what_is_no_model_is_described_by_the_results():
    result = Outcome(model=nn.BatchNorm1d(2))
    assert verb()("a path", result=result).provenance.model == "BatchNorm1d, 4 parameters, 1 norm"
    assert describe("a path") == ("", "")
    holder = type("Holder", (), {"net": nn.BatchNorm1d(2)})()
    assert verb(of=lambda holder: holder.net)(holder).provenance.model == "BatchNorm1d, 4 parameters, 1 norm"


def test_wrong_arguments_are_the_functions_to_refuse():
    with pytest.raises(TypeError, match="unexpected keyword argument 'strange'"):
        verb()(nn.Identity(), strange=1)


def test_lazy_parameters_are_not_counted():
    assert describe(nn.LazyLinear(3))[0] == "LazyLinear, 0 parameters, 0 norms"


def test_the_verbs_of_the_library_tell_it():
    net = nn.Sequential(nn.BatchNorm1d(2))
    told = batchnorm.recalibrate(net, [torch.randn(4, 2, generator=torch.Generator().manual_seed(0))]).provenance
    assert (told.call, told.model) == ("batchnorm.recalibrate", "Sequential, 4 parameters, 1 norm")
    assert "the first batch float32 (4, 2)" in told.data
