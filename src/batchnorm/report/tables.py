"""Tables in a terminal: columns as wide as there is room for, in which no word is broken.

Whoever reads a layer's name in a table wants to copy it. So a column is at least as wide as its longest word, lines
end between words only, and where all that finds no room, columns are left out that the table can do without, or each
row becomes a paragraph of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from batchnorm.report.cells import format_cell, is_numeric
from batchnorm.report.document import Table, Tone

__all__ = ["STYLE", "fitted", "pairs", "widths"]

STYLE: dict[Tone, str] = {"plain": "", "good": "green", "bad": "red"}
_BETWEEN = 2
_PROSE = 22
"""A column of sentences is no narrower than this: of lines of one word each nobody reads a sentence."""


def widths(columns: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """Return how wide each column is, by its texts; None if they cannot stand beside each other without broken words.

    Each gets what its longest word needs, and the rest of the room goes to those that would have lines end.

    >>> widths([["layer1.0.bn1", "name"], ["it has no statistics of its own"]], 40)
    [12, 26]
    >>> widths([["layer1.0.bn1"], ["backbone.layer3.12.conv_block.bn2"]], 40)
    """
    whole = [max(map(cell_len, texts), default=0) for texts in columns]
    size = [_least(texts, wanted) for texts, wanted in zip(columns, whole, strict=True)]
    spare = room - _BETWEEN * (len(columns) - 1) - sum(size)
    if spare < 0:
        return None
    while spare > 0 and (short := [i for i, wanted in enumerate(whole) if size[i] < wanted]):
        for i in short[:spare]:
            size[i] += 1
        spare -= len(short[:spare])
    return size


def _least(texts: Iterable[str], whole: int) -> int:
    longest = _longest_word(texts)
    return max(longest, _PROSE) if whole > 2 * _PROSE else longest


def _longest_word(texts: Iterable[str]) -> int:
    return max((cell_len(word) for text in texts for word in _words(text)), default=0)


def _words(text: str) -> list[str]:
    """Return what stands between spaces and ends of lines; a no-break space is inside a word."""
    return [word for word in re.split("[ \n]", text) if word]


def _broken(text: str, width: int) -> str:
    r"""Return a text with ends of lines where it is to be broken: Rich would break at no-break spaces, too.

    >>> _broken("variance\xa0×\xa00.961, mean", 18).splitlines()
    ['variance\xa0×\xa00.961,', 'mean']
    """
    if cell_len(text) <= width:
        return text
    lines: list[str] = [""]
    for word in _words(text):
        longer = f"{lines[-1]} {word}".lstrip()
        if cell_len(longer) <= width:
            lines[-1] = longer
        else:
            lines += [word]
    return "\n".join(line for line in lines if line)


def fitted(table: Table, room: int, more: str) -> RenderableType:
    """Return a table that is no wider than ``room``.

    Args:
        table: whose texts are harmless.
        room: in columns of the terminal.
        more: how the whole is shown, if columns may be left out; ``""`` if not.
    """
    texts = [[name, *(format_cell(row[index]) for row in table.rows)] for index, name in enumerate(table.columns)]
    kept, gone = list(range(len(texts))), []
    size = widths(texts, room)
    for name in table.optional if more else ():
        if size is not None:
            break
        kept.remove(table.columns.index(name))
        gone.append(name)
        size = widths([texts[i] for i in kept], room)
    body = _records(table, texts, kept) if size is None else _grid(table, texts, kept, size)
    title = [Text(table.title, style="italic")] if table.title else []
    rest = [table.rest] * bool(table.rest) + [f"No room for: {', '.join(gone)}; {more} shows all."] * bool(gone)
    return Group(*title, body, *(Text(line) for line in rest), *caption(table.caption))


def caption(text: str) -> list[Text]:
    """Return what stands below a table or a map."""
    return [Text(text, style="dim italic")] if text else []


def _grid(table: Table, texts: Sequence[Sequence[str]], kept: Sequence[int], size: Sequence[int]) -> RichTable:
    grid = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for index, width in zip(kept, size, strict=True):
        numeric = is_numeric(row[index] for row in table.rows)
        grid.add_column(Text(texts[index][0]), justify="right" if numeric else "left", width=width, overflow="fold")
    for number in range(len(table.rows)):
        cells = [Text(_broken(texts[i][number + 1], width)) for i, width in zip(kept, size, strict=True)]
        grid.add_row(*cells, style=STYLE[table.tones.get(number, "plain")])
    return grid


def _records(table: Table, texts: Sequence[Sequence[str]], kept: Sequence[int]) -> RenderableType:
    """Return each row as its first cell, and below it the others with the names of their columns."""
    *firsts, first = kept[: 1 if texts[kept[0]][0] else 2]  # a column without a name holds numbers of the rows
    others = kept[len(firsts) + 1 :]
    parts: list[RenderableType] = []
    for number in range(1, len(table.rows) + 1):
        style = STYLE[table.tones.get(number - 1, "plain")]
        before = "".join(f"{texts[i][number]}. " for i in firsts)
        head = f"{before}{texts[first][0]} {texts[first][number]}"
        said = [f"{texts[i][0]}: {texts[i][number]}" for i in others if texts[i][number] not in ("", "–")]
        parts.append(Text(head, style=style))
        parts += [Padding(Text(line, style=style), (0, 0, 0, 2)) for line in said]
    return Group(*parts)


def pairs(items: Sequence[tuple[str, str]], room: int) -> RenderableType:
    """Return names with their values, one below the other."""
    size = widths([[name for name, _ in items], [value for _, value in items]], room)
    if size is None:
        return Group(*(Text(f"{name}: {value}") for name, value in items))
    grid = RichTable.grid(padding=(0, _BETWEEN, 0, 0), pad_edge=False)
    for width in size:
        grid.add_column(width=width, overflow="fold")
    for name, value in items:
        grid.add_row(Text(name), Text(value))
    return grid
