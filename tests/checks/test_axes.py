"""On which axis features lie: told where a run shows it, and not guessed where it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.checks.flows import calls_of, flow
from torch import Tensor, nn

from batchnorm.checks.axes import feature_axes, moved_axis


class Then(nn.Module):
    """A layer, and what is done to its output."""

    def __init__(self, layer: nn.Module, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.after = layer, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(x))


def axis_of_output(model: nn.Module, x: Tensor) -> int | None:
    graph = flow(model, x)
    (output,) = graph.outputs
    return feature_axes(graph).get(output)


X1, X2, X3 = torch.zeros(2, 3, 8), torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4, 4)


@pytest.mark.parametrize(
    ("layer", "x", "axis"),
    [
        (nn.Conv1d(3, 4, 1), X1, 1),
        (nn.Conv2d(3, 4, 1), X2, 1),
        (nn.Conv2d(3, 4, 1), X2[0], 0),  # without a batch
        (nn.Conv3d(3, 4, 1), X3, 1),
        (nn.ConvTranspose2d(3, 4, 2), X2, 1),
        (nn.ConvTranspose2d(3, 4, 2), X2[0], 0),
        (nn.Linear(8, 4), X1, 2),
        (nn.Embedding(9, 4), torch.zeros(2, 5, dtype=torch.int64), 2),
        (nn.ReLU(), X1, None),  # the model's input, of which nothing is known
    ],
)
def test_layers_say_it(layer: nn.Module, x: Tensor, axis: int | None) -> None:
    assert axis_of_output(layer, x) == axis


def test_recurrent_layers_have_them_last() -> None:
    for layer in (nn.GRU(3, 5), nn.LSTM(3, 5), nn.RNN(3, 5)):
        graph = flow(layer, torch.zeros(7, 2, 3))
        assert feature_axes(graph)[graph.outputs[0]] == 2


@pytest.mark.parametrize(
    ("after", "axis"),
    [
        (lambda y: y.relu(), 1),
        (lambda y: y.sigmoid() * 2 + 1, 1),
        (lambda y: y.transpose(1, 2), 2),
        (lambda y: y.transpose(-1, -3), 3),
        (lambda y: y.transpose(2, 3), 1),
        (lambda y: y.permute(0, 2, 3, 1), 3),
        (lambda y: y.permute(0, -2, -1, -3).relu(), 3),
        (lambda y: y.contiguous(), 1),
        (lambda y: y.flatten(1), None),
        (lambda y: y.flip(1), None),  # it turns channels, and nobody says which they are now
        (lambda y: y.sum(1), None),
    ],
)
def test_it_moves_with_what_rearranges_axes(after: Callable[[Tensor], Tensor], axis: int | None) -> None:
    assert axis_of_output(Then(nn.Conv2d(3, 4, 1), after), X2) == axis


def test_a_linear_layer_behind_a_convolution_works_along_positions() -> None:
    assert axis_of_output(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(8, 6)), X2) == 1
    assert axis_of_output(nn.Sequential(nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)), X1) == 2


def test_operators_that_rearrange_and_others() -> None:
    graph = flow(Then(nn.Conv2d(3, 4, 1), lambda y: y.transpose(-1, 1).permute(3, 0, 1, 2).relu().sum()), X2)
    (transpose,), (permute,), (total,) = (calls_of(graph, name) for name in ("transpose", "permute", "sum"))
    assert [moved_axis(transpose, axis, 4) for axis in range(4)] == [0, 3, 2, 1]
    assert [moved_axis(permute, axis, 4) for axis in range(4)] == [1, 2, 3, 0]
    assert moved_axis(total, 1, 4) is None
