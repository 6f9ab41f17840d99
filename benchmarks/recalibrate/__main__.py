"""Measure; see the package's docstring."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import benchmarks.recalibrate
import torch
from benchmarks.recalibrate import cost, exact, streams
from benchmarks.train_step.rows import machine

ROWS = Path(__file__).with_name("rows.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=benchmarks.recalibrate.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer cuts, one network, two rounds")
    parser.add_argument("--only", choices=("exact", "cost"), help="one question only")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing")
    parser.add_argument("--output", type=Path, default=ROWS, help="where the rows go")
    options = parser.parse_args()
    about = machine(torch.get_num_threads(), 0)
    rows = []
    if options.only != "cost":
        rows += streams.measure()
        rows += exact.measure(options.quick)
    if options.only != "exact":
        rows += cost.measure(options.quick, 2 if options.quick else options.rounds)
    measured = {row["question"] for row in rows}
    kept = []
    if options.output.exists():
        kept = [
            line for line in options.output.read_text().splitlines() if json.loads(line)["question"] not in measured
        ]
    options.output.write_text("".join(f"{line}\n" for line in [*kept, *(json.dumps(about | row) for row in rows)]))
    print(options.output)


if __name__ == "__main__":
    main()
