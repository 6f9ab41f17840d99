"""One command in several processes, under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

MODEL = ("-m", "net:build", "-w", "net.pt")


def test_under_torchrun_each_process_takes_a_part(command: Callable[..., Any], here: Path, weights: Path) -> None:
    assert command("recalibrate", *MODEL, "-d", "images.npz", "-b", 7, "-o", "alone.safetensors").code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "batchnorm", "recalibrate", *MODEL, "-d", "images.npz", "-b", "7", "-o", "t.safetensors"],
        cwd=here,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here)},
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert done.stdout.count("norms measured") == 1
    alone, together = load_file(here / "alone.safetensors"), load_file(here / "t.safetensors")
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=1e-6, atol=1e-7)
