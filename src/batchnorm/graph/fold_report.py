"""What a fold did, as a report: what a pass takes before and after, and what became of each norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from batchnorm.graph.measure import Measured, Spread
from batchnorm.graph.quantization import section as range_section
from batchnorm.report import Diagrams, Facts, Paragraph, Section, Table
from batchnorm.report.document import Block, Cell

if TYPE_CHECKING:
    from batchnorm.graph.fold_result import Costs, FoldResult

__all__ = ["sections"]


def sections(result: FoldResult) -> list[Section]:
    """Return the sections of the report."""
    found: list[Section] = []
    if result.folded:
        rows = [(item.norm, item.sentence, _count(item.saving.multiply_adds)) for item in result.folded]
        table = Table(("norm", "what became of it", "multiply-adds saved"), rows)
        pictures = _pictures(result.pictures.folded if result.pictures is not None else None)
        found.append(Section("Folded", [_facts(result), *pictures, table]))
        if result.costs is not None:
            found.append(Section("What a pass takes", [_costs(result.costs)]))
    if result.lost:
        remedy = "fold(..., keep_range=True) leaves those norms."
        lines = [Paragraph(line, "bad") for line in result.warnings]
        found.append(Section("Lost range", [*lines, Paragraph(remedy)]))
    if result.measured is not None:
        found.append(Section("Measured", [_measured(result.measured)]))
    became = [(item.norm, item.becomes, item.reason) for item in result.left if item.becomes is not None]
    if became:
        found.append(Section("Left, in another form", [Table(("norm", "is now", "why"), became)]))
    kept = [item for item in result.left if item.becomes is None]
    if kept:
        left = Table(("norm", "after", "why"), [(item.norm, item.into, item.reason) for item in kept])
        found.append(
            Section(
                "Left as they are", [*_pictures(result.pictures.left if result.pictures is not None else None), left]
            )
        )
    if (ranges := range_section(result.ranges)) is not None:
        found.append(ranges)
    return found or [Section("", [Paragraph("Nothing to do.")])]


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


def _facts(result: FoldResult) -> Facts:
    items: list[tuple[str, Cell]] = [
        ("output error", result.error),
        ("bound", result.bound),
        ("error in float64", result.error_float64),
        (
            "every value compared",
            "on the example, and on random inputs" if result.on_random_inputs else "on the example",
        ),
    ]
    if result.costs is not None:
        before, after = result.costs.before, result.costs.after
        saved = sum(item.saving.multiply_adds for item in result.folded)
        moved = sum(item.saving.bytes for item in result.folded)
        whole = before.layers + before.norms
        items += [
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
    return f"{spread.lower * 1e3:.3g} – {spread.upper * 1e3:.3g} ms"


def _pictures(diagrams: Diagrams | None) -> list[Block]:
    return [diagrams] if diagrams is not None and diagrams.diagrams else []
