"""In ``torch.inference_mode`` the same is measured, wherever model and batches were made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.statistics.sequential.networks import assert_alike, images, network
from torch import Tensor

from batchnorm.statistics import recalibrate, update_bn

OPTIONS: list[dict[str, Any]] = [{}, {"order": "parallel"}, {"memory": 0}, {"memory": 1000, "cache": True}]


@pytest.mark.every(3)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model_made_inside", [True, False])
def test_it_measures_the_same(options: dict[str, Any], model_made_inside: bool, tmp_path: Any) -> None:
    if options.get("cache"):
        options = options | {"cache": tmp_path}
    reference, batches = network(), images(*[4] * 20)
    recalibrate(reference, batches, **{k: v for k, v in options.items() if k == "order"})
    before: dict[str, Tensor] = dict(network().named_buffers())
    model = network()
    with torch.inference_mode():
        if model_made_inside:
            model = network()
        result = recalibrate(model, [batch.clone() for batch in batches], **options)
        assert_alike(model, reference)
        result.undo()
        torch.testing.assert_close(dict(model.named_buffers()), before)
        update_bn(batches, model, **options)
    assert_alike(model, reference)
