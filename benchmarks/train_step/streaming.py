"""Whether an output is better written around the caches, when the convolution that reads it comes next.

    python -m benchmarks.train_step.streaming [--threads 2] [--rounds 8]

Stores around the caches save the norm some traffic, and cost the reader of its output as much if that would have been
in the cache. Prints, for norm + ReLU and a convolution of its output, forward, the milliseconds of both together with
ordinary stores and with stores around the caches, in turns in one process. ``stream_bytes`` in native/memory.cpp is
read off this table.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from benchmarks.train_step.rows import heading
from rich.console import Console
from rich.table import Table
from torch import nn

import batchnorm
from batchnorm.functional import use_backend
from batchnorm.kernels.native.library import library

# batch, channels, height = width, channels and kernel size of the convolution
CASES = ((8, 64, 56, 64, 1), (8, 64, 56, 64, 3), (32, 128, 28, 128, 1), (32, 128, 28, 128, 3), (32, 64, 56, 64, 1))
_EACH = 4
_STORES = {"ordinary": 2**62, "around the caches": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=120)
    console.print(heading(options.threads))
    table = Table("batch × channels @ side", "layout", "convolution", "output, MB", *_STORES)
    for case in CASES:
        for layout in ("nchw", "channels-last"):
            batch, channels, side, out, size = case
            megabytes = batch * channels * side * side * 4 / 1e6
            taken = [f"{1e3 * seconds:.2f}" for seconds in _seconds(case, layout, options.rounds)]
            table.add_row(f"{batch}×{channels}@{side}", layout, f"{size}×{size}, {out}", f"{megabytes:.1f}", *taken)
    console.print(table)


def _seconds(case: tuple[int, ...], layout: str, rounds: int) -> list[float]:
    """Return the medians of norm and convolution together, for each kind of store."""
    assert library is not None
    batch, channels, side, out, size = case
    before = nn.Conv2d(channels, channels, 1, bias=False)
    after = nn.Conv2d(channels, out, size, padding=size // 2, bias=False)
    norm = batchnorm.nn.BatchNorm2d(channels, activation="relu")
    x = torch.randn(batch, channels, side, side)
    if layout == "channels-last":
        x, before, after = (v.to(memory_format=torch.channels_last) for v in (x, before, after))
    taken: list[list[float]] = [[] for _ in _STORES]
    limit = library.set_stream_bytes(0)
    try:
        for _ in range(rounds):
            for mine, bytes_ in zip(taken, _STORES.values(), strict=True):
                library.set_stream_bytes(bytes_)
                for _ in range(_EACH):
                    z = before(x)
                    start = time.perf_counter()
                    with use_backend("native"):
                        y = norm(z)
                    after(y)
                    mine.append(time.perf_counter() - start)
    finally:
        library.set_stream_bytes(limit)
    return [statistics.median(mine) for mine in taken]


if __name__ == "__main__":
    main()
