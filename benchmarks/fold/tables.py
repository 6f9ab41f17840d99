"""Tables of the report, in Markdown, made from rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeAlias

from benchmarks.fold.measure import verdict
from benchmarks.fold.tools import OURS, OURS_EXPORTED
from benchmarks.train_step.tables import markdown

__all__ = [
    "by_family",
    "left_by_all",
    "machines",
    "missed",
    "network_totals",
    "networks",
    "pattern_totals",
    "patterns",
    "raised",
    "skipped",
    "speed",
    "tally",
]

Row: TypeAlias = dict[str, Any]
Titles: TypeAlias = Mapping[str, str]

_NOTHING = "–"


def machines(rows: Sequence[Row]) -> list[Row]:
    """Return where and when rows were measured, each once, with the commits that were measured there."""
    columns = ("device", "threads", "torch", "batchnorm", "date")
    found: dict[tuple[Any, ...], dict[str, None]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), {})[row["commit"]] = None
    return [{**dict(zip(columns, values, strict=True)), "commits": list(commits)} for values, commits in found.items()]


def tally(rows: Iterable[Row], tool: str | None = None) -> list[Row]:
    """Return rows with their verdict, of one tool or of all."""
    return [{**row, "verdict": verdict(row)} for row in rows if tool in (None, row["tool"])]


def by_family(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Return the rows of each family; they are sorted by place."""
    return [(family, list(some)) for family, some in groupby(rows, key=lambda row: row["family"])]


def pattern_totals(rows: Sequence[Row], titles: Titles) -> str:
    """Return a row a tool: folded as far as can be, left alone where nothing can go, wrong, raised, not judged."""
    lines = []
    for tool in _tools(rows, titles):
        some = tally(rows, tool)
        cells = []
        for can in (True, False):
            kind = [row for row in some if (row["least"] < row["norms"]) == can]
            counted = [row for row in kind if row["verdict"] == "right" and row["left"] is not None]
            full = sum(row["left"] <= row["least"] for row in counted)
            cells.append(f"{full} of {len(kind)}" if any(row["left"] is not None for row in some) else _NOTHING)
        lines.append([titles[tool], *cells, *_failures(some)])
    header = ["tool", "folded as far as can be", "left alone where nothing can go", "wrong", "raised", "not judged"]
    return markdown(header, lines)


def network_totals(rows: Sequence[Row], titles: Titles) -> str:
    """Return a row a tool: norms removed with the right outputs, and how many networks it failed on."""
    if not rows:
        return ""
    lines = []
    for tool in _tools(rows, titles):
        some = tally(rows, tool)
        norms = sum(row["norms"] for row in some)
        right = [row for row in some if row["verdict"] == "right"]
        gone = sum(row["norms"] - row["left"] for row in right)
        whole = sum(row["left"] == 0 for row in right)
        cells = [f"{gone} of {norms}", f"{gone / norms:.0%}", f"{whole} of {len(some)}"]
        lines.append([titles[tool], *cells, *_failures(some)])
    header = ["tool", "norms removed", "", "networks left without norms", "wrong", "raised", "not judged"]
    return markdown(header, lines)


def _failures(rows: Sequence[Row]) -> list[str]:
    counts = Counter(row["verdict"] for row in rows)
    return [f"**{counts['wrong']}**" if counts["wrong"] else "0", str(counts["raised"]), str(counts["skipped"])]


def patterns(rows: Sequence[Row], titles: Titles) -> str:
    """Return a row a pattern: its norms, the fewest that can be left, and what each tool left."""
    return _left(rows, titles, ["norms", "least"], lambda row: [str(row["norms"]), str(row["least"])])


def networks(rows: Sequence[Row], titles: Titles) -> str:
    """Return a row a network: its norms, what each tool left, and the larger error of our own two."""
    if not rows:
        return ""
    errors: dict[str, float] = {}
    for row in rows:
        if row["tool"] in (OURS, OURS_EXPORTED) and row["error"] is not None:
            errors[_subject(row)] = max(errors.get(_subject(row), 0.0), row["error"])

    def columns(row: Row) -> list[str]:
        error = errors.get(_subject(row))
        return [str(row["norms"]), _NOTHING if error is None else f"{error:.0e}"]

    return _left(rows, titles, ["norms", "our error"], columns)


