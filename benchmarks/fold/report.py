"""Write the manual's page on folding beside other tools, from rows; no number in it is typed by hand.

    python -m benchmarks.fold.report

The sentences stand in ``fold-table.md.jinja``; edit those, not what is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.fold.__main__ import ROWS
from benchmarks.fold.errors import ROUNDINGS, WRONG
from benchmarks.fold.leftover import TITLES
from benchmarks.fold.networks import NETWORKS
from benchmarks.fold.patterns import PATTERNS
from benchmarks.fold.speed import EAGER
from benchmarks.fold.tools import OURS, OURS_EXPORTED, TOOLS
from benchmarks.sheets import page_options, write_page
from benchmarks.train_step.rows import ROOT

from benchmarks.fold import tables

__all__ = ["facts"]

Row: TypeAlias = dict[str, Any]

_PAGE = "fold-table.md"


def main() -> None:
    options = page_options(__doc__).parse_args()
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    template = Path(__file__).with_name(f"{_PAGE}.jinja")
    print(write_page(ROOT / "docs" / _PAGE, template, facts(rows), rows, changed=options.changed))


def facts(rows: list[Row]) -> dict[str, Any]:
    """Return all that the page may speak of."""
    patterns = _ordered(rows, "patterns", [(pattern.family, pattern.name) for pattern in PATTERNS])
    networks = _ordered(rows, "networks", [(network.package, network.name) for network in NETWORKS])
    speed = [row for row in rows if row["question"] == "speed"]
    leftover = [row for row in rows if row["question"] == "leftover"]
    titles = {EAGER: "eager"} | {tool.name: tool.title for tool in TOOLS}
    return {
        "machines": tables.machines(rows),
        "versions": sorted({row["version"] for row in rows}),
        "wrong": WRONG,
        "roundings": ROUNDINGS,
        "skipped": tables.skipped(patterns + networks, titles),
        "patterns": len({(row["family"], row["subject"]) for row in patterns}),
        "networks": len({(row["package"], row["subject"]) for row in networks}),
        "pattern_totals": tables.pattern_totals(patterns, titles),
        "network_totals": tables.network_totals(networks, titles),
        "ours": [
            row
            for name in (OURS, OURS_EXPORTED)
            for row in tables.tally(patterns + networks, name)
            if row["verdict"] != "right"
        ],
        "families": [(family, tables.patterns(some, titles)) for family, some in tables.by_family(patterns)],
        "missed": tables.missed(patterns, networks, OURS, titles),
        "left_by_all": tables.left_by_all(patterns),
        "network_table": tables.networks(networks, titles),
        "raised": tables.raised(patterns + networks, titles),
        "speed": tables.speed(speed, titles),
        "sides": sorted({row["side"] for row in speed}),
        "rounds": sorted({row["rounds"] for row in speed}),
        "speed_about": tables.machines(speed),
        "leftover": tables.speed(leftover, TITLES),
        "leftover_about": tables.machines(leftover),
        "inductor": any(row["tool"] == "inductor" for row in patterns),
    }


def _ordered(rows: list[Row], question: str, subjects: list[tuple[str, str]]) -> list[Row]:
    """Return the rows of a question, in the order of the subjects that it has; others are of the past."""
    place = {subject: index for index, subject in enumerate(subjects)}
    some = [row for row in rows if row["question"] == question and _subject(row) in place]
    return sorted(some, key=lambda row: place[_subject(row)])


def _subject(row: Row) -> tuple[str, str]:
    return row["package"] if "package" in row else row["family"], row["subject"]


if __name__ == "__main__":
    main()
