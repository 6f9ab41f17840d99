"""Write the manual's pages on performance, and their plot, from rows; no number in them is typed by hand.

    python -m benchmarks.train_step.report [rows.jsonl ...]

The sentences stand in ``performance.md.jinja`` and ``performance-table.md.jinja``; edit those, not what is written.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.sheets import commits, page_options, write_page
from benchmarks.train_step import plot, tables
from benchmarks.train_step.compare import LAYOUTS, WHOLE, WORKS, Rows
from benchmarks.train_step.rows import ROOT, ROWS, read

_PAGES = ("performance.md", "performance-table.md")
_PLOT = "images/train_step.svg"
_LARGE = 25e6  # bytes of a tensor that no longer shares the cache with another


def main() -> None:
    parser = page_options(__doc__)
    parser.add_argument("rows", type=Path, nargs="*", default=[ROWS], help="files of rows; a later one wins")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the pages go")
    options = parser.parse_args()
    rows = Rows(read(options.rows))
    commits(rows.all, changed=options.changed)  # before the plot is drawn
    if rows.select(group="layers").all:
        plot.draw(rows, options.docs / _PLOT)
    for page in _PAGES:
        template = Path(__file__).with_name(f"{page}.jinja")
        print(write_page(options.docs / page, template, _facts(rows), rows.all, changed=options.changed))


def _facts(rows: Rows) -> dict[str, Any]:
    """Return all that the pages may speak of."""
    layers = rows.select(group="layers")
    groups = {group: rows.select(group=group) for group in ("bfloat16", "small", "memory", "nets")}
    return {
        "measured": bool(layers.all),
        "machines": _machines(rows),
        "quick": any(row.get("quick") for row in rows.all),
        "backends": _backends(rows),
        "inplace": any(row["inplace"] for row in layers.select(competitor="batchnorm").all),
        "overall": {rival: _overall(layers, rival) for rival in ("torch", "torch-compile")},
        "over_limit": layers.select(phase=WHOLE).over_limit("batchnorm"),
        "torch_over_limit": layers.select(phase=WHOLE).over_limit("torch"),
        "speedups": tables.speedups(layers, "batchnorm", ("torch", "torch-compile"), WHOLE),
        "speedups_thp": tables.speedups(layers, "batchnorm-thp", ("torch-thp", "torch"), WHOLE),
        "inplace_norm": tables.speedups(layers.select(work="norm"), "batchnorm-inplace", ("torch", "batchnorm"), WHOLE),
        "large": tables.near_limit(layers, ("torch", "batchnorm", "batchnorm-thp"), WHOLE, _LARGE),
        "speedups_forward": tables.speedups(layers, "batchnorm", ("torch", "torch-compile"), "forward"),
        "speedups_forward_thp": tables.speedups(layers, "batchnorm-thp", ("torch-thp", "torch"), "forward"),
        "every_shape": tables.every_shape(layers),
        "plot": _PLOT,
        "rounds": _span(row["rounds"] for row in rows.all if "rounds" in row),
        "bfloat16": tables.speedups(groups["bfloat16"], "batchnorm", ("torch", "torch-compile"), WHOLE),
        "bfloat16_shapes": tables.every_shape(groups["bfloat16"]),
        "small": tables.small(groups["small"]) if groups["small"].all else "",
        "memory": tables.memory(groups["memory"]) if groups["memory"].all else "",
        "nets": tables.networks(groups["nets"]) if groups["nets"].all else "",
        "packages": sorted({row["package"] for row in groups["nets"].all}),
    }


def _machines(rows: Rows) -> list[dict[str, Any]]:
    columns = ("device", "cache", "threads", "load", "huge_pages", "torch", "batchnorm", "commit", "python", "date")
    found = dict.fromkeys(tuple(row[column] for column in columns) for row in rows.all)
    return [dict(zip(columns, values, strict=True)) for values in found]


def _backends(rows: Rows) -> list[tuple[str, int]]:
    """Return who served this library's layers, and in how many cases, the most frequent first."""
    mine = [row for row in rows.select(competitor="batchnorm").all if row["phase"] in (WHOLE, "memory", "step")]
    return Counter(row["backend"] for row in mine).most_common()


def _overall(layers: Rows, rival: str) -> dict[str, Any] | None:
    """Return mean and least speed-up over all works, layouts and batches; None where the rival has no rows."""
    some = layers.select(phase=WHOLE)
    parts = [
        (found, work, layout, batch)
        for work in some.values("work")
        for layout in some.values("layout")
        for batch in some.values("batch")
        if (found := some.select(work=work, layout=layout, batch=batch).speedup("batchnorm", rival)) is not None
    ]
    if not parts:
        return None
    count = sum(found.count for found, *_ in parts)
    product = 1.0
    for found, *_ in parts:
        product *= found.mean ** (found.count / count)
    least, work, layout, batch = min(parts, key=lambda part: part[0].least)
    where = f"{least.where}, {WORKS[str(work)]}, {LAYOUTS[str(layout)]}, batch {batch}"
    return {"mean": product, "least": least.least, "where": where, "count": count}


def _span(values: Any) -> str:
    found = sorted(set(values))
    return "–".join(map(str, found[:: max(1, len(found) - 1)]))


if __name__ == "__main__":
    main()
