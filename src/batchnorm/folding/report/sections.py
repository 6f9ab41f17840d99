"""What a fold did, as a report: what a pass takes before and after, and what became of each norm."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from torch.nn import Module

from batchnorm.folding.report.int8_ranges import section as range_section
from batchnorm.folding.report.latency import Measured, Spread
from batchnorm.folding.report.outcome import Costs, FoldedNorm, FoldOutcome, LeftNorm
from batchnorm.folding.report.same_sentence import group_by_sentence
from batchnorm.report import Diagrams, Facts, Paragraph, Section, Table
from batchnorm.report.document import Block, Cell

__all__ = ["sections"]

Norm = TypeVar("Norm", FoldedNorm, LeftNorm)

_FEW = 8  # norms have a row each in a terminal, too


def sections(result: FoldOutcome, model: Any, measured: Measured | None) -> list[Section]:
    """Return the sections of the report; those that need the room of a page are brief in a terminal.

    Args:
        result: what the fold did.
        model: the folded model.
        measured: latency and memory before and now, if they were measured.
    """
    found: list[Section] = []
    names = _names(result, model)
    if result.folded:
        facts, pictures = _facts(result), _pictures(result.pictures.folded)
        brief = _folded(_groups(result.folded, lambda item: item.sentence, names))
        found.append(Section("Folded", [facts, *pictures, _folded([[item] for item in result.folded])], [facts, brief]))
        found.append(Section("What a pass takes", [_costs(result.costs)], brief=[]))
    if result.lost:
        remedy = "fold(..., keep_range=True) leaves those norms."
        lines = [Paragraph(str(item), "bad") for item in result.lost]
        found.append(Section("Lost range", [*lines, Paragraph(remedy)]))
    if result.unseen:
        found.append(Section("Not seen", [Paragraph(line, "bad") for line in result.unseen]))
    if measured is not None:
        found.append(Section("Measured", [_measured(measured)]))
    became = [item for item in result.left if item.becomes is not None]
    if became:
        brief = _became(_groups(became, lambda item: f"{item.becomes}: {item.reason}", names))
        found.append(Section("Left, in another form", [_became([[item] for item in became])], [brief]))
    kept = [item for item in result.left if item.becomes is None]
    if kept:
        pictures = _pictures(result.pictures.left)
        brief = _kept(_groups(kept, lambda item: item.reason, names))
        found.append(Section("Left as they are", [*pictures, _kept([[item] for item in kept])], [brief]))
    if (ranges := range_section(result.ranges)) is not None:
        found.append(ranges)
    return found or [Section("", [Paragraph("Nothing to do.")])]


# -- the tables of norms, a row for each group ------------------------------------------------------------------------


def _groups(items: Sequence[Norm], says: Callable[[Norm], str], names: Collection[str]) -> list[list[Norm]]:
    """Return the norms that a terminal shows as one row: none where they are few."""
    return [[item] for item in items] if len(items) <= _FEW else group_by_sentence(items, says, names)


def _names(result: FoldOutcome, model: Any) -> set[str]:
    """Return the names that may stand in a sentence."""
    modules = model.named_modules() if isinstance(model, Module) else ()
    norms: list[FoldedNorm | LeftNorm] = [*result.folded, *result.left]
    into = {name for norm in norms if norm.into for name in norm.into.split(", ")}
    return {norm.norm for norm in norms} | into | {name for name, _ in modules}


def _called(group: Sequence[FoldedNorm] | Sequence[LeftNorm]) -> str:
    return group[0].norm + (f" (one of {len(group)} alike)" if len(group) > 1 else "")


def _caption(groups: Sequence[Sequence[object]], where: str) -> str:
    several = any(len(group) > 1 for group in groups)
    return (
        f"Of norms with the same explanation, each with neighbours of its own, one is shown; {where} has all."
        if several
        else ""
    )


def _folded(groups: Sequence[Sequence[FoldedNorm]]) -> Table:
    saved = [sum(item.saving.multiply_adds for item in group) for group in groups]
    rows = [(_called(group), group[0].sentence, _count(number)) for group, number in zip(groups, saved, strict=True)]
    return Table(("norm", "what became of it", "multiply-adds saved"), rows, caption=_caption(groups, "result.folded"))


def _became(groups: Sequence[Sequence[LeftNorm]]) -> Table:
    rows = [(_called(group), group[0].becomes, group[0].reason) for group in groups]
    return Table(("norm", "is now", "why"), rows, caption=_caption(groups, "result.left"))


def _kept(groups: Sequence[Sequence[LeftNorm]]) -> Table:
    caption = _caption(groups, "result.left")
    if all(group[0].into is None for group in groups):  # a column of dashes
        return Table(("norm", "why"), [(_called(group), group[0].reason) for group in groups], caption=caption)
    rows = [(_called(group), group[0].into, group[0].reason) for group in groups]
    return Table(("norm", "after", "why"), rows, caption=caption)


# -- numbers -----------------------------------------------------------------------------------------------------------


def large(number: int) -> str:
    """Return a count as a person reads it.

    >>> large(1_815_000_000), large(8_192), large(12)
    ('1.81 G', '8.19 k', '12')
    """
    return _scaled(number, 1000, ("", "k", "M", "G", "T"))


def _count(number: int) -> Cell:
    return number if abs(number) < 1000 else large(number)


def in_bytes(number: int) -> str:
    """Return a number of bytes as a person reads it.

    >>> in_bytes(3 * 2**20), in_bytes(100)
    ('3 MiB', '100 B')
    """
    return _scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(number: int, step: int, units: Sequence[str]) -> str:
    value, place = float(number), 0
    while abs(float(f"{value:.3g}")) >= step and place < len(units) - 1:  # what is shown: 999,999 is 1 M
        value, place = value / step, place + 1
    shown = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{shown} {units[place]}".rstrip()


def _facts(result: FoldOutcome) -> Facts:
    before, after = result.costs.before, result.costs.after
    saved = sum(item.saving.multiply_adds for item in result.folded)
    moved = sum(item.saving.bytes for item in result.folded)
    whole = before.layers + before.norms
    items: list[tuple[str, Cell]] = [
        ("output error", result.error),
        ("bound", result.bound),
        ("error in float64", result.error_float64),
        (
            "every value compared",
            "on the example, and on random inputs" if result.on_random_inputs else "on the example",
        ),
        ("operators in a pass", f"{before.calls} → {after.calls}"),
        ("multiply-adds saved", f"{large(saved)} of {large(whole)} ({saved / max(whole, 1):.2%})"),
        ("memory traffic of activations saved", in_bytes(moved)),
    ]
    return Facts(items)


def _costs(costs: Costs) -> Table:
    before, after = costs.before, costs.after
    rows: list[tuple[Cell, ...]] = [("operators", before.calls, after.calls)]
    for name in sorted({*before.operators, *after.operators}):
        counts = before.operators.get(name, 0), after.operators.get(name, 0)
        if counts[0] != counts[1]:
            rows.append((f"  of them {name}", *counts))
    numbers = (
        ("multiply-adds of convolutions and linear layers", before.layers, after.layers),
        ("multiply-adds of norms", before.norms, after.norms),
        ("additions of biases", before.biases, after.biases),
        ("parameters", before.parameters, after.parameters),
        ("numbers in buffers", before.buffers, after.buffers),
    )
    rows += [(name, _count(was), _count(now)) for name, was, now in numbers]
    rows.append(("memory of both", in_bytes(before.state_bytes), in_bytes(after.state_bytes)))
    return Table(
        ("in a pass over the example inputs", "before", "after"),
        rows,
        caption="Counted from the dataflow. A norm costs a multiply-add for each element; a bias that a layer was "
        "given costs an addition for each, which most kernels do on the way.",
    )


def _measured(measured: Measured) -> Table:
    rows: list[tuple[Cell, ...]] = [
        ("latency, median", _ms(measured.before.median), _ms(measured.after.median), f"{measured.ratio:.2f} ×"),
        ("latency, quartiles", _quartiles(measured.before), _quartiles(measured.after), None),
    ]
    if measured.memory_before is not None and measured.memory_after is not None:
        ratio = f"{measured.memory_after / max(measured.memory_before, 1):.2f} ×"
        rows.append(("memory, peak", in_bytes(measured.memory_before), in_bytes(measured.memory_after), ratio))
    threads = f"{measured.threads} thread{'s' * (measured.threads != 1)}"
    calls = f"{measured.calls} call{'s' * (measured.calls != 1)}"
    return Table(
        ("a pass", "before", "after", "after : before"),
        rows,
        caption=f"{measured.rounds} rounds in which both ran in turn, {calls} each; the ratio is the median of those "
        f"of the rounds. {measured.device}, {threads}. Memory: {measured.memory_of}.",
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _quartiles(spread: Spread) -> str:
    return f"{spread.lower * 1e3:.3g}\u00a0–\u00a0{spread.upper * 1e3:.3g}\u00a0ms"


def _pictures(diagrams: Diagrams) -> list[Block]:
    return [diagrams] if diagrams.diagrams else []
