"""Latency of what each tool returns beside the model as it was: all of them in turn, round after round, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from benchmarks.fold.measure import quietly
from benchmarks.fold.networks import Network
from benchmarks.fold.tools import Tool

__all__ = ["EAGER", "measure", "pictures", "timed"]

EAGER = "eager"
NETWORKS = (Network("torchvision", "resnet18", 224), Network("torchvision", "mobilenet_v2", 224))
BATCHES = (1, 8)
MORE = (  # at a batch of 1
    Network("torchvision", "resnext50_32x4d", 224),
    Network("torchvision", "densenet121", 224),
    Network("torchvision", "mobilenet_v3_small", 224),
    Network("torchvision", "efficientnet_b0", 224),
    Network("torchvision", "shufflenet_v2_x1_0", 224),
    Network("torchvision", "regnet_y_400mf", 224),
    Network("timm", "res2net50_14w_8s", 224),
    Network("timm", "levit_128s", 224),
)
_WARM_UP, _SECONDS = 3, 0.2  # calls before the first round; how long a round of one subject lasts at least


def measure(tools: Sequence[Tool], quick: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row a network, batch and tool: seconds a call, and the ratio to eager of the same round."""
    wanted = [(network, batch) for network in NETWORKS for batch in BATCHES] + [(network, 1) for network in MORE]
    for network, batch in wanted[: 1 if quick else None]:
        if reason := network.missing():
            print(f"{network.name}: left out; {reason}")
            continue
        yield from _latencies(network, batch, tools, 2 if quick else rounds)


def _latencies(network: Network, batch: int, tools: Sequence[Tool], rounds: int) -> Iterator[dict[str, Any]]:
    x = pictures(network, batch)
    with quietly():
        subjects = _subjects(network, tools, x)
    versions = {tool.name: tool.version() for tool in tools} | {EAGER: f"torch {torch.__version__}"}
    yield from timed(network, x, f"batch {batch}", subjects, versions, rounds)


def pictures(network: Network, batch: int) -> torch.Tensor:
    """Return what a network is timed on, float32."""
    return torch.randn(batch, 3, network.side, network.side, generator=torch.Generator().manual_seed(0))


def timed(
    network: Network,
    x: torch.Tensor,
    where: str,
    subjects: Mapping[str, Callable[..., Any]],
    versions: Mapping[str, str],
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each subject: seconds a call, and the ratio to eager of the same round.

    Args:
        network: what they all compute.
        x: on what.
        where: under which circumstances, for the row's name.
        subjects: what is timed, by name; ``EAGER`` is one of them.
        versions: of what is timed.
        rounds: how often.
    """
    seconds: dict[str, list[float]] = {}
    with quietly():
        for run in subjects.values():
            for _ in range(_WARM_UP):
                run(x)
        for _ in range(rounds):
            for name, run in subjects.items():
                seconds.setdefault(name, []).append(_once(run, x))
    for name, times in seconds.items():
        # against the model as it was, of the same round: the machine drifts
        ratio = statistics.median(t / base for t, base in zip(times, seconds[EAGER], strict=True))
        median = statistics.median(times)
        print(f"{network.name}, {where}: {name}: {median * 1e3:.2f} ms, {ratio:.2f} of eager", flush=True)
        yield {
            "package": network.package,
            "subject": f"{network.name}, {where}",
            "network": network.name,
            "batch": len(x),
            "side": network.side,
            "tool": name,
            "version": versions[name],
            "median": median,
            "ratio": ratio,
            "rounds": rounds,
        }


def _subjects(network: Network, tools: Sequence[Tool], x: torch.Tensor) -> dict[str, Callable[..., Any]]:
    """Return what is timed, in float32, as it is deployed; a tool that raises is left out."""
    subjects: dict[str, Callable[..., Any]] = {EAGER: network.build().float()}
    for tool in tools:
        try:
            subjects[tool.name] = tool.fold(network.build().float(), (x,)).run
        except Exception as problem:
            print(f"{network.name}: {tool.name}: left out; it raises {type(problem).__name__}")
    return subjects


def _once(run: Callable[..., Any], x: torch.Tensor) -> float:
    """Return the seconds of a call, the mean over as many as make a measurable time."""
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        run(x)
        calls += 1
    return (time.perf_counter() - start) / calls
