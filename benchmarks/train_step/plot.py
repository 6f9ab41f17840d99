"""The plot of the report: time ÷ limit of every competitor, shape by shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.figures import save, subplots
from benchmarks.train_step.compare import LAYOUTS, WHOLE, WORKS, Rows
from benchmarks.train_step.competitors import COPY
from benchmarks.train_step.tables import TITLES

# Okabe & Ito's colours, which colour-blind readers tell apart; one marker each for those who print
_STYLES = {
    "torch": ("#D55E00", "o", "-"),
    "torch-thp": ("#E69F00", "s", "--"),
    "torch-compile": ("#7F7F7F", "^", "-"),
    "batchnorm": ("#0072B2", "D", "-"),
    "batchnorm-thp": ("#56B4E9", "v", "--"),
}


def draw(rows: Rows, path: Path) -> None:
    """Draw a panel for each work and layout at the largest batch; the file's suffix says in which format."""
    rows = rows.select(group="layers", phase=WHOLE)
    batch = max(int(str(value)) for value in rows.values("batch"))
    rows = rows.select(batch=batch)
    works, layouts = rows.values("work"), rows.values("layout")
    size = (4.2 * len(works), 3.4 * len(layouts) + 0.9)
    figure, panels = subplots(len(layouts), len(works), figsize=size, sharey=True, squeeze=False)
    for across, layout in zip(panels, layouts, strict=True):
        for panel, work in zip(across, works, strict=True):
            _panel(panel, rows.select(work=work, layout=layout))
            panel.set_title(f"{WORKS[str(work)]}, {LAYOUTS[str(layout)]}")
        across[0].set_ylabel("time ÷ limit")
    ratios = [row["ratio"] for row in rows.all if "ratio" in row]
    panels[0][0].set_ylim(min(0.5, *ratios) / 1.1, max(2, *ratios) * 1.3)  # all panels share it
    for panel in panels[-1]:
        panel.set_xlabel("channels @ height = width")
    named: dict[str, Any] = {}  # not every competitor is in every panel
    for panel in panels.flat:
        handles, labels = panel.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(list(named.values()), list(named), loc="upper center", ncols=6, frameon=False)
    figure.suptitle(f"Training, forward + backward, float32, batch {batch}: lower is faster", y=0.945, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    save(figure, path)


def _panel(panel: Any, rows: Rows) -> None:
    places = {name: place for place, name in enumerate(rows.values("shape_name"))}
    for name in rows.values("competitor"):
        if name == COPY or name not in _STYLES:
            continue
        colour, marker, line = _STYLES[str(name)]
        mine = {shape: row["ratio"] for shape, row in rows.select(competitor=name).by_shape().items() if "ratio" in row}
        x, y = [places[shape] for shape in mine], list(mine.values())
        panel.plot(x, y, line, color=colour, marker=marker, markersize=5, linewidth=1.3, label=TITLES[str(name)])
    panel.axhline(1, color="black", linewidth=1.5, label="limit: the fewest bytes, at a copy's speed")
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xticks(list(places.values()), list(places), rotation=35, ha="right", rotation_mode="anchor")
    panel.set_xlim(-0.4, max(len(places) - 0.6, 0.4))
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)
