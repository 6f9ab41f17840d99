"""What is said when a model fails on a batch: which one, why, and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from batchnorm.errors import ArgumentTypeError, BatchError, BatchNormError, NonFiniteError
from batchnorm.models.calling import call_on_batch
from batchnorm.statistics.failures import explained

MODEL = nn.Sequential(nn.BatchNorm1d(2))


def said(error: Exception, batch: Any = None, call: Any = call_on_batch, model: nn.Module = MODEL) -> BatchNormError:
    return explained("measure", error, model, 3, torch.ones(2) if batch is None else batch, call)


def test_an_error_of_the_model_names_model_batch_and_cause() -> None:
    error = said(ValueError("first line\nsecond line"))
    assert type(error) is BatchError
    assert str(error) == (
        "measure: Sequential failed on batch 3 (counting from 0): ValueError: first line. The model is as it was."
    )


def test_a_call_that_does_not_fit_the_batch_says_how_batches_are_called() -> None:
    error = said(TypeError("forward() got an unexpected keyword argument 'image'"))
    assert "a dict every entry; forward=lambda model, batch: ... calls the model in another way." in str(error)
    by_hand = said(TypeError("no"), call=lambda model, batch: model(batch))  # who calls it himself knows
    assert "forward=" not in str(by_hand)
    assert "forward=" not in str(said(ValueError("no")))


def test_a_norm_in_half_precision_is_named() -> None:
    error = said(
        RuntimeError("expected scalar type Float"), model=nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).half())
    )
    assert "1 holds half precision" in str(error)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"a": [1, "text", x]}, lambda x: (torch.zeros(1), x)])
def test_where_values_that_are_not_finite_came_from(value: float, wrap: Any) -> None:
    met = NonFiniteError("0 met NaN or infinity in 1 of its 2 channels")
    came = said(met, wrap(torch.tensor([1.0, value])))
    assert type(came) is NonFiniteError
    assert str(came) == (
        "measure: batch 3 (counting from 0): 0 met NaN or infinity in 1 of its 2 channels. The batch itself holds such "
        "values: remove them from the data. The model is as it was."
    )
    made = said(met, wrap(torch.tensor([1, 2])))  # whole numbers are finite
    assert str(made).endswith("The batch is finite, so a layer before this one made them. The model is as it was.")


def test_a_batch_of_a_type_that_cannot_be_used_keeps_its_sentence() -> None:
    error = said(ArgumentTypeError("of type str. Pass forward=."))
    assert type(error) is ArgumentTypeError
    assert str(error) == "measure: batch 3 (counting from 0): of type str. Pass forward=."
