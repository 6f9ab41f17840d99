"""Measure; see the package's docstring."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.fold.measure import compare, verdict
from benchmarks.fold.patterns import PATTERNS
from benchmarks.fold.subject import Subject
from benchmarks.fold.tools import TOOLS, Tool
from benchmarks.train_step.rows import machine

import benchmarks.fold
from benchmarks.fold import leftover, networks, speed

ROWS = Path(__file__).with_name("rows.jsonl")
_QUICK_PATTERNS = 7  # every seventh


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    about = {column: value for column, value in machine(options.threads, 0).items() if column != "cache"}
    tools = _present(options.tools, options.inductor)
    for rows in _questions(options, tools):
        _store(options.output, [{**about, **row} for row in rows])
    print(options.output)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=benchmarks.fold.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("patterns", "networks", "speed", "leftover"), help="one question only")
    parser.add_argument("--quick", action="store_true", help="a few of each, two rounds")
    parser.add_argument(
        "--inductor", action="store_true", help="Inductor too; it compiles for a second or more a model"
    )
    parser.add_argument("--tools", nargs="+", default=[], metavar="NAME", help=", ".join(tool.name for tool in TOOLS))
    parser.add_argument("--subjects", nargs="+", default=[], metavar="TEXT", help="those whose name has one of these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing")
    parser.add_argument("--output", type=Path, default=ROWS, help="where the rows go; it keeps those not measured anew")
    return parser.parse_args()


def _present(names: Sequence[str], optional: bool) -> list[Tool]:
    """Return the tools that were asked for and are installed; tell of those that are not."""
    found = []
    for tool in TOOLS:
        wanted = tool.name in names if names else optional or not tool.optional
        if not wanted:
            continue
        if reason := tool.missing():
            print(f"{tool.name}: left out; {reason}")
        else:
            found.append(tool)
    return found


def _questions(options: argparse.Namespace, tools: Sequence[Tool]) -> Iterator[list[dict[str, Any]]]:
    """Yield rows as soon as a subject has them."""
    if options.only in (None, "patterns"):
        for place, pattern in enumerate(PATTERNS):
            if _wanted(pattern, options) and not (options.quick and place % _QUICK_PATTERNS):
                about = {"question": "patterns", "family": pattern.family, "least": pattern.least}
                yield _rows(about, pattern, tools)
    if options.only in (None, "networks"):
        for network in networks.quick() if options.quick else networks.NETWORKS:
            if not _wanted(network, options):
                continue
            if reason := network.missing():
                print(f"{network.name}: left out; {reason}")
                continue
            about = {"question": "networks", "package": network.package, "trained": network.trained}
            yield _rows(about, network, [tool for tool in tools if tool.networks])
    if options.only in (None, "speed"):
        yield [{"question": "speed", **row} for row in speed.measure(tools, options.quick, options.rounds)]
    if options.only in (None, "leftover"):
        for row in leftover.measure(options.quick, options.rounds):
            yield [{"question": "leftover", **row}]


def _wanted(subject: Subject, options: argparse.Namespace) -> bool:
    return not options.subjects or any(text in subject.name for text in options.subjects)


def _rows(about: dict[str, Any], subject: Subject, tools: Sequence[Tool]) -> list[dict[str, Any]]:
    rows = []
    for row in compare(subject, tools):
        print(f"{subject.name}: {row['tool']}: {verdict(row)}, {row['left']} of {row['norms']} left", flush=True)
        rows.append({**about, "subject": subject.name, **row})
    return rows


def _store(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a file, in place of older ones about the same."""
    new = {_about(row): row for row in rows}
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [row for row in kept if _about(row) not in new]
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in [*kept, *new.values()]))


def _about(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["question"], row["package"] if "package" in row else row["family"], row["subject"], row["tool"])


if __name__ == "__main__":
    main()
