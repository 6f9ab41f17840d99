"""What norms cost that cannot be folded: as they are, and as multiply-adds in one pass with their activations.

In DenseNet and in networks with the norm before the convolution about half of them are left. Compared are the model as
it was, folded, folded with ``fuse=True``, and what TorchScript and ONNX Runtime make of it for inference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from benchmarks.fold.measure import quietly
from benchmarks.fold.networks import Network
from benchmarks.fold.tools import OURS, TOOLS
from torch import nn

from batchnorm import fold
from benchmarks.fold import speed

__all__ = ["TITLES", "measure"]

NETWORKS = (Network("torchvision", "densenet121", 224), Network("pytorchcv", "preresnet18", 224))
BATCHES, THREADS = (1, 8), (1, 2)
TITLES = {
    speed.EAGER: "eager",
    OURS: "batchnorm",
    "fuse": "batchnorm, fuse=True",
    "jit": "jit, optimize_for_inference",
    "onnxruntime": "ONNX Runtime",
}


def measure(quick: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row a network, batch, number of threads and subject, as :func:`benchmarks.fold.speed.timed` does."""
    for network in NETWORKS[-1:] if quick else NETWORKS:
        if reason := network.missing():
            print(f"{network.name}: left out; {reason}")
            continue
        modules = _modules(network)
        for batch in BATCHES[: 1 if quick else None]:
            x = speed.pictures(network, batch)
            for threads in THREADS[: 1 if quick else None]:
                with _running_on(threads):
                    subjects, versions = _subjects(network, modules, x)
                    where = f"batch {batch}, {threads} thread(s)"
                    for row in speed.timed(network, x, where, subjects, versions, 2 if quick else rounds):
                        yield {**row, "threads": threads}


def _modules(network: Network) -> dict[str, nn.Module]:
    """Return what runs in torch, in float32; folded once, for folding is slower than what is measured."""
    model = network.build().float()
    example = speed.pictures(network, 1)
    with quietly():
        traced = torch.jit.trace(network.build().float(), example)
        return {
            speed.EAGER: model,
            OURS: fold(model, example).model,
            "fuse": fold(model, example, fuse=True).model,
            "jit": torch.jit.optimize_for_inference(traced),
        }


def _subjects(
    network: Network, modules: dict[str, nn.Module], x: torch.Tensor
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    subjects: dict[str, Callable[..., Any]] = dict(modules)
    versions = dict.fromkeys(modules, f"torch {torch.__version__}")
    runtime = next(tool for tool in TOOLS if tool.name == "onnxruntime")
    if reason := runtime.missing():
        print(f"{runtime.name}: left out; {reason}")
    else:
        with quietly():
            # a copy for each batch: an export has the size of its inputs, and is kept as long as the model is
            subjects[runtime.name] = runtime.fold(network.build().float(), (x,)).run
        versions[runtime.name] = runtime.version()
    return subjects, versions


@contextmanager
def _running_on(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
