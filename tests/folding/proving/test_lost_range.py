from __future__ import annotations

import json
import re

import pytest
import torch
from tests.folding.scaled_layers import CONV, HOSTS, layer_of, norm_of, randn
from torch import nn

from batchnorm.errors import StateError
from batchnorm.folding.fold import fold

HALF = torch.finfo(torch.float16)
U = HALF.eps / 2


def folded(layers, x, **options):
    return fold(nn.Sequential(*layers).eval(), x, **options)


@pytest.mark.parametrize("name", HOSTS)
def test_the_channel_that_shrinks_is_named(name):
    make, shape, kind = HOSTS[name]
    layer = layer_of(make, torch.float16)
    result = folded([layer, norm_of(kind, [1.0, 0.5, 1e-6, 2.0])], randn(*shape, dtype=torch.float16))
    assert [f.norm for f in result.folded] == ["1"]
    (loss,) = result.lost
    assert (loss.parameter, loss.dtype, loss.channels) == ("0.weight", "float16", 4)
    (channel,) = loss.lost
    assert channel.channel == 2
    assert channel.fallen == 1.0
    assert 0.1 <= channel.before <= 1
    assert channel.after == pytest.approx(1e-6 * channel.before, rel=1e-6)


def test_the_error_is_that_of_what_is_stored():
    layer = layer_of(CONV[0], torch.float16)
    result = folded([layer, norm_of(CONV[2], [1.0, 0.5, 1e-6, 3e-9])], randn(*CONV[1], dtype=torch.float16))
    channels = {c.channel: c for c in result.lost[0].lost}
    assert list(channels) == [3, 2]  # the worst one first
    assert channels[3].error == 1.0  # nothing is left
    scale = torch.tensor([1e-6], dtype=torch.float32).double()
    exact = scale * layer.weight[2].detach().double()
    gap = (result.model[0].weight[2].detach().double() - exact).norm() / exact.norm()
    assert channels[2].error == pytest.approx(float(gap), rel=1e-6)
    assert channels[2].error > U


@pytest.mark.parametrize("seed", range(5))
def test_channels_in_range_never_err_by_more_than_the_roundoff(seed):
    # the smallest merged weight is 0.1 · 2⁻¹⁰ > λ = 2⁻¹⁴
    layer = layer_of(CONV[0], torch.float16, seed)
    gammas = [2.0**-10, 0.7, -(2.0**-9), 3.3]
    assert not folded([layer, norm_of(CONV[2], gammas)], randn(*CONV[1], dtype=torch.float16)).lost


def test_a_few_small_elements_beside_larger_ones_are_no_loss():
    layer = layer_of(CONV[0], torch.float16)
    layer.weight.data[1, 0, 0, 0] = 2.0**-14
    result = folded([layer, norm_of(CONV[2], [1.0, 0.3, 1.0, 1.0])], randn(*CONV[1], dtype=torch.float16))
    stored = result.model[0].weight[1].detach()
    assert 0 < float(stored.abs().min()) < HALF.smallest_normal
    assert not result.lost


def test_channels_of_zeros_lose_nothing():
    layer = layer_of(CONV[0], torch.float16)
    result = folded([layer, norm_of(CONV[2], [1.0, 0.0, 1.0, 0.0])], randn(*CONV[1], dtype=torch.float16))
    assert not result.model[0].weight[1].any()
    assert not result.lost
    assert result.warnings == []


def test_what_was_subnormal_before_is_not_lost_by_folding():
    layer = layer_of(CONV[0], torch.float16)
    layer.weight.data[1] = 5 * HALF.smallest_normal * HALF.eps
    result = folded([layer, norm_of(CONV[2], [1.0, 0.3, 1.0, 1.0])], randn(*CONV[1], dtype=torch.float16))
    assert not result.lost


def test_tiny_variance_with_a_tiny_gamma_is_in_range_and_with_a_big_one_overflows():
    def fold_with(gamma):
        layer = layer_of(CONV[0], torch.float16)
        norm = norm_of(CONV[2], [gamma] * 4)
        norm.running_var.fill_(1e-12)
        return folded([layer, norm], 1e-6 * randn(*CONV[1], dtype=torch.float16))

    assert not fold_with(1e-6).lost
    broken = fold_with(1e3)
    assert broken.left[0].reason == "The merged weight of 0 would overflow float16."
    assert not broken.lost


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1e-20), (torch.float32, 1e-20)])
def test_types_with_the_range_of_float32_keep_it(dtype, scale):
    layer = layer_of(CONV[0], dtype)
    assert not folded([layer, norm_of(CONV[2], [1.0, scale, 1.0, 1.0])], randn(*CONV[1], dtype=dtype)).lost


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_types_with_the_range_of_float32_lose_it_beyond(dtype):
    layer = layer_of(CONV[0], dtype)
    (loss,) = folded([layer, norm_of(CONV[2], [1.0, 1e-38, 1.0, 1.0])], randn(*CONV[1], dtype=dtype)).lost
    assert (loss.dtype, [c.channel for c in loss.lost]) == (str(dtype).removeprefix("torch."), [1])


