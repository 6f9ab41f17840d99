"""Plant faults, diagnose them, write a row for each case and the confusion table.

    python -m benchmarks.diagnose [--quick] [--development] [--faults TEXT ...] [--seeds N]

The table in the manual is of seeds that diagnose was not tuned on, 201 and up: what 100 to 102 and 200 showed was used.
Those from 0 are for its development, and a run on them writes no page. A run of all cases takes some tens of minutes
on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from benchmarks.diagnose.architectures import ARCHITECTURES, TIMM
from benchmarks.diagnose.cases import Row, place
from benchmarks.diagnose.faults import FAULTS, HEALTHY
from benchmarks.train_step.rows import machine

from benchmarks.diagnose import report

DEVELOPMENT, HELD_OUT = 0, 201  # the first seeds of the two sets
_QUICK = ("mlp", "resnet")


def main() -> None:
    options = _options()
    first = DEVELOPMENT if options.development else HELD_OUT
    first = first if options.first_seed is None else options.first_seed
    names = [name for name in (*FAULTS, *HEALTHY) if _wanted(name, options.faults)]
    places = list(itertools.product(range(first, first + options.seeds), options.architectures))
    about = {column: value for column, value in machine(1, 0).items() if column not in ("cache", "huge_pages")}
    about["training_batches"] = not options.without_training_batches
    rows: list[Row] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        # the slowest first, so that no core waits for it at the end
        waiting = [pool.submit(place, names, a, seed, about["training_batches"]) for seed, a in reversed(places)]
        for done in as_completed(waiting):
            rows += [{**about, **row} for row in done.result()]
    rows.sort(key=lambda row: (names.index(row["fault"]), row["seed"], row["architecture"]))
    print(report.summary(rows))
    if options.output:
        options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{options.output}: written", file=sys.stderr)
    if options.output == report.ROWS:
        print(report.write(rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, the MLP and the ResNet; writes no page")
    parser.add_argument("--development", action="store_true", help="seeds from 0 instead of 201; writes no page")
    parser.add_argument("--faults", nargs="+", default=[], metavar="TEXT", help="faults whose name has one of these")
    parser.add_argument("--seeds", type=int, default=None, metavar="N", help="how many seeds (3; quick: 1)")
    parser.add_argument("--first-seed", type=int, default=None, metavar="N", help="the first of them")
    parser.add_argument("--architectures", nargs="+", default=None, choices=[*ARCHITECTURES, *TIMM])
    parser.add_argument("--without-training-batches", action="store_true", help="give diagnose evaluation data only")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--output", type=Path, default=None, help="the file of rows; a whole run's is rows.jsonl")
    options = parser.parse_args()
    whole = not (options.quick or options.development or options.faults or options.architectures or options.seeds)
    whole = whole and options.first_seed is None
    if options.output is None and whole and not options.without_training_batches:
        options.output = report.ROWS
    options.seeds = options.seeds or (1 if options.quick else 3)
    options.architectures = options.architectures or list(_QUICK if options.quick else (*ARCHITECTURES, *_timm()))
    return options


def _timm() -> list[str]:
    """Return the networks of timm, if it can be imported."""
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError):  # its torchvision may be for another torch
        return []
    return list(TIMM)


def _wanted(name: str, texts: Sequence[str]) -> bool:
    return not texts or any(text in name for text in texts)


if __name__ == "__main__":
    main()
