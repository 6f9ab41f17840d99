"""How much memory a recalibration may take."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch
from torch.nn import Module

from batchnorm.errors import ArgumentTypeError, ShapeError

__all__ = ["limit_of"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def limit_of(memory: int | float | str | None, model: Module) -> float:
    """Return a limit in bytes; None means half of what is free now on the model's device.

    >>> limit_of("1.5GB", torch.nn.Identity())
    1500000000.0

    Raises:
        ArgumentTypeError: it is neither a number nor a text such as ``"4GB"``.
        ShapeError: it is negative.
    """
    if memory is None:
        return _free(model) / 2
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?i?)b?\s*", memory.lower())
        if found and found[2] in _UNITS:
            return float(found[1]) * _UNITS[found[2]]
    elif isinstance(memory, int | float) and not isinstance(memory, bool):
        if not memory >= 0:
            raise ShapeError(f"recalibrate: memory={memory}: expected a number of bytes, 0 or more.")
        return float(memory)
    raise ArgumentTypeError(f"recalibrate: memory={memory!r}: expected a number of bytes, or a text such as '4GB'.")


def _free(model: Module) -> float:
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    if devices:
        return float(min(torch.cuda.mem_get_info(device)[0] for device in devices))
    free = [_available(), *_left_in_container()]
    known = [value for value in free if value is not None]
    return float(min(known)) if known else 2.0**32  # nobody tells: 4 GiB


def _available() -> int | None:
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _left_in_container() -> list[int]:
    """Return what the control group leaves, where there is one with a limit."""
    with suppress(OSError, ValueError):
        folder = Path("/sys/fs/cgroup")
        most = (folder / "memory.max").read_text().strip()
        if most != "max":
            return [max(0, int(most) - int((folder / "memory.current").read_text()))]
    return []
