"""Processes of a gloo group that run a function of a test."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

TIMEOUT = timedelta(seconds=200)
"""Of the group: a process that waits for others so long is one that nobody told of an error."""


def _worker(rank: int, size: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        answer = work(rank, *args)
    except BaseException:
        answer = {"traceback": traceback.format_exc()}
    torch.save(answer, Path(folder) / f"{rank}.pt")


def run(folder: Path, size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what each process answered; None from one that was killed."""
    context = multiprocessing.get_context("forkserver")  # it imports torch once, and has no threads yet when it forks
    context.set_forkserver_preload(["batchnorm.statistics"])
    processes = [context.Process(target=_worker, args=(r, size, str(folder), work, args)) for r in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(250)
        assert process.exitcode is not None, "it hangs"
    files = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(f, weights_only=False) if f.exists() else None for f in files]
