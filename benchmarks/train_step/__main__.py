"""Measure training steps, all competitors in turns, and write a row for each to a file.

    python -m benchmarks.train_step [--nets] [--quick] [--only TEXT ...]

A turn is a fraction of a second of repetitions, after one that does not count; a round is a turn of every competitor,
in order; the medians are over all rounds. The copy that the limits are made of takes part like everybody else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.train_step import limit, rows
from benchmarks.train_step.cases import Case, Layer, all_cases, quick_cases
from benchmarks.train_step.competitors import COMPETITORS, COPY, NotOfferedError
from benchmarks.train_step.rows import Row
from benchmarks.train_step.worker import FailedError, Worker

_MOST_REPETITIONS = 300
_LONGEST = 5  # a turn takes at most so many times as long as planned


def main() -> None:
    options = _options()
    cases = [case for case in (quick_cases() if options.quick else all_cases()) if _wanted(case, options)]
    competitors = [c for c in COMPETITORS if c.name in options.competitors]
    if not options.append:
        options.output.unlink(missing_ok=True)
    workers = [Worker(competitor, options.threads, options.preload) for competitor in competitors]
    shared = rows.machine(options.threads, limit.last_level_cache()) | {"quick": options.quick}
    try:
        for number, case in enumerate(cases, 1):
            print(f"{number}/{len(cases)} {case.label}", file=sys.stderr, flush=True)
            found = _measure(case, workers, options)
            rows.write(options.output, ({**shared, **rows.about(case), **row} for row in found))
    finally:
        for worker in workers:
            worker.stop()
    print(f"{options.output}: written", file=sys.stderr)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [competitor.name for competitor in COMPETITORS]
    parser.add_argument("--output", type=Path, default=rows.ROWS, help="the file of rows")
    parser.add_argument("--append", action="store_true", help="keep the rows that the file holds")
    parser.add_argument("--nets", action="store_true", help="also whole networks (torchvision, timm or pytorchcv)")
    parser.add_argument("--quick", action="store_true", help="a few shapes, a few rounds: to try it")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases whose label has one of these")
    parser.add_argument("--competitors", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--preload", nargs="+", default=[], metavar="MODULE", help="imported first by every worker")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=None, help="turns of each competitor (9; quick: 3)")
    parser.add_argument("--turn", type=float, default=None, help="seconds of a turn (0.15; quick: 0.05)")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else 9)
    options.turn = options.turn or (0.05 if options.quick else 0.15)
    return options


def _wanted(case: Case, options: argparse.Namespace) -> bool:
    if case.group == "nets" and not options.nets:
        return False
    return not options.only or any(text in case.label for text in options.only)


def _measure(case: Case, workers: Iterable[Worker], options: argparse.Namespace) -> list[Row]:
    """Return the rows of one case, of all who can do it."""
    ready: list[tuple[Worker, Row]] = []
    for worker in workers:
        if case.group not in worker.competitor.groups:
            continue
        try:
            ready.append((worker, worker.prepare(case)))
        except (NotOfferedError, FailedError) as reason:
            print(f"    {worker.competitor.name}: left out, {reason}", file=sys.stderr)
    try:
        if isinstance(case, Layer) and case.group == "memory":
            size = {"phase": "memory", "activation_bytes": case.numel * case.itemsize}
            return [_row(worker, info) | size | worker.memory() for worker, info in ready]
        return _timed(case, ready, options)
    finally:
        for worker, _ in ready:
            worker.release()


def _timed(case: Case, ready: list[tuple[Worker, Row]], options: argparse.Namespace) -> list[Row]:
    often = [max(2, min(_MOST_REPETITIONS, round(options.turn / info["seconds"]))) for _, info in ready]
    taken: list[list[dict[str, float]]] = [[] for _ in ready]
    for _ in range(options.rounds):
        for (worker, _), repetitions, mine in zip(ready, often, taken, strict=True):
            mine += worker.turn(repetitions, _LONGEST * options.turn)
    bounds: dict[str, float] = {}
    for (worker, _), mine in zip(ready, taken, strict=True):
        if isinstance(case, Layer) and worker.competitor.name == COPY:
            best = min(sample["copy"] for sample in mine)
            bounds = limit.limits(case, limit.last_level_cache(), 2 * case.numel * case.itemsize / best)
    found = []
    for (worker, info), mine in zip(ready, taken, strict=True):
        for phase in mine[0]:
            row = _row(worker, info) | {"phase": phase, "rounds": options.rounds}
            row |= rows.summary([sample[phase] for sample in mine])
            if phase in bounds:
                row |= {"limit": bounds[phase], "ratio": row["median"] / bounds[phase]}
            found.append(row)
    return found


def _row(worker: Worker, info: Row) -> Row:
    columns = {name: value for name, value in info.items() if name != "seconds"}
    return {"competitor": worker.competitor.name, **columns}


if __name__ == "__main__":
    main()
