"""The most memory that a training step holds at once, measured in two ways.

*By torch's allocator*: torch.profiler notes every allocation and release of the step; the peak of their running sum is
what the step needs beyond what was there before it. Memory that a kernel takes elsewhere is not in it.

*By the system*: how far the process's resident memory rises above where it stood (Linux: ``VmHWM`` after a reset, less
``VmRSS``, after malloc has given back what it can). All memory is in it, with whatever the system and malloc add.
"""

from __future__ import annotations

import ctypes
import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def allocated_peak(step: Callable[[], object]) -> int:
    """Return the peak in bytes by torch's allocator."""
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((float(event["ts"]), event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def resident_peak(step: Callable[[], object]) -> int | None:
    """Return the peak in bytes by the system; None where it does not tell."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _RESET.write_text("5")  # the high-water mark starts from what is resident now
        before = _kibibytes("VmRSS")
        step()
        return (_kibibytes("VmHWM") - before) * 1024
    except (AttributeError, OSError):
        return None


def _kibibytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])
