"""Rows of results: one JSON object a line, with all that is needed to know what was measured, where and when."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias

import torch
from benchmarks.train_step.cases import Case

import batchnorm
from batchnorm.folding.report.latency import processor

Row: TypeAlias = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
ROWS = Path(__file__).with_name("rows.jsonl")


def machine(threads: int, cache: int) -> Row:
    """Return the columns that are the same in every row of a run; ``load`` is the system's, before it began."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": f"{processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "cache": cache,
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "huge_pages": _huge_pages(),
        "torch": torch.__version__,
        "batchnorm": batchnorm.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
    }


def heading(threads: int) -> str:
    """Return a line that says where the figures below it were measured."""
    about = machine(threads, 0)
    return " ".join(f"{name} {about[name]};" for name in ("device", "threads", "torch", "commit", "date"))


def about(case: Case) -> Row:
    """Return the columns that say what was measured."""
    return {
        "group": case.group,
        "work": case.work,
        "layout": case.layout,
        "dtype": case.dtype,
        "shape": list(case.shape),
    }


def summary(seconds: list[float]) -> Row:
    """Return median and quartiles in seconds, and how many there were."""
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median": quartiles[1], "q1": quartiles[0], "q3": quartiles[2], "n": len(seconds)}


def read(paths: Iterable[Path]) -> list[Row]:
    """Return the rows of files that exist; of rows about the same thing, the last."""
    last: dict[tuple[Any, ...], Row] = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            row: Row = json.loads(line)
            key = (row["group"], row["work"], row["layout"], row["dtype"], *row["shape"], row["phase"])
            last[(*key, row["competitor"], row["threads"])] = row
    return list(last.values())


def write(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file."""
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _huge_pages() -> str:
    """Return when Linux gives huge pages: "always", "madvise" (to those who ask) or "never"; empty elsewhere."""
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return ""
    return setting.partition("[")[2].partition("]")[0]


def _commit() -> str:
    """Return the commit, with a mark where the library's own files differ from it.

    Where the library that is imported is not the one of this checkout, that is said instead.
    """
    if ROOT not in Path(batchnorm.__file__).resolve().parents:
        return "of an installed library, not of this checkout"
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return f"{commit}, changed" if _git("status", "--porcelain", "--", "src", "native") else commit
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
