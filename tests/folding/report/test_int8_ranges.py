from __future__ import annotations

import json
import math

import pytest
import torch
from tests.folding.scaled_layers import HOSTS, layer_of, norm_of, randn
from torch import nn

from batchnorm.folding.fold import fold
from batchnorm.folding.report.int8_ranges import Int8, Ranges


def rows(seed=0):
    scales = torch.tensor([[1.0], [0.1], [4.0], [1e-3], [0.0]])
    return scales.double() * randn(5, 60, seed=seed).double()


def by_hand(channels, steps):
    """The weight in int8, number by number."""
    return torch.tensor(
        [[step * round(float(w) / step) for w in row] for row, step in zip(channels, steps, strict=True)]
    )


@pytest.mark.parametrize("per_channel", [False, True])
def test_errors_are_those_of_the_rounded_weight(per_channel):
    channels = rows()
    largest = [float(row.abs().max()) or 1.0 for row in channels] if per_channel else [float(channels.abs().max())] * 5
    gap = by_hand(channels, [size / 127 for size in largest]).double() - channels
    errors = [float(g.norm() / c.norm()) for g, c in zip(gap[:4], channels[:4], strict=True)]
    got = Int8.of(channels, per_channel=per_channel)
    assert got.worst_error == pytest.approx(max(errors), rel=1e-6)
    assert got.worst_channel == errors.index(max(errors))
    assert got.typical_error == pytest.approx(sum(sorted(errors)[1:3]) / 2, rel=1e-6)
    assert got.snr == pytest.approx(10 * math.log10(float(channels.square().sum() / gap.square().sum())), rel=1e-6)
    assert got.vanished == (0 if per_channel else 1)


def test_one_scale_for_each_channel_does_not_depend_on_the_sizes_of_channels():
    plain = randn(5, 60).double()
    stretched = plain * torch.tensor([1.0, 1e-6, 30.0, 2.0, 0.5]).double().unsqueeze(1)
    one, other = (Int8.of(channels, per_channel=True) for channels in (plain, stretched))
    assert one.worst_error == pytest.approx(other.worst_error, rel=1e-9)
    assert Int8.of(stretched, per_channel=False).vanished == 1
    assert Int8.of(plain, per_channel=False).vanished == 0


def test_what_int8_holds_exactly_has_no_error():
    whole = torch.tensor([[127.0, -3.0], [0.0, 5.0]], dtype=torch.float64)
    assert Int8.of(whole, per_channel=False) == Int8(None, 0.0, 0.0, 0, 0)


def test_spread_is_over_the_median_of_channels_that_are_not_zero():
    channels = torch.tensor([[8.0, -1.0], [-2.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    got = Ranges.of(channels)
    assert got.largest == (8.0, 2.0, 1.0, 0.0)
    assert got.spread == 4.0
    assert Ranges.of(torch.zeros(3, 2, dtype=torch.float64)).spread == 1.0


@pytest.mark.parametrize("name", HOSTS)
def test_folding_multiplies_the_range_of_each_output_channel(name):
    make, shape, kind = HOSTS[name]
    gammas = [1.0, -0.5, 0.25, 16.0]
    result = fold(nn.Sequential(layer_of(make, torch.float32), norm_of(kind, gammas)).eval(), randn(*shape))
    (ranges,) = result.ranges
    assert ranges.parameter == "0.weight"
    expected = [abs(g) * size for g, size in zip(gammas, ranges.before.largest, strict=True)]
    assert ranges.after.largest == pytest.approx(expected, rel=1e-6)
    assert ranges.after.spread > ranges.before.spread
    assert ranges.after.per_tensor.typical_error > ranges.after.per_channel.typical_error
    assert ranges.margin == max(ranges.after.largest) / torch.finfo(torch.float32).max


def pair(channels=4):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels)).eval()
    net[1].weight.data.uniform_(0.1, 5)
    return net


X = randn(2, 3, 6, 6)


def test_reports_tell_of_the_ranges(tmp_path):
    result = fold(pair(), X)
    text = str(result)
    assert "Channel ranges, for int8" in text
    assert "the typical channel of 0.weight is off by" in " ".join(text.split())
    (data,) = json.loads(json.dumps(result.to_dict(), allow_nan=False))["ranges"]
    assert data["after"]["channels"] == 4
    assert data["after"]["per_channel"]["worst_error"] == result.ranges[0].after.per_channel.worst_error
    page = result.to_html(tmp_path / "fold.html").read_text()
    assert "Channel ranges of 0.weight" in page


def test_one_channel_has_nothing_to_be_compared_with():
    assert "int8" not in str(fold(pair(channels=1), X))


def test_the_table_has_the_weights_that_one_scale_costs_most(tmp_path):
    net = nn.Sequential(*(layer for _ in range(7) for layer in pair(3))).eval()
    for i, norm in enumerate(net[1::2]):
        norm.weight.data.copy_(torch.tensor([1.0, 1.0, 10.0**i]))
    result = fold(net, randn(1, 3, 20, 20))
    assert len(result.ranges) == 7
    page = result.to_html(tmp_path / "fold.html").read_text()
    assert "5 of 7 weights" in page
    shown = page[page.index("Channel ranges") :]
    assert ">12.weight<" in shown
    assert ">0.weight<" not in shown
    assert "5 of 7 weights" not in str(result)  # a terminal shows the sentence only


def test_ranges_are_measured_once_and_before_and_after_in_place():
    net = pair()
    before = net[0].weight.detach().clone()
    result = fold(net, X, inplace=True)
    assert result.ranges is result.ranges
    assert result.ranges[0].before.largest == tuple(before.flatten(1).abs().amax(1).tolist())
    assert result.ranges[0].after.largest == tuple(net[0].weight.detach().flatten(1).abs().amax(1).tolist())


def test_the_normalization_of_the_input_is_in_the_range_of_the_first_layer():
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    (ranges,) = fold(net, 255 * X, input_mean=0.0, input_std=[1.0, 10.0, 100.0]).ranges
    assert ranges.parameter == "0.weight"
    scaled = net[0].weight.detach() / torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1)
    assert ranges.after.largest == pytest.approx(scaled.abs().flatten(1).amax(1).tolist(), rel=1e-6)
