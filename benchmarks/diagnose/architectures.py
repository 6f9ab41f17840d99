"""Three small networks as people build them, for 8×8 pictures and ten classes; the norm's class is a parameter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from batchnorm import nn as ours

__all__ = ["ARCHITECTURES", "MLP", "TIMM", "MobileNet", "ResNet", "build"]

CLASSES = 10
Norm = Callable[[int], nn.Module]


class MLP(nn.Module):
    """Four hidden layers of 96: linear → norm → ReLU."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.blocks = nn.Sequential()
        width = 64
        for number in range(4):
            block = nn.Sequential()
            block.add_module("linear", nn.Linear(width, 96))
            block.add_module("norm", norm(96))
            block.add_module("act", nn.ReLU())
            self.blocks.add_module(str(number), block)
            width = 96
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (N, 10), of pictures (N, 1, 8, 8)."""
        logits: Tensor = self.head(self.blocks(images.flatten(1)))
        return logits


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and the shortcut, with a 1×1 convolution where the shape changes (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = norm(outputs)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = norm(outputs)
        self.downsample = nn.Identity() if stride == 1 and inputs == outputs else nn.Sequential()
        if isinstance(self.downsample, nn.Sequential):
            self.downsample.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False)).append(norm(outputs))
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(branch + shortcut)."""
        branch = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        y: Tensor = self.act2(branch + self.downsample(x))
        return y


class ResNet(nn.Module):
    """A stem and three residual blocks at 8×8, 4×4 and 2×2."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = norm(16)
        self.act = nn.ReLU()
        self.layer1 = nn.Sequential(BasicBlock(16, 16, 1, norm))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2, norm))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2, norm))
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (N, 10), of pictures (N, 1, H, W)."""
        x = self.act(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int, groups: int, norm: Norm) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, norm(outputs)]


class InvertedResidual(nn.Module):
    """Expand by 1×1, depthwise 3×3, project by 1×1 without an activation (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, norm: Norm) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [*_conv_norm(inputs, hidden, 1, 1, 1, norm), nn.ReLU6()] if expansion > 1 else []
        self.conv = nn.Sequential(
            *expand,
            *_conv_norm(hidden, hidden, 3, stride, hidden, norm),
            nn.ReLU6(),
            *_conv_norm(hidden, outputs, 1, 1, 1, norm),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch, plus x where their shapes agree."""
        y: Tensor = self.conv(x)
        return x + y if self.shortcut else y


class MobileNet(nn.Module):
    """A stem, four inverted residuals with depthwise convolutions, and a 1×1 head."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(*_conv_norm(1, 16, 3, 1, 1, norm), nn.ReLU6()),
            InvertedResidual(16, 16, 1, 1, norm),
            InvertedResidual(16, 24, 2, 3, norm),
            InvertedResidual(24, 24, 1, 3, norm),
            InvertedResidual(24, 32, 2, 3, norm),
            nn.Sequential(*_conv_norm(32, 96, 1, 1, 1, norm), nn.ReLU6()),
        )
        self.classifier = nn.Linear(96, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (N, 10), of pictures (N, 1, H, W)."""
        logits: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(nn.BatchNorm1d),
    "resnet": lambda: ResNet(nn.BatchNorm2d),
    "mobilenet": lambda: MobileNet(nn.BatchNorm2d),
    "resnet-ours": lambda: ResNet(ours.BatchNorm2d),
}


TIMM: dict[str, Callable[[], nn.Module]] = {
    "timm-resnet10t": lambda: _of_timm("resnet10t"),
    "timm-mobilenetv3_small_050": lambda: _of_timm("mobilenetv3_small_050"),
}
"""Networks of another library, where it is installed; its own layers, names and initial values."""


def _of_timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, in_chans=1, num_classes=CLASSES)
    return model


def build(name: str, seed: int) -> nn.Module:
    """Return an untrained network, the same for the same seed; torch's random generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {**ARCHITECTURES, **TIMM}[name]()
