"""Write the manual's confusion table from rows; no number in it is typed by hand.

    python -m benchmarks.diagnose.report [rows.jsonl]

The sentences stand in ``diagnose-table.md.jinja``; edit those, not what is written.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.diagnose.cases import HEALTHY_CAUSE, NOTHING, Row
from benchmarks.sheets import page_options, write_page
from benchmarks.train_step.tables import markdown

__all__ = ["ROWS", "summary", "write"]

ROWS = Path(__file__).with_name("rows.jsonl")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "diagnose-table.md"
_FAILED = "failed"


def main() -> None:
    parser = page_options(__doc__)
    parser.add_argument("rows", type=Path, nargs="?", default=ROWS)
    options = parser.parse_args()
    rows = [json.loads(text) for text in options.rows.read_text().splitlines()]
    print(summary(rows))
    print(write(rows, changed=options.changed))


def summary(rows: Sequence[Row]) -> str:
    """Return the rates in a few lines of plain text."""
    planted, healthy = _split(rows)
    lines = []
    if planted:
        lines += [
            f"{len(planted)} faults: right cause first {_share(planted, 'right_cause')}, "
            f"right layer first {_share(planted, 'right_layer')}, both {_both(planted)}"
        ]
    if healthy:
        lines += [f"{len(healthy)} healthy models: no finding in {_share(healthy, 'right_cause')}"]
    return "\n".join(lines)


def write(rows: Sequence[Row], page: Path = PAGE, *, changed: bool = False) -> Path:
    """Write the page, and return where it is; ``changed`` as for :func:`benchmarks.sheets.write_page`."""
    planted, healthy = _split(rows)
    columns = ("device", "torch", "batchnorm", "date")
    facts = {
        "about": {column: rows[0][column] for column in columns},
        "seeds": sorted({row["seed"] for row in rows}),
        "architectures": sorted({row["architecture"] for row in rows}),
        "planted": len(planted),
        "forms": len({row["fault"] for row in planted}),
        "causes": len({row["cause"] for row in planted}),
        "healthy": len(healthy),
        "right_cause": _share(planted, "right_cause"),
        "right_layer": _share(planted, "right_layer"),
        "both": _both(planted),
        "in_three": _in_three(planted),
        "quiet": _share(healthy, "right_cause"),
        "confusion": _confusion(planted),
        "by_cause": _rates(planted, lambda row: row["cause"]),
        "by_architecture": _rates(planted, lambda row: row["architecture"]),
        "by_form": _rates(planted, lambda row: row["fault"]),
        "healthy_table": _healthy(healthy),
        "seconds": statistics.median(row["seconds"] for row in rows),
    }
    return write_page(page, Path(__file__).with_name("diagnose-table.md.jinja"), facts, rows, changed=changed)


def _split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    planted = [row for row in rows if row["cause"] != HEALTHY_CAUSE]
    return planted, [row for row in rows if row["cause"] == HEALTHY_CAUSE]


def _named(row: Row) -> str:
    """Return the cause that was named first."""
    return row["found"][0]["cause"] if row["found"] else _FAILED if row["failed"] else NOTHING


def _confusion(rows: Sequence[Row]) -> str:
    """Return planted causes × causes named first; columns have the numbers of the rows."""
    causes = list(dict.fromkeys(row["cause"] for row in rows))
    others = sorted({_named(row) for row in rows} - {*causes, NOTHING, _FAILED})
    columns = [*causes, *others, NOTHING, _FAILED]
    counts = Counter((row["cause"], _named(row)) for row in rows)
    header = ["planted", *(str(number) for number, _ in enumerate(causes, 1)), *others, NOTHING, _FAILED]
    lines = []
    for number, cause in enumerate(causes, 1):
        cells = [str(counts[cause, column] or "·") for column in columns]
        cells[number - 1] = f"**{cells[number - 1]}**"
        lines.append([f"{number} {cause}", *cells])
    return markdown(header, lines)


def _rates(rows: Sequence[Row], key: Callable[[Row], str]) -> str:
    """Return a row for each group: cases, damage, and how often cause and layer are right."""
    header = ["planted", "cases", "accuracy, right", "with the fault", "output gap", "layer gap"]
    lines = []
    for name in dict.fromkeys(map(key, rows)):
        some = [row for row in rows if key(row) == name]
        damage = [f"{statistics.mean(row[column] for row in some):.1%}" for column in _ACCURACIES]
        gaps = [_median([row[column] for row in some]) for column in ("output_gap", "layer_gap")]
        rates = [_share(some, "right_cause"), _share(some, "right_layer"), _both(some)]
        lines.append([name, str(len(some)), *damage, *gaps, *rates])
    return markdown([*header, "right cause first", "right layer first", "both"], lines)


_ACCURACIES = ("accuracy_before", "accuracy_after")


def _median(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    middle = statistics.median(known)
    return "∞" if math.isinf(middle) else f"{middle:.2f}"


def _healthy(rows: Sequence[Row]) -> str:
    lines = []
    for name in dict.fromkeys(row["fault"] for row in rows):
        some = [row for row in rows if row["fault"] == name]
        alarms = Counter(_named(row) for row in some if not row["right_cause"])
        told = ", ".join(f"{cause} {count}" for cause, count in alarms.most_common())
        lines.append([name, str(len(some)), str(alarms.total()), told or "–"])
    return markdown(["model", "cases", "false alarms", "which"], lines)


def _share(rows: Sequence[Row], column: str) -> str:
    return _percent([bool(row[column]) for row in rows])


def _both(rows: Sequence[Row]) -> str:
    return _percent([row["right_cause"] and row["right_layer"] for row in rows])


def _in_three(rows: Sequence[Row]) -> str:
    """Return how often the right cause at a right layer is among the first three findings."""
    return _percent(
        [any(f["cause"] == row["cause"] and f["layer"] in row["layers"] for f in row["found"]) for row in rows]
    )


def _percent(hits: Sequence[bool]) -> str:
    return f"{sum(hits) / len(hits):.1%}" if hits else "–"


if __name__ == "__main__":
    main()
