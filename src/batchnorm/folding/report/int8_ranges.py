r"""What folding does to the ranges of a weight's channels, and what int8 makes of that.

Folding multiplies each output channel by a γ/σ of its own, so that channels may be of very different size. With one
scale for the whole tensor the steps are as wide as the largest channel needs, and small channels are lost (Nagel et al.
2019, arXiv 1906.04721, §3.1: MobileNetV2). With one scale for each channel they are not.

The weight is rounded to multiples of a step Δ, symmetric about zero, and compared with itself:

.. math::

    \Delta = \frac{\max|w|}{127} \qquad \hat w = \Delta \cdot \operatorname{round}(w / \Delta) \qquad
    \mathrm{error}_c = \frac{\lVert \hat w_c - w_c \rVert}{\lVert w_c \rVert} \qquad
    \mathrm{SNR} = 10 \log_{10} \frac{\sum w^2}{\sum (\hat w - w)^2}\ \mathrm{dB}

with the maximum over the tensor, or over each channel c.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.absorbers.linear_operator import LinearOperator
from batchnorm.folding.planning.absorbing_layer import AbsorbingLayer
from batchnorm.report import Paragraph, Plot, Section, Series, Table
from batchnorm.report.result import finite_or_none

__all__ = ["ChannelRanges", "FoldedWeight", "Int8", "Ranges", "folded_weights", "section"]

_LARGEST_INT8 = 127


@dataclass(frozen=True)
class Int8:
    """A weight in int8, with one scale for all of it or one for each channel.

    Attributes:
        snr: signal to quantization noise of the whole weight, in decibels; None if it is stored exactly.
        typical_error: the median over the output channels of their relative errors, channels of zeros aside.
        worst_error: the largest of them; 1 if nothing of a channel is left.
        worst_channel: the channel that has it.
        vanished: how many channels become zero.
    """

    snr: float | None
    typical_error: float
    worst_error: float
    worst_channel: int
    vanished: int

    @classmethod
    def of(cls, channels: Tensor, *, per_channel: bool) -> Int8:
        """Round a weight, float64, (channels, elements), and compare."""
        largest = channels.abs().amax(1, keepdim=True) if per_channel else channels.abs().max()
        step = torch.where(largest > 0, largest, 1.0) / _LARGEST_INT8
        noise = (torch.round(channels / step) * step - channels).square().sum(1)
        signal = channels.square().sum(1)
        errors = torch.sqrt(noise / torch.where(signal > 0, signal, 1.0))
        ratio = float(signal.sum() / noise.sum()) if bool(noise.any()) else math.inf
        worst = int(errors.argmax())
        vanished = int(((noise == signal) & (signal > 0)).sum())
        typical = _median(errors[signal > 0], 0.0)
        return cls(finite_or_none(10 * math.log10(ratio)), typical, float(errors[worst]), worst, vanished)


def _median(values: Tensor, if_none: float) -> float:
    return float(values.quantile(0.5)) if len(values) else if_none


@dataclass(frozen=True)
class Ranges:
    """The channels of one weight.

    Attributes:
        largest: the largest absolute weight of each output channel.
        spread: the greatest of these over their median, channels of zeros aside.
        per_tensor: the weight in int8 with one scale.
        per_channel: with one scale for each output channel.
    """

    largest: tuple[float, ...]
    spread: float
    per_tensor: Int8
    per_channel: Int8

    @classmethod
    def of(cls, channels: Tensor) -> Ranges:
        """Measure a weight, float64, (channels, elements)."""
        largest = channels.abs().amax(1)
        middle = _median(largest[largest > 0], 0.0)
        return cls(
            tuple(largest.tolist()),
            float(largest.max()) / middle if middle else 1.0,
            Int8.of(channels, per_channel=False),
            Int8.of(channels, per_channel=True),
        )


@dataclass(frozen=True)
class ChannelRanges:
    """What folding did to the ranges of a weight's channels.

    Attributes:
        parameter: its qualified name.
        before: its channels before folding.
        after: and after it.
        margin: its largest absolute element over the largest number that its type has.
    """

    parameter: str
    before: Ranges
    after: Ranges
    margin: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as numbers, strings and dicts, but for the range of each single channel."""
        data = asdict(self)
        for side in ("before", "after"):
            data[side]["channels"] = len(data[side].pop("largest"))
        return data


