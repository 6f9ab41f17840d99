"""How long a model takes before and after it was changed, and how much memory: measured, on one input, in turn."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer

from batchnorm.errors import InputError
from batchnorm.models.calling import call_on_example, fresh_inputs
from batchnorm.models.snapshot import untouched

__all__ = ["Measured", "Spread", "measure", "processor"]

_ROUNDS = (7, 200)  # at least, at most
_SECONDS_OF_A_ROUND = 0.02  # of one model, at least: what is shorter is called several times


@dataclass(frozen=True)
class Spread:
    """Seconds of a call, over the rounds: the median and the quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Return that of several rounds, at least two."""
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Measured:
    """Latency and memory of two models, side by side.

    Attributes:
        before: of the model as it was.
        after: of the changed one.
        ratio: median over the rounds of after by before, both of the same round: the machine drifts.
        rounds: how often each was timed, in turn.
        calls: how many calls a round took the mean of.
        threads: that torch computed with.
        device: what it ran on.
        memory_before: most bytes held at once during a pass beyond what was held when it began; None if unknown.
        memory_after: the same of the changed model.
        memory_of: what these bytes are.
    """

    before: Spread
    after: Spread
    ratio: float
    rounds: int
    calls: int
    threads: int
    device: str
    memory_before: int | None
    memory_after: int | None
    memory_of: str


def measure(before: Module, after: Module, example_inputs: Any, *, seconds: float = 2.0) -> Measured:
    """Time both models on the inputs, round after round, without autograd; then look at the memory of one pass each.

    Times are those of :class:`torch.utils.benchmark.Timer`, which waits for the device and keeps to torch's number of
    threads. Memory is what torch's own allocator handed out: activations and what operators need in between, not the
    weights. On a CPU the events of :mod:`torch.profiler` are added up, on CUDA the allocator is asked.

    Args:
        before: a model.
        after: another one, which takes the same inputs.
        example_inputs: as both take them; they get copies.
        seconds: how long to measure, roughly; at least 7 rounds are done however long they take.

    Raises:
        InputError: a model fails on the inputs.
    """
    device = _device(before, example_inputs)
    with untouched(before), untouched(after), torch.no_grad():
        runs = [_run(model, example_inputs) for model in (before, after)]
        calls, rounds = _how_often(runs, seconds)
        timers = [_timer(run) for run in runs]
        times = [[timer.timeit(calls).mean for timer in timers] for _ in range(rounds)]
        memory = [_peak(run, device) for run in runs]
    return Measured(
        before=Spread.of([base for base, _ in times]),
        after=Spread.of([changed for _, changed in times]),
        ratio=statistics.median(changed / base for base, changed in times),
        rounds=rounds,
        calls=calls,
        threads=torch.get_num_threads(),
        device=_name(device),
        memory_before=memory[0],
        memory_after=memory[1],
        memory_of=_MEMORY_OF.get(device.type, "not known on this device"),
    )


def _run(model: Module, example_inputs: Any) -> Callable[[], None]:
    inputs = fresh_inputs(example_inputs)

    def run() -> None:
        call_on_example(model, inputs)

    return run


def _timer(run: Callable[[], None]) -> Timer:
    return Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())


def _how_often(runs: Sequence[Callable[[], None]], seconds: float) -> tuple[int, int]:
    """Return how many calls make a round, and how many rounds fill the time; both models are warm after that.

    Raises:
        InputError: a model fails on the inputs.
    """
    for run in runs:
        try:
            run()
        except Exception as error:
            raise InputError(f"measure: the model fails on the inputs: {type(error).__name__}: {error}") from error
    start = time.perf_counter()
    for run in runs:
        _timer(run).timeit(1)
    once = max((time.perf_counter() - start) / (3 * len(runs)), 1e-7)  # the timer calls it twice before
    calls = max(1, round(_SECONDS_OF_A_ROUND / once))
    least, most = _ROUNDS
    return calls, min(max(round(seconds / (len(runs) * (calls + 2) * once)), least), most)


# -- memory ----------------------------------------------------------------------------------------------------------

_MEMORY_OF = {
    "cpu": "what torch's CPU allocator handed out during the pass, at its peak; without weights",
    "cuda": "what torch's CUDA allocator handed out during the pass, at its peak; without weights",
}


def _peak(run: Callable[[], None], device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    return _peak_of_cpu(run) if device.type == "cpu" else None


def _peak_of_cpu(run: Callable[[], None]) -> int:
    """Return the peak of what was allocated and not yet freed, from the profiler's events."""
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event["args"] for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for change in sorted((c for c in changes if c["Device Type"] == _CPU), key=lambda c: c["Ev Idx"]):
        held += change["Bytes"]
        peak = max(peak, held)
    return peak


_CPU = 0  # the number that the profiler has for it


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the profiler from writing to stderr that it starts and stops, unless its user has set what it writes."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "99"
    try:
        yield
    finally:
        del os.environ[name]


# -- where -----------------------------------------------------------------------------------------------------------


def _device(model: Module, example_inputs: Any) -> torch.device:
    tensors = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    return next((tensor.device for tensor in [*model.parameters(), *tensors]), torch.device("cpu"))


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor() if device.type == "cpu" else device.type


def processor() -> str:
    """Return what the machine's processor is called."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
