"""Where a backend begins to pay: forward + backward of small and middling sizes, the backend forced, torch forced.

    python -m benchmarks.train_step.calibrate [--backend native] [--threads 2] [--evaluation]

Prints, for each layout and number of channels, torch's time ÷ the backend's at each size, and the crossover: the
smallest size from which on the backend is never slower. The two take turns in one process, in the frame of
``frame.py``; with ``--evaluation``, forward in evaluation without gradients, of a tensor filled a moment ago. The
thresholds of the dispatch are read off these tables.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from benchmarks.train_step.cases import Layer
from benchmarks.train_step.frame import Frame
from benchmarks.train_step.rows import heading
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import batchnorm
from batchnorm.functional import backends, use_backend

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
EVALUATION_SIZES = (*SIZES[3:], 2_000_000, 4_000_000, 8_000_000)
CHANNELS = (8, 64, 256, 1024)
_BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="native")
    parser.add_argument("--work", choices=("norm", "norm+relu"), default="norm")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--evaluation", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turn", type=float, default=0.02, help="seconds of a turn")
    options = parser.parse_args()
    if options.backend not in backends():
        raise SystemExit(f"there is no backend {options.backend!r} here; there are {', '.join(backends())}")
    torch.set_num_threads(options.threads)
    console = Console(width=120)
    console.print(heading(options.threads))
    for layout in ("planes", "rows"):
        console.print(_table(layout, options))


def _table(layout: str, options: argparse.Namespace) -> Table:
    what = "evaluation" if options.evaluation else "forward + backward"
    title = f"{options.work}, {layout}, {options.dtype}: torch's time ÷ {options.backend}'s, {what}"
    sizes = EVALUATION_SIZES if options.evaluation else SIZES
    table = Table("channels", *(f"{size:,}" for size in sizes), "pays from", title=title)
    for channels in CHANNELS:
        factors: dict[int, float] = {}
        for size in sizes:
            case = _case(layout, channels, size, options)
            if case is not None:
                factors[case.numel] = _factor(case, options)
        missing = [""] * (len(sizes) - len(factors))  # the smallest sizes leave no two values to a channel
        table.add_row(str(channels), *missing, *(f"{factor:.2f}" for factor in factors.values()), _crossover(factors))
    return table


def _case(layout: str, channels: int, size: int, options: argparse.Namespace) -> Layer | None:
    """Return the case whose size is nearest below; None if it has not at least two values to a channel."""
    if layout == "rows":
        shape: tuple[int, ...] = (size // channels, channels)
        return Layer("calibrate", options.work, shape, "rows", options.dtype) if shape[0] >= 2 else None
    space = size // (channels * _BATCH)
    shape = (_BATCH, channels, space)
    return Layer("calibrate", options.work, shape, "nchw", options.dtype) if space >= 2 else None


def _factor(case: Layer, options: argparse.Namespace) -> float:
    """Return torch's median over the backend's."""
    layer = batchnorm.nn.BatchNorm1d(case.channels, activation="relu" if "relu" in case.work else None)
    frames: list[Frame | _Evaluation] = []
    for name in ("torch", options.backend):
        forced = _forced(layer.train(not options.evaluation), name)
        x = case.random(0)
        frames.append(_Evaluation(forced, x) if options.evaluation else Frame(forced, [x], case.random(1)))
    for frame in frames:
        frame.once()
    seconds = min(frame.once()["forward+backward"] for frame in frames * 3)
    often = max(3, min(300, round(options.turn / seconds)))
    taken: list[list[float]] = [[], []]
    for _ in range(options.rounds):
        for frame, mine in zip(frames, taken, strict=True):
            frame.once()
            mine += [frame.once()["forward+backward"] for _ in range(often)]
    theirs, ours = map(statistics.median, taken)
    return theirs / ours


class _Evaluation:
    """Forward alone, in the place of a :class:`Frame`."""

    def __init__(self, layer: Callable[..., Tensor], source: Tensor) -> None:
        self._layer, self._source = layer, source

    def once(self) -> dict[str, float]:
        with torch.no_grad():
            x = self._source.clone()
            start = time.perf_counter()
            self._layer(x)
            return {"forward+backward": time.perf_counter() - start}


def _forced(layer: nn.Module, backend: str) -> Callable[..., Tensor]:
    def call(x: Tensor) -> Tensor:
        with use_backend(backend):
            y: Tensor = layer(x)
        return y

    return call


def _crossover(factors: dict[int, float]) -> str:
    """Return the smallest size from which on no factor is below 1.

    >>> _crossover({100: 0.5, 1000: 1.2, 10000: 2.0}), _crossover({100: 0.5})
    ('1,000', 'never')
    """
    found = "never"
    for size, factor in sorted(factors.items(), reverse=True):
        if factor < 1:
            break
        found = f"{size:,}"
    return found


if __name__ == "__main__":
    main()