def test_rows_of_embeddings_are_rounded_as_the_norm_rounds():
    table = layer_of(lambda: nn.Embedding(7, 4), torch.float16)
    tokens = torch.arange(7).repeat(2)
    norm = norm_of(nn.BatchNorm1d, [1.0, 1e-6, 1.0, 1.0])
    before = norm.eval()(table(tokens)).detach()
    result = folded([table, norm], tokens)
    assert not result.lost
    # one rounding each, of numbers whose own roundings are up to uλ
    gap = (result.model(tokens).detach()[:, 1] - before[:, 1]).abs().max()
    assert float(gap) <= 2 * U * HALF.smallest_normal
    assert result.ranges == []


def test_a_map_absorbed_on_the_input_side_is_told_per_output_channel():
    norm = norm_of(nn.BatchNorm1d, [1e-6, 1e-6, 1.0])
    layer = layer_of(lambda: nn.Linear(3, 4), torch.float16)
    layer.weight.data[2, 2] = 0.0  # reads only what shrinks
    layer.bias.data.zero_()
    (loss,) = folded([norm, layer], randn(6, 3, dtype=torch.float16)).lost
    (channel,) = loss.lost
    assert (loss.parameter, loss.channels, channel.channel) == ("1.weight", 4, 2)
    assert channel.fallen == pytest.approx(2 / 3)


def test_a_norm_as_the_host():
    first, second = norm_of(nn.BatchNorm1d, [1e-3, 0.5]).half(), norm_of(nn.BatchNorm1d, [1e-3, 1.0]).half()
    (loss,) = folded([first, second], randn(6, 2, dtype=torch.float16)).lost
    assert (loss.parameter, loss.channels, [c.channel for c in loss.lost]) == ("1.weight", 2, [0])


def chain():
    """Two norms around one layer, the second of which shrinks it, and one elsewhere."""
    layers = [
        norm_of(nn.BatchNorm1d, [2.0, 0.5, 1.0, 1.0, 1.0]),
        layer_of(lambda: nn.Linear(5, 4), torch.float16),
        norm_of(nn.BatchNorm1d, [1.0, 1.0, 1e-6, 1.0]),
        nn.Tanh(),
        layer_of(lambda: nn.Linear(4, 3), torch.float16),
        norm_of(nn.BatchNorm1d, [1.0, 1.0, 1.0]),
    ]
    return nn.Sequential(*layers).eval()


X = randn(6, 5, dtype=torch.float16)


def test_keeping_the_range_leaves_the_norm_that_shrinks_and_says_why():
    net = chain()
    plain, kept = fold(net, X), fold(net, X, keep_range=True)
    assert [f.norm for f in plain.folded] == ["0", "2", "5"]
    assert [f.norm for f in kept.folded] == ["0", "5"]
    assert not kept.lost
    (left,) = kept.left
    assert str(left) == f"2 → 1: not folded. Folded, {plain.lost[0]}"
    channel = plain.lost[0].lost[0]
    assert plain.warnings == [
        "1 of 4 channels of 1.weight loses range in float16: the largest weight of channel 2 goes from "
        f"{channel.before:.2g} to {channel.after:.2g}, and 100 % of its weights fall below the smallest normal number, "
        "6.1e-05."
    ]


def test_reports_have_the_warnings():
    result = fold(chain(), X)
    assert "Lost range" in str(result)
    assert "keep_range=True" in str(result)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["warnings"] == result.warnings
    assert data["lost"][0]["lost"][0]["channel"] == 2
    assert "Lost range" not in str(fold(chain(), X, keep_range=True))


def test_the_normalization_of_the_input_is_called_by_its_names():
    net = nn.Sequential(layer_of(lambda: nn.Linear(3, 4), torch.float16)).eval()
    net[0].weight.data.mul_(2.0**-6)
    options = {"input_mean": 0.0, "input_std": 255.0}
    x = 255 * randn(6, 3, dtype=torch.float16)
    (loss,) = fold(net, x, **options).lost
    assert loss.parameter == "0.weight"
    with pytest.raises(StateError, match=re.escape(f"cannot be folded. Folded, {loss}")):
        fold(net, x, keep_range=True, **options)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_models_without_values_or_channels():
    meta = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().to("meta")
    assert fold(meta, torch.empty(2, 3, 6, 6, device="meta"), keep_range=True).lost == []
    empty = nn.Sequential(nn.Linear(0, 4), nn.BatchNorm1d(4)).eval().half()
    result = fold(empty, torch.empty(6, 0, dtype=torch.float16), keep_range=True)
    assert [f.norm for f in result.folded] == ["1"]
    assert (result.lost, result.ranges) == ([], [])