@dataclass(frozen=True, eq=False)
class FoldedWeight:
    """The weight of a convolution, transposed convolution or linear layer that absorbed a norm.

    Attributes:
        name: its qualified name.
        operator: what reads it.
        groups: in how many groups that does.
        before: as it was.
        after: as it is.
    """

    name: str
    operator: LinearOperator
    groups: int
    before: Tensor
    after: Tensor

    def ranges(self) -> ChannelRanges:
        """Measure the ranges of its channels."""
        before, after = (
            Ranges.of(self.operator.by_channel(tensor.detach().cpu().double(), self.groups))
            for tensor in (self.before, self.after)
        )
        return ChannelRanges(self.name, before, after, max(after.largest) / torch.finfo(self.after.dtype).max)


def folded_weights(
    absorbers: Iterable[AbsorbingLayer], before: Mapping[str, Tensor | None], after: Mapping[str, Tensor]
) -> list[FoldedWeight]:
    """Return the weights that int8 is for: of linear operators, neither of embeddings nor of norms, and not empty.

    Args:
        absorbers: those that absorbed something.
        before: parameters as they were, by name.
        after: as they are.
    """
    found = []
    for absorber in absorbers:
        old, operator = before.get(absorber.weight_name), absorber.operator
        if isinstance(operator, LinearOperator) and old is not None and old.numel():
            found.append(
                FoldedWeight(absorber.weight_name, operator, absorber.groups, old, after[absorber.weight_name])
            )
    return found


_MOST_ROWS = 5  # of the table; the data has all of them


def section(ranges: Sequence[ChannelRanges]) -> Section | None:
    """Return the section of a report on the ranges: the weights that one scale costs most come first."""
    several = sorted((r for r in ranges if len(r.after.largest) > 1), key=lambda r: -r.after.per_tensor.typical_error)
    if not several:
        return None
    summary = _summary(several[0])
    return Section("Channel ranges, for int8", [summary, _table(several), _plot(several[0])], brief=[summary])


def _summary(worst: ChannelRanges) -> Paragraph:
    old, new, fine = worst.before.per_tensor, worst.after.per_tensor, worst.after.per_channel
    return Paragraph(
        "Folding multiplies each output channel by a factor of its own. In int8 with one scale for the weight, the "
        f"typical channel of {worst.parameter} is off by {_percent(new)} ({_percent(old)} before folding), and "
        f"{new.vanished} of {len(worst.after.largest)} become zero ({old.vanished} before); with one scale for each "
        f"channel, it is off by {_percent(fine)}."
    )


def _percent(int8: Int8) -> str:
    return f"{100 * int8.typical_error:.2g} %"


def _table(ranges: Sequence[ChannelRanges]) -> Table:
    columns = ("weight", "spread before", "spread", "off before", "off", "gone", "off, own scales")
    rows = [
        (
            r.parameter,
            r.before.spread,
            r.after.spread,
            _percent(r.before.per_tensor),
            _percent(r.after.per_tensor),
            r.after.per_tensor.vanished,
            _percent(r.after.per_channel),
        )
        for r in ranges[:_MOST_ROWS]
    ]
    caption = (
        "Spread: range of the widest output channel over the median one. Off: relative error of the median channel in "
        "int8 with one scale, or with one for each channel. Gone: channels that become zero with one scale."
    )
    if len(ranges) > _MOST_ROWS:
        caption += f" The {_MOST_ROWS} of {len(ranges)} weights that one scale costs most; result.ranges has all."
    return Table(columns, rows, caption=caption)


def _plot(ranges: ChannelRanges) -> Plot:
    positive = [size for size in ranges.after.largest if size > 0]
    series = [
        Series(name, list(range(1, len(one.largest) + 1)), sorted(one.largest, reverse=True))
        for name, one in (("before", ranges.before), ("folded", ranges.after))
    ]
    return Plot(
        f"Channel ranges of {ranges.parameter}",
        "output channels, widest first",
        "largest weight",
        series,
        "Where one scale serves all, a channel of less than 1/254 of the widest, half a step of int8, becomes zero.",
        log_y=bool(positive) and max(positive) >= 10 * min(positive),  # within a decade the axis has no ticks
    )
