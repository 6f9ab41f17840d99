"""Measure; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmarks.watch
import torch
import torchvision
from benchmarks.train_step.rows import machine
from torch import Tensor, nn

from batchnorm import watch
from batchnorm.monitor.places import LEARNED_ANEW

ROWS = Path(__file__).with_name("rows.jsonl")
EVERY = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=benchmarks.watch.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["mobilenet_v2", "resnet18"], help="of torchvision.models")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=ROWS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = {column: value for column, value in machine(options.threads, 0).items() if column != "cache"}
    about |= {"torchvision": torchvision.__version__, "batch": options.batch, "size": options.size}
    for name in options.networks:
        model, x = _subject(name, options.batch, options.size)
        row = {**about, "network": name, "rounds": options.rounds, **_measure(model, x, options.rounds)}
        print(json.dumps({key: value for key, value in row.items() if key not in about}), flush=True)
        _store(options.output, row)


def _subject(name: str, batch: int, size: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = getattr(torchvision.models, name)(), torch.randn(batch, 3, size, size)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    with torch.no_grad():
        model(x)
    return model.eval(), x


@torch.no_grad()
def _measure(model: nn.Module, x: Tensor, rounds: int) -> dict[str, Any]:
    watched, sampled = watch(model), watch(model, every=EVERY)
    for _ in range(3):  # which places there are is learned from two
        with watched:
            model(x)
    times: dict[str, list[float]] = {"plain": [], "watched": [], "by_operators": [], "passed_over": []}
    for _ in range(rounds):
        times["plain"].append(_seconds(lambda: model(x)))
        with watched:
            times["watched"].append(_seconds(lambda: model(x)))
        anew = watch(model)
        with anew:
            model(x)
            times["by_operators"].append(_seconds(lambda: model(x)))
        with sampled:  # the one that is looked at comes first, outside the round
            if len(times["plain"]) % (EVERY - 1) == 1:
                sampled.reset()
                model(x)
            times["passed_over"].append(_seconds(lambda: model(x)))
    cost = {key: statistics.median(t / p for t, p in zip(times[key], times["plain"], strict=True)) - 1 for key in times}
    looked_at = cost["watched"] + (cost["by_operators"] - cost["watched"]) / LEARNED_ANEW
    return {
        "plain_ms": 1e3 * statistics.median(times["plain"]),
        "watched_ms": 1e3 * statistics.median(times["watched"]),
        "cost": looked_at,
        "cost_by_hooks": cost["watched"],
        "cost_by_operators": cost["by_operators"],
        "cost_passed_over": cost["passed_over"],
        "cost_every_10": (looked_at + (EVERY - 1) * cost["passed_over"]) / EVERY,
        "result_ms": 1e3 * min(_seconds(watched.result) for _ in range(5)),
    }


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _store(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file, in place of an older one about the same."""
    key = ("network", "batch", "size", "threads")
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [old for old in kept if any(old.get(k) != row.get(k) for k in key)]
    path.write_text("".join(f"{json.dumps(r, ensure_ascii=False)}\n" for r in [*kept, row]))


if __name__ == "__main__":
    main()