def _left(rows: Sequence[Row], titles: Titles, header: Sequence[str], columns: Any) -> str:
    tools = _tools(rows, titles)
    lines = []
    for subject, some in groupby(rows, key=_subject):
        cells = {row["tool"]: row for row in some}
        first = next(iter(cells.values()))
        lines.append([subject, *columns(first), *(_cell(cells.get(tool)) for tool in tools)])
    return markdown(["", *header, *(titles[tool] for tool in tools)], lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return _NOTHING
    found = verdict(row)
    if found == "wrong":
        return f"**wrong, {row['error']:.1g}**"
    if found == "raised":
        return "raises"
    if found == "skipped":
        return _NOTHING
    return "right" if row["left"] is None else str(row["left"])


def missed(patterns: Sequence[Row], networks: Sequence[Row], tool: str, titles: Titles) -> list[Row]:
    """Return where one tool leaves norms that another removes and is right; who, and how many each leaves."""
    found = []
    for subject, some in _grouped([*patterns, *networks]):
        rows = tally(some)
        own = next((row for row in rows if row["tool"] == tool), None)
        if own is None:
            continue
        left = own["left"] if own["verdict"] == "right" else own["norms"]
        better = [row for row in rows if row["verdict"] == "right" and row["left"] is not None and row["left"] < left]
        if better:
            others = ", ".join(f"{titles[row['tool']]} {row['left']}" for row in better)
            found.append({"subject": subject, "left": left, "others": others})
    return found


def left_by_all(rows: Sequence[Row]) -> list[str]:
    """Return the patterns in which every tool leaves more norms than an exact fold has to."""
    found = []
    for subject, some in _grouped(rows):
        right = [row for row in tally(some) if row["verdict"] == "right" and row["left"] is not None]
        if all(row["left"] > row["least"] for row in right):
            found.append(subject)
    return found


def raised(rows: Sequence[Row], titles: Titles) -> str:
    """Return a row a tool and kind of error: how often, and the first message."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["raised"] is not None:
            kind = row["raised"].partition(":")[0]
            found.setdefault((row["tool"], kind), []).append(f"{row['subject']}: {row['raised']}")
    lines = [[titles[tool], f"`{kind}`", str(len(told)), _plain(told[0])] for (tool, kind), told in found.items()]
    return markdown(["tool", "error", "times", "the first"], lines) if lines else ""


def skipped(rows: Sequence[Row], titles: Titles) -> list[str]:
    """Return a line for each subject and reason that some tools were not judged."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["skipped"] is not None:
            found.setdefault(f"{_subject(row)}: {row['skipped']}", []).append(titles[row["tool"]])
    return [f"{told} ({', '.join(names)})" for told, names in found.items()]


def _plain(text: str) -> str:
    """Return a message that a table can hold: as code, without what would end the cell."""
    return f"`{text.replace('|', '/').replace('`', chr(39))}`"


def speed(rows: Sequence[Row], titles: Titles) -> str:
    """Return a row a network and batch: milliseconds, and the ratio to eager."""
    tools = _tools(rows, titles)
    lines = []
    for subject, some in groupby(rows, key=lambda row: row["subject"]):
        cells = {row["tool"]: row for row in some}
        lines.append([subject, *(_latency(cells.get(tool)) for tool in tools)])
    return markdown(["", *(titles[tool] for tool in tools)], lines) if lines else ""


def _latency(row: Row | None) -> str:
    return _NOTHING if row is None else f"{row['median'] * 1e3:.1f} ({row['ratio']:.2f})"


def _tools(rows: Iterable[Row], titles: Titles) -> list[str]:
    present = {row["tool"] for row in rows}
    return [tool for tool in titles if tool in present]


def _subject(row: Row) -> str:
    return f"{row['subject']} ({row['package']})" if "package" in row else str(row["subject"])


def _grouped(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for subject, some in groupby(rows, key=_subject):
        yield subject, list(some)
