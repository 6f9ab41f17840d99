from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("layer", ["conv2", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("fc3", "fc4"))])
def test_the_layer_whose_weights_changed_is_named_first(net, batches, layer: str) -> None:
    import batchnorm

    g = torch.Generator().manual_seed(1)
    weight = net.get_submodule(layer).weight
    with torch.no_grad():
        weight.add_(1.5 * weight.std() * torch.randn(weight.shape, generator=g))
    (finding,) = batchnorm.diagnose(net, batches).findings
    assert finding.cause == "stale"
    assert finding.layer == f"bn{layer[-1]}"
