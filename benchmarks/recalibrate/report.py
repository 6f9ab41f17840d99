"""Write the manual's page of measurements, and its plot, from rows; no number in them is typed by hand.

    python -m benchmarks.recalibrate.report

The sentences stand in ``recalibrate-table.md.jinja``; edit those, not what is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.figures import save, subplots
from benchmarks.recalibrate.__main__ import ROWS
from benchmarks.sheets import commits, page_options, write_page
from benchmarks.train_step.rows import ROOT

_PAGE = "recalibrate-table.md"
_PLOT = "images/recalibrate_depth.svg"
_STYLES = {
    "update_bn": ("#D55E00", "o", "torch's update_bn"),
    "fvcore": ("#E69F00", "s", "fvcore"),
    "parallel": ("#009E73", "^", 'order="parallel"'),
    "sequential": ("#0072B2", "D", 'order="sequential"'),
}


def main() -> None:
    options = page_options(__doc__).parse_args()
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    commits(rows, changed=options.changed)  # before the plot is drawn
    exact = [row for row in rows if row["question"] == "exact"]
    streams = [row for row in rows if row["question"] == "streams"]
    cost = [row for row in rows if row["question"] == "cost"]
    draw([row for row in exact if row["cut"] == "8"], ROOT / "docs" / _PLOT)
    facts = {
        "about": rows[0],
        "cuts": list(dict.fromkeys(row["cut"] for row in exact)),
        "methods": list(dict.fromkeys(row["method"] for row in exact)),
        "worst": {(row["cut"], row["method"]): [max(e[i] for e in row["errors"]) for i in (0, 1)] for row in exact},
        "deepest": {(row["cut"], row["method"]): row["errors"][-1] for row in exact},
        "values": list(dict.fromkeys(row["values"] for row in streams)),
        "stream_cuts": list(dict.fromkeys(row["cut"] for row in streams)),
        "stream_methods": list(dict.fromkeys(row["method"] for row in streams)),
        "streams": {(row["values"], row["cut"], row["method"]): row["errors"] for row in streams},
        "networks": list(dict.fromkeys(row["network"] for row in cost)),
        "costs": {(row["network"], row["method"]): row for row in cost},
        "ways": list(dict.fromkeys(row["method"] for row in cost)),
    }
    template = Path(__file__).with_name(f"{_PAGE}.jinja")
    print(write_page(ROOT / "docs" / _PAGE, template, facts, rows, changed=options.changed))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the error of the variance at every norm, from the first to the deepest."""
    figure, panels = subplots(1, 2, figsize=(9, 3.6), sharex=True, sharey=True)
    for panel, index, title in ((panels[0], 0, "mean, in standard deviations"), (panels[1], 1, "variance, relative")):
        for row in rows:
            if row["method"] in _STYLES:
                colour, marker, label = _STYLES[row["method"]]
                errors = [max(e[index], 1e-9) for e in row["errors"]]
                depth = range(1, len(errors) + 1)
                panel.semilogy(depth, errors, color=colour, marker=marker, markersize=4, linewidth=1.2, label=label)
        panel.set_title(title)
        panel.set_xlabel("norm, from the first to the deepest")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("largest error of a channel")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncol=4, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    save(figure, path)


if __name__ == "__main__":
    main()
