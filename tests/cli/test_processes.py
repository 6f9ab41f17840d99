"""One command in several processes, under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn

from batchnorm.cli.processes import Processes, processes

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


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, address in ((None, None), ("1", "localhost"), ("2", None)):  # the last: left over by something else
        for name, value in (("WORLD_SIZE", size), ("MASTER_ADDR", address)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        with processes(nn.Linear(1, 1)) as alone:
            assert (alone.group, alone.rank, alone.size, alone.speaks) == (None, 0, 1, True)
            assert list(alone.part(range(4))) == [0, 1, 2, 3]


def test_one_process_speaks_and_each_has_a_part_of_its_own() -> None:
    three = [Processes(None, rank, 3) for rank in range(3)]
    assert [one.speaks for one in three] == [True, False, False]
    assert [list(one.part(range(7))) for one in three] == [[0, 3, 6], [1, 4], [2, 5]]


def test_the_processes_part_however_the_body_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    calls: list[object] = []
    monkeypatch.setattr(distributed, "init_process_group", calls.append)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: calls.append("destroyed"))
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)

    def fail() -> None:
        with processes(nn.Linear(1, 1)) as both:
            calls.append((both.rank, both.size, both.speaks))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert calls == ["gloo", (1, 2, False), "destroyed"]
