"""The pictures of a report: alike neighbourhoods once, with the norm, who absorbed it, and what stood in its way."""

from __future__ import annotations

import torch
from torch import nn

from batchnorm.folding.fold import fold

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def block(channels: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU())


def marked(panel) -> list[tuple[str, str]]:
    return [(node.name, node.role) for node in panel.nodes if node.role != "faint"]


def test_alike_neighbourhoods_are_one_picture() -> None:
    net = nn.Sequential(*[block() for _ in range(5)], nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Tanh()).eval()
    first, last = fold(net, X).pictures.folded.diagrams
    assert list(first.names) == [f"{i}.1" for i in range(5)]
    assert first.title == "conv2d → batch_norm → relu"
    assert first.caption == "Its scale goes back into the convolution 0.0."
    before, after = first.panels
    assert marked(before) == [("conv2d", "changed"), ("batch_norm", "gone")]
    assert marked(after) == [("conv2d + bias", "changed")]
    assert list(last.names) == ["6"]
    assert marked(last.panels[1]) == [("conv2d", "changed")]  # it had a bias


def test_what_is_crossed_is_marked_and_a_border_named() -> None:
    net = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(3), nn.Dropout(), nn.Conv2d(3, 3, 3, padding=1)).eval()
    net[1].running_mean.normal_()
    (picture,) = fold(net, X, borders=True).pictures.folded.diagrams
    before, after = picture.panels
    assert marked(before) == [("batch_norm", "gone"), ("dropout", "crossed"), ("conv2d", "changed")]
    assert marked(after) == [("dropout", "crossed"), ("conv2d, padded with −t/s", "changed")]
    assert [node.name for node in after.nodes] == ["tanh", "dropout", "conv2d, padded with −t/s", "…"]


def test_what_stands_in_the_way_is_marked() -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return torch.tanh(self.bn(torch.flip(y, (2,)))) + torch.sigmoid(y)

    result = fold(Net().eval(), X)
    (picture,) = result.pictures.left.diagrams
    assert dict(marked(picture.panels[0])) == {
        "conv2d": "plain", "flip": "plain", "batch_norm": "kept", "tanh": "blocking", "sigmoid": "blocking"
    }  # fmt: skip
    assert picture.caption == result.left[0].reason
    assert [role for role, _ in result.pictures.left.roles] == ["kept", "blocking"]
    assert not result.pictures.folded.diagrams


def test_there_are_only_so_many_pictures_and_none_is_forgotten() -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(30))

        def forward(self, x):
            # each between two others
            functions = [torch.tanh, torch.sigmoid, torch.exp, torch.sin, torch.cos, torch.asinh]
            for i, norm in enumerate(self.norms):
                x = functions[i % 6](norm(functions[i // 6](x)))
            return x

    pictures = fold(Net().eval(), X).pictures.left.diagrams
    drawn = [picture for picture in pictures if picture.panels]
    assert len(drawn) == 12
    assert pictures[-1].title == "18 other neighbourhoods, not drawn"
    assert sorted(name for picture in pictures for name in picture.names) == sorted(f"norms.{i}" for i in range(30))


def test_a_norm_that_is_not_reached_has_no_picture() -> None:
    net = block().eval()
    net.spare = nn.BatchNorm2d(3)
    net.forward = lambda x: net[2](net[0](x))
    result = fold(net, X)
    assert len(result.left) == 2
    assert not result.pictures.left.diagrams
