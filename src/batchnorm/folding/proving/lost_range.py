r"""Weights that folding makes too small for their type.

Folding multiplies a channel's weights by s, in float64, and rounds once, to a type with unit roundoff u and smallest
normal number λ. Where that rounds to nearest, an element that is λ or larger errs by at most a share u of itself; a
smaller one lies among subnormal numbers, which are 2uλ apart whatever their size, and errs by up to uλ. For a channel w
of the merged weight and what is stored of it, ŵ,

.. math:: \lVert \hat w - w \rVert \le u\, \lVert w \rVert \quad \text{if all } |w_i| \ge \lambda

That is what the type gives to a channel in its range, wherever in the range, and a channel **loses range** if it errs
by more, counted over the elements that were normal numbers before: then some of them have become subnormal or zero,
enough of them to be felt beside the others. Elements that were subnormal before had lost their bits already, and a
channel of zeros (γ = 0) errs by nothing.

The rule is for weights, which are multiplied with inputs of any size. Biases and the rows of embeddings are added to
the output, or are it, and the output has their type: its own rounding errs by up to uλ as well, where the norm computed
it. They can only overflow, and what overflows is never folded.

Whether a loss is felt depends on the inputs: a channel whose γ is next to nothing beside its β loses its range, and
the outputs do not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from batchnorm.folding.planning.merged_parameters import Parameters
from batchnorm.models.parameters import find_tensor

if TYPE_CHECKING:
    from batchnorm.folding.planning.plan import Step

__all__ = ["LostChannel", "LostRange", "lost_ranges", "norms_that_shrink"]


@dataclass(frozen=True)
class LostChannel:
    """An output channel of a weight that loses range.

    Attributes:
        channel: its index.
        before: its largest absolute weight before folding.
        after: the largest one after it, before it is rounded.
        fallen: share of its weights that were normal numbers and have become subnormal or zero.
        error: relative error of what is stored of those that were normal, ‖ŵ − w‖/‖w‖; 1 where nothing is left.
    """

    channel: int
    before: float
    after: float
    fallen: float
    error: float


@dataclass(frozen=True)
class LostRange:
    """A weight of which channels lose range.

    Attributes:
        parameter: its qualified name.
        dtype: its type, as in ``"float16"``.
        channels: how many channels it has.
        lost: those that lose range, the one with the largest error first.
    """

    parameter: str
    dtype: str
    channels: int
    lost: tuple[LostChannel, ...]

    def __str__(self) -> str:
        """Return it as a sentence."""
        worst, smallest = self.lost[0], torch.finfo(getattr(torch, self.dtype)).smallest_normal
        verb = "loses" if len(self.lost) == 1 else "lose"
        return (
            f"{len(self.lost)} of {self.channels} channels of {self.parameter} {verb} range in {self.dtype}: the "
            f"largest weight of channel {worst.channel} goes from {worst.before:.2g} to {worst.after:.2g}, and "
            f"{100 * worst.fallen:.3g} % of its weights fall below the smallest normal number, {smallest:.2g}."
        )


def lost_ranges(model: Module, parameters: Parameters, rounded: Mapping[str, Parameter]) -> list[LostRange]:
    """Return the weights of which channels lose range.

    Args:
        model: the model, not folded yet.
        parameters: what its parameters become, in float64.
        rounded: what is stored of that.
    """
    found = []
    for absorber in parameters.absorbers.values():
        name = absorber.weight_name
        if name not in rounded:  # of a norm that took in another one, and is a multiply-add now
            continue
        merged, stored, old = parameters.changed[name].cpu(), rounded[name].detach(), find_tensor(model, name)
        small = (merged.abs() < torch.finfo(stored.dtype).smallest_normal) & (merged != 0)
        if old is None or not absorber.operator.multiplies or not bool(small.any()):
            continue
        before, wide, after = (
            absorber.operator.by_channel(tensor.detach().cpu().double(), absorber.groups)
            for tensor in (old, merged, stored)
        )
        if lost := _lost_channels(before, wide, after, torch.finfo(stored.dtype)):
            dtype = str(stored.dtype).removeprefix("torch.")
            found.append(LostRange(name, dtype, len(wide), tuple(lost)))
    return found


def _lost_channels(before: Tensor, merged: Tensor, stored: Tensor, finfo: torch.finfo) -> list[LostChannel]:
    normal = before.abs() >= finfo.smallest_normal
    fallen = normal & (merged != 0) & (stored.abs() < finfo.smallest_normal)
    largest = merged.abs().amax(1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)  # squares of small numbers are 0
    size = (merged / unit).norm(dim=1)
    errors = ((stored - merged) / unit * normal).norm(dim=1) / torch.where(size > 0, size, 1.0)
    lost = [
        LostChannel(
            channel,
            float(before[channel].abs().max()),
            float(largest[channel]),
            float(fallen[channel].double().mean()),
            float(errors[channel]),
        )
        for channel in (errors > finfo.eps / 2).nonzero().flatten().tolist()
    ]
    return sorted(lost, key=lambda item: -item.error)


def norms_that_shrink(steps: Sequence[Step], losses: Sequence[LostRange]) -> dict[str, str]:
    """Return, for each weight that loses range, the norm that shrinks it most, with the reason to leave it."""
    guilty = {}
    for loss in losses:
        into = [step for step in steps if any(absorber.weight_name == loss.parameter for absorber in step.into)]
        guilty[min(into, key=_smallest_scale).name] = f"Folded, {loss}"
    return guilty


def _smallest_scale(step: Step) -> float:
    scales = [part.map.scale.abs() for part in step.parts]
    return min((float(scale[scale > 0].min()) for scale in scales if bool((scale > 0).any())), default=float("inf"))
