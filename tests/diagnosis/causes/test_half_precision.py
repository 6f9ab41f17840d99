from __future__ import annotations

import pytest
import torch

import batchnorm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_that_went_through_half_precision_is_a_note(net, batches, dtype: torch.dtype) -> None:
    net.load_state_dict({k: v.to(dtype).to(v.dtype) for k, v in net.state_dict().items()})
    result = batchnorm.diagnose(net, batches)
    assert result.healthy
    assert [(note.cause, note.layer) for note in result.notes] == [("half_precision", "bn1")]
    assert "Nothing wrong found" in str(result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_that_is_felt_is_a_fault(net, found, batches, dtype: torch.dtype) -> None:
    """A mean of a hundred standard deviations keeps two or three digits of what matters."""
    net.bn2.register_forward_pre_hook(lambda module, args: (args[0] + 2000,))
    batchnorm.recalibrate(net, batches)
    net.bn2.running_mean.copy_(net.bn2.running_mean.to(dtype))
    net.bn2.running_var.copy_(net.bn2.running_var.to(dtype))
    assert found(net) == [("half_precision", "bn2")]


def test_a_model_in_bfloat16(net, found, batches) -> None:
    result = found(net.bfloat16(), [batch.bfloat16() for batch in batches])
    assert result == [("half_precision", "bn1")]


def test_a_model_in_bfloat16_with_norms_in_float32(net, found, batches) -> None:
    net.bfloat16()
    torch.manual_seed(0)
    for norm in (net.bn1, net.bn2, net.bn3, net.bn4):
        norm.float()
        # what was rounded once stays rounded: take off the last bits of a value that was not
        norm.running_mean.mul_(1 + 1e-4 * torch.rand(norm.num_features))
        norm.running_var.mul_(1 + 1e-4 * torch.rand(norm.num_features))
    assert found(net, [batch.bfloat16() for batch in batches], forward=_in_bfloat16) == []


def _in_bfloat16(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return model(batch)


@pytest.mark.every(3)
@pytest.mark.parametrize("value", [5.0, 0.375, -96.0])
@pytest.mark.parametrize("variance", [None, 2.0])
def test_numbers_written_by_hand_were_not_rounded(net, found, value: float, variance: float | None) -> None:
    net.bn2.running_mean.fill_(value)
    if variance is not None:
        net.bn2.running_var.fill_(variance)
    assert ("stale", "bn2") in found(net)
    assert "half_precision" not in [cause for cause, _ in found(net)]


def test_one_number_in_every_channel_is_no_rounding(net, found) -> None:
    net.bn2.running_mean.fill_(1.0078125)  # all eight bits of bfloat16
    net.bn2.running_var.fill_(2.015625)
    assert "half_precision" not in [cause for cause, _ in found(net)]
