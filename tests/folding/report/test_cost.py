"""What a pass costs, beside torch's own count and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from batchnorm.dataflow.trace import trace
from batchnorm.folding.report.cost import Cost, border_bytes, multiply_adds
from batchnorm.nn.bordered import bordered

IMAGE = torch.ones(2, 4, 9, 8)


@pytest.mark.parametrize(("layer", "x"), [
    (nn.Conv2d(4, 6, 3), IMAGE),
    (nn.Conv2d(4, 6, (3, 1), stride=2, padding=1, dilation=2), IMAGE),
    (nn.Conv2d(4, 8, 3, groups=4, bias=False), IMAGE),
    (nn.Conv1d(4, 6, 3, padding="same"), torch.ones(2, 4, 9)),
    (nn.Conv3d(4, 6, 2), torch.ones(1, 4, 5, 6, 7)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2), IMAGE),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), IMAGE),
    (nn.Linear(8, 3), IMAGE),
    (nn.Linear(8, 3), torch.ones(5, 8)),
])  # fmt: skip
def test_multiply_adds_of_layers_are_half_of_torchs_operations(layer: nn.Module, x: torch.Tensor) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    (call,) = [c for c in trace(layer, x).calls if c.name in ("linear",) or "conv" in c.name]
    assert 2 * multiply_adds(call) == counter.get_total_flops() > 0


def test_a_picture_without_a_batch_axis_costs_as_much_as_a_batch_of_one() -> None:
    layer = nn.Conv2d(4, 6, 3)
    alone, batch = (trace(layer, x).calls[0] for x in (IMAGE[0], IMAGE[:1]))
    assert multiply_adds(alone) == multiply_adds(batch)


def test_a_norm_costs_one_for_each_element_and_anything_else_nothing() -> None:
    calls = trace(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).eval(), IMAGE).calls
    assert [multiply_adds(call) for call in calls] == [IMAGE.numel(), 0]


def test_the_cost_of_a_model() -> None:
    shared = nn.Conv2d(4, 4, 1, bias=False)
    net = nn.Sequential(shared, nn.BatchNorm2d(4), shared, nn.Flatten(), nn.Linear(288, 2)).eval()
    cost = Cost.of(net, trace(net, IMAGE))
    assert cost.operators == {"conv2d": 2, "batch_norm": 1, "flatten": 1, "linear": 1}
    assert cost.calls == 5
    assert cost.layers == 2 * IMAGE.numel() * 4 + 2 * 288 * 2
    assert cost.norms == IMAGE.numel()
    assert cost.biases == 4
    assert (cost.parameters, cost.buffers) == (16 + 8 + 2 * 288 + 2, 9)
    assert cost.state_bytes == 4 * cost.parameters + 4 * 8 + 8


@pytest.mark.parametrize("padding", [1, (0, 2), "same", "valid"])
def test_a_border_writes_the_padded_input_and_reads_the_input(padding) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=padding, bias=False)
    (call,) = trace(conv, IMAGE).calls
    inside = [c for c in trace(bordered(conv, torch.zeros(4)), IMAGE).calls if c.name == "conv2d"]
    written = 4 * torch.Size(inside[0].args["input"].shape).numel()
    read = 4 * IMAGE.numel()
    # the border is written, the input read and written over it; the convolution reads the larger one instead
    assert border_bytes(call) == written + 2 * read + (written - read)
