"""A shift of a layer's channels ends in norms, or it matters: traced through what carries it on as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.checks.flows import calls_of, flow
from torch import Tensor, nn

from batchnorm.checks.shifts import cancelling_norms


class Any2d(nn.BatchNorm2d):
    """Takes inputs of any number of axes."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class Between(nn.Module):
    """A convolution, some operators, and a norm over the channels that come out of them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.between, self.norm = nn.Conv2d(3, 4, 1), between, Any2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.between(self.conv(x)))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def ends(model: nn.Module) -> int:
    graph = flow(model, X)
    norms, values = cancelling_norms(graph, calls_of(graph, "conv2d")[0])
    assert bool(norms) == bool(values)
    return len(norms)


KEEPING: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y,
    "average pooling": lambda y: F.avg_pool2d(y, 2),
    "average of what is there": lambda y: F.avg_pool2d(y, 3, padding=1, count_include_pad=False),
    "maximum pooling": lambda y: F.max_pool2d(y, 3, padding=1),
    "adaptive pooling": lambda y: F.adaptive_avg_pool2d(y, 3),
    "nearest": lambda y: F.interpolate(y, scale_factor=2),
    "bilinear": lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"),
    "bicubic": lambda y: F.interpolate(y, scale_factor=2, mode="bicubic"),
    "mean": lambda y: y.mean((2, 3)),
    "mean of one axis": lambda y: y.mean(-1),
    "mean that keeps axes": lambda y: y.mean((2, 3), keepdim=True),
    "flatten": lambda y: y.flatten(2),
    "there and back": lambda y: y.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "mean of moved axes": lambda y: y.permute(2, 0, 1, 3).mean(0),
}

BREAKING: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "scale": lambda y: 2 * y,
    "zeros in the average": lambda y: F.avg_pool2d(y, 3, padding=1),
    "another divisor": lambda y: F.avg_pool2d(y, 2, divisor_override=3),
    "zeros around": lambda y: F.pad(y, (1, 1)),
    "sum": lambda y: y.sum((2, 3)),
    "mean of channels": lambda y: y.mean(1, keepdim=True).expand(-1, 4, -1, -1),
    "mean of everything": lambda y: y.mean() + torch.zeros(2, 4, 8, 8),
    "channels elsewhere": lambda y: y.permute(0, 2, 1, 3)[:, :4],
    "flattened channels": lambda y: y.flatten(1)[:, :4],
}


def moves(model: nn.Module) -> bool:
    """Whether a shift of the convolution's output shows behind the norm in training."""
    model.train()
    with torch.no_grad():
        before = model.double()(X.double())
        model.conv.bias += torch.tensor([1.0, -2.0, 3.0, 0.5]).double()
        after = model(X.double())
    model.float()
    return not torch.allclose(before, after, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", KEEPING)
def test_behind_these_a_norm_takes_the_shift_out_again(name: str) -> None:
    model = Between(KEEPING[name])
    assert ends(model) == 1
    assert not moves(model)


@pytest.mark.parametrize("name", BREAKING)
def test_behind_these_nothing_is_said(name: str) -> None:
    assert ends(Between(BREAKING[name])) == 0


@pytest.mark.parametrize("name", ["relu", "zeros in the average", "zeros around", "channels elsewhere"])
def test_and_there_the_shift_shows(name: str) -> None:
    assert moves(Between(BREAKING[name]))


class Ways(nn.Module):
    """One convolution, read by several."""

    def __init__(self, *others: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norms, self.others = nn.Conv2d(3, 4, 1), nn.ModuleList(nn.BatchNorm2d(4) for _ in "ab"), others

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.conv(x)
        return [self.norms[0](y), self.norms[1](F.max_pool2d(y, 2)), *(other(y) for other in self.others)]


def test_every_reader_has_to_be_blind() -> None:
    assert ends(Ways()) == 2
    assert ends(Ways(torch.sigmoid)) == 0
    assert ends(Ways(lambda y: y)) == 0  # the caller reads it
    assert ends(nn.Conv2d(3, 4, 1)) == 0


def test_a_shift_that_comes_in_as_a_running_mean_is_none() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return F.batch_norm(x.repeat(1, 2, 1, 1)[:, :4], y.mean((0, 2, 3)), torch.ones(4))

    assert ends(Odd()) == 0
