"""What measuring costs beside the bare forward passes: all methods in turn, round after round, medians."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from benchmarks.recalibrate.methods import bare, methods
from benchmarks.train_step.architectures import build
from benchmarks.train_step.competitors import NotOfferedError
from torch import nn

BATCHES = 24  # the sequential order runs the first one twice: 4 %
NETWORKS = {"resnet18": (16, 128), "mobilenet_v2": (16, 128), "resnet50": (16, 128)}
SLOW = ("sequential, on disk", "sequential, run again")  # several times the bare pass: once, in the smallest network


def measure(quick: bool, rounds: int) -> list[dict[str, Any]]:
    """Return a row a network and method: seconds a batch."""
    rows = []
    for name, (size, side) in list(NETWORKS.items())[: 1 if quick else None]:
        try:
            model, origin = build(name)
        except NotOfferedError as error:
            print(f"{name}: {error}")
            continue
        rows += _network(name, origin, model, [torch.randn(size, 3, side, side) for _ in range(BATCHES)], rounds)
    return rows


def _network(
    name: str, origin: str, model: nn.Module, batches: list[torch.Tensor], rounds: int
) -> list[dict[str, Any]]:
    runs = {"bare": bare, **methods()}
    runs = {method: run for method, run in runs.items() if method not in SLOW or name == next(iter(NETWORKS))}
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    bare(model, batches[:2])
    for index in range(rounds):
        for method, run in runs.items():
            if method in SLOW and index:
                continue
            twin = copy.deepcopy(model)
            start = time.perf_counter()
            run(twin, batches)
            seconds[method].append((time.perf_counter() - start) / len(batches))
    return [_row(name, origin, batches, method, times, seconds["bare"]) for method, times in seconds.items()]


def _row(
    name: str, origin: str, batches: list[torch.Tensor], method: str, times: list[float], base: list[float]
) -> dict[str, Any]:
    # against the bare passes of the same round: the machine drifts
    ratio = statistics.median(t / b for t, b in zip(times, base, strict=False))
    median = statistics.median(times)
    print(f"{name}: {method}: {median * 1e3:.0f} ms a batch, {ratio:.2f} of the bare pass", flush=True)
    return {
        "question": "cost",
        "network": name,
        "origin": origin,
        "batch": list(batches[0].shape),
        "batches": len(batches),
        "method": method,
        "seconds": median,
        "ratio": ratio,
        "rounds": len(times),
    }
