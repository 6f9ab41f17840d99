"""Draw the picture at the top of the README from the rows of three benchmarks; no number in it is typed by hand.

python -m benchmarks.overview
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import geometric_mean
from typing import Any, TypeAlias

from benchmarks.figures import save, subplots
from benchmarks.fold.__main__ import ROWS as FOLD_ROWS
from benchmarks.fold.tables import tally
from benchmarks.fold.tools import OURS, OURS_EXPORTED, TOOLS
from benchmarks.recalibrate.__main__ import ROWS as RECALIBRATE_ROWS
from benchmarks.sheets import commits, page_options
from benchmarks.train_step.compare import LAYOUTS, WHOLE, WORKS, Rows
from benchmarks.train_step.rows import ROOT, read
from benchmarks.train_step.rows import ROWS as TRAIN_ROWS

Row: TypeAlias = dict[str, Any]

PATH = ROOT / "docs" / "images" / "overview.svg"
_OURS, _OTHERS = "#56B4E9", "#CCCCCC"


def main() -> None:
    print("from rows of", *draw(PATH, changed=page_options(__doc__).parse_args().changed))
    print(PATH)


def draw(path: Path, *, changed: bool = False) -> list[str]:
    """Draw a panel a claim, and return the commits of the rows; the file's suffix says in which format.

    Raises:
        ChangedTreeError: as for :func:`benchmarks.sheets.commits`; nothing is drawn.
    """
    measured, folded = _rows(RECALIBRATE_ROWS, "exact"), _rows(FOLD_ROWS, "networks")
    trained = Rows(read([TRAIN_ROWS])).select(group="layers", phase=WHOLE)
    known = commits([*measured, *folded, *trained.all], changed=changed)
    figure, (left, middle, right) = subplots(1, 3, fonttype="path", figsize=(13, 3.4), layout="constrained")
    _measured(left, measured)
    _folded(middle, folded)
    _trained(right, trained)
    for panel in (left, middle, right):
        panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)
    return known


def _rows(path: Path, question: str) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["question"] == question]


def _measured(panel: Any, rows: list[Row]) -> None:
    """Draw the error of the variance at every norm, from the first to the deepest."""
    shown = {
        "update_bn": ("torch's update_bn", "#777777", "o"),
        "sequential": ("batchnorm.recalibrate", "#0072B2", "D"),
    }
    for row in rows:
        if row["cut"] == "8" and row["method"] in shown:
            label, colour, marker = shown[row["method"]]
            errors = [max(variance, 1e-9) for _, variance in row["errors"]]
            depth = range(1, len(errors) + 1)
            panel.semilogy(depth, errors, color=colour, marker=marker, markersize=4, linewidth=1.2, label=label)
    panel.set_title("recalibrate: error of the stored variance")
    panel.set_xlabel("norm, from the first to the deepest")
    panel.set_ylabel("relative error")
    panel.set_ylim(1e-8, 1)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, loc="center right")


def _folded(panel: Any, rows: list[Row]) -> None:
    """Draw a bar a tool: the share of the norms of all networks that it removed with the right outputs."""
    names = {OURS: "batchnorm", OURS_EXPORTED: "batchnorm, exported"} | {
        tool.name: tool.title for tool in TOOLS if tool.name not in (OURS, OURS_EXPORTED)
    }
    shares: dict[str, float] = {}
    wrong: dict[str, int] = {}
    for name, title in names.items():
        some = tally(rows, name)
        if some:
            gone = sum(row["norms"] - row["left"] for row in some if row["verdict"] == "right")
            shares[title] = gone / sum(row["norms"] for row in some)
            wrong[title] = sum(row["verdict"] in ("wrong", "raised") for row in some)
    titles = sorted(shares, key=shares.__getitem__)
    colours = [_OURS if title.startswith("batchnorm") else _OTHERS for title in titles]
    panel.barh(titles, [100 * shares[title] for title in titles], color=colours)
    for place, title in enumerate(titles):
        failed = f"   {wrong[title]} wrong or failed" if wrong[title] else ""
        panel.text(100 * shares[title] - 2, place, f"{100 * shares[title]:.0f} %", ha="right", va="center")
        panel.text(100 * shares[title], place, failed, va="center", fontsize=8)
    panel.set_xlim(0, 100)
    networks = len({(row["package"], row["subject"]) for row in rows})
    panel.set_title(f"fold: norms removed, of {networks} networks")
    panel.set_xlabel("% of all norms")


def _trained(panel: Any, rows: Rows) -> None:
    """Draw a bar for each work and layout: the geometric mean over the shapes of the speed-up over torch."""
    labels, speeds = [], []
    for work in rows.values("work"):
        for layout in rows.values("layout"):
            some = rows.select(work=work, layout=layout)
            means = [some.select(batch=batch).speedup("batchnorm", "torch") for batch in some.values("batch")]
            labels.append(f"{WORKS[str(work)]},\n{LAYOUTS[str(layout)]}")
            speeds.append(geometric_mean([found.mean for found in means if found is not None]))
    panel.barh(labels[::-1], speeds[::-1], color=_OURS)
    for place, speed in enumerate(speeds[::-1]):
        panel.text(speed - 0.05, place, f"{speed:.1f} ×", ha="right", va="center")
    panel.axvline(1, color="black", linewidth=1, linestyle=":")
    panel.set_title("train: speed-up over torch (CPU)")
    panel.tick_params(axis="y", labelsize=8)
    panel.set_xlabel("forward + backward, geometric mean")


if __name__ == "__main__":
    main()
