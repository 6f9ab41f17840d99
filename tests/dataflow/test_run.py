"""A model run on its examples: nothing is left behind, and each run is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.dataflow.run import as_float64, of_runs, run
from batchnorm.errors import InputError
from batchnorm.models.outputs import NamedTensor
from batchnorm.models.several import Several


class Writes(nn.Module):
    """Counts its calls, and writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return {"sum": x.add_(1).sum(), "drawn": torch.rand(3)}


def test_model_inputs_and_generators_stay_as_they_are():
    model, x = Writes(), torch.zeros(4)
    generators = torch.get_rng_state()
    outputs = run(model, x)
    assert [float(o.tensor.sum()) for o in outputs if "sum" in o.where] == [4.0]
    assert (float(model.calls), x.tolist()) == (0.0, [0.0] * 4)
    assert torch.equal(torch.get_rng_state(), generators)


def test_the_number_of_a_run_decides_what_is_drawn():
    drawn = [run(Writes(), torch.zeros(1), number)[-1].tensor for number in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_outputs_of_several_runs_are_named_but_for_the_first():
    one = NamedTensor("the output", torch.zeros(1))
    inputs = Several([torch.zeros(1), torch.zeros(2)], ["as given", "a batch of 2"])
    assert [o.where for o in of_runs([[one], [one]], inputs)] == ["the output", "the output on a batch of 2"]
    found = run(nn.Identity(), inputs)
    assert [o.tensor.shape for o in found] == [(1,), (2,)]
    assert found[1].where.endswith(" on a batch of 2")


def test_a_model_that_fails_says_so():
    with pytest.raises(InputError, match="Linear"):
        run(nn.Linear(3, 2), torch.zeros(1, 4))


def test_only_floating_point_and_complex_tensors_are_widened():
    given = {
        "x": torch.zeros(1),
        "ids": torch.zeros(1, dtype=torch.int64),
        "c": torch.zeros(1, dtype=torch.complex64),
        "n": 3,
    }
    wide = as_float64(given)
    assert (wide["x"].dtype, wide["ids"].dtype, wide["c"].dtype) == (torch.float64, torch.int64, torch.complex128)
    assert wide["n"] == 3
    several = as_float64(Several([torch.zeros(1)], ["as given"]))
    assert isinstance(several, Several)
    assert [x.dtype for x in several] == [torch.float64]
