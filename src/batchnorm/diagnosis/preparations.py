"""How pictures are prepared for a model, and the ways in which that goes wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Preparation", "Range", "affine", "fitted", "known", "line_of"]

_KNOWN: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = (
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),  # CIFAR-10
    ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),  # CLIP
    ((0.1307,), (0.3081,)),  # MNIST
    ((0.5,), (0.5,)),
)
"""Means and deviations that pictures in [0, 1] are commonly normalized by, one for each channel."""

_SLACK = 0.06
"""So far beyond [0, 1] pictures may go: interpolation overshoots."""

_LARGE = 16.0
"""Values beyond are those of pixels from 0 to 255, not of normalized pictures."""

_NEAR = 1.35
_SAME = 0.12


@dataclass(frozen=True)
class Range:
    """What is known of some inputs, (N, C, ...): least and largest value, mean and standard deviation (divisor n)."""

    least: float
    largest: float
    mean: float
    std: float

    @classmethod
    def of(cls, inputs: Sequence[Tensor]) -> Range:
        """Measure it."""
        values = torch.cat([x.detach().double().flatten() for x in inputs])
        spread = values.std(correction=0)
        return cls(float(values.min()), float(values.max()), float(values.mean()), float(spread))

    def through(self, scale: float, shift: float) -> Range:
        """Return the same of scale · x + shift, for a positive scale."""
        ends = (scale * self.least + shift, scale * self.largest + shift)
        return Range(*ends, scale * self.mean + shift, scale * self.std)

    @property
    def unit(self) -> bool:
        """Whether all are within [0, 1], as pictures are that nobody normalized, and no narrow part of that."""
        return self.least >= -_SLACK and self.largest <= 1 + _SLACK and self.largest > 0.1

    @property
    def bytes(self) -> bool:
        """Whether all are within [0, 255], and beyond what normalized pictures are."""
        return self.least >= -255 * _SLACK and _LARGE < self.largest <= 255 * (1 + _SLACK)

    @property
    def standard(self) -> bool:
        """Whether mean and deviation are about 0 and 1."""
        return abs(self.mean) < 0.5 and 0.5 < self.std < 1.6


@dataclass(frozen=True)
class Preparation:
    """What should be done to an input before the model is given it: scale · x + shift, channel by channel.

    Attributes:
        words: what went wrong.
        scale: one for each channel, or one for all.
        shift: likewise.
        code: the same as an expression in ``x``.
    """

    words: str
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    code: str
    flip: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Prepare one input, (N, C, ...)."""
        if self.flip:
            return x.flip(1)
        return x * _channels(self.scale, x) + _channels(self.shift, x)


def _channels(values: Sequence[float], x: Tensor) -> Tensor:
    some = torch.tensor(list(values), dtype=x.dtype, device=x.device)
    return some.view(1, -1, *[1] * (x.dim() - 2)) if len(values) > 1 else some


_NOT_SCALED = "looks like a missing /255: pixels from 0 to 255 where training had them from 0 to 1"
_TWICE_SCALED = "looks like divided by 255 twice, or a missing × 255"
_NOT_NORMALIZED = "looks like mean and std not applied: pixels as they are, where training had them normalized"
_NEITHER = "looks like a missing /255 and mean and std not applied"
_TWICE = "looks like mean and std applied twice"
_TOO_MUCH = "looks like mean and std applied, where training had pixels as they are"
_SWAPPED = "looks like mean and std swapped: (x − std) / mean where training had (x − mean) / std"
_ORDER = "looks like channels in the opposite order: BGR where training had RGB"


def known(given: Range, channels: int, dims: int) -> Iterator[Preparation]:
    """Yield the preparations that the range of the given inputs allows, with constants that are commonly used."""
    if given.largest > _LARGE:
        yield Preparation(_NOT_SCALED, (1 / 255,), (0.0,), "x / 255")
    if abs(given.largest) < 1.1:
        yield Preparation(_TWICE_SCALED, (255.0,), (0.0,), "x * 255")
    for mean, std in _KNOWN:
        if len(mean) == channels and dims > 2:
            yield from _wrong(given, mean, std, dims)
    if channels == 3 and dims == 4:
        yield Preparation(_ORDER, (1.0,), (0.0,), "x.flip(1)", flip=True)


def _wrong(given: Range, mean: Sequence[float], std: Sequence[float], dims: int) -> Iterator[Preparation]:
    """Yield everything that goes wrong with one mean and std."""
    m, s = _text(mean, dims), _text(std, dims)
    pairs = list(zip(mean, std, strict=True))
    low, high = (0 - max(mean)) / min(std), (1 - min(mean)) / min(std)
    if given.unit:
        yield _made(_NOT_NORMALIZED, [(1 / s, -m / s) for m, s in pairs], f"(x - {m}) / {s}")
    if given.bytes:
        yield _made(_NEITHER, [(1 / (255 * s), -m / s) for m, s in pairs], f"(x / 255 - {m}) / {s}")
    if given.largest > _LARGE:
        terms = [(1 / 255, (m / 255 - m) / s) for m, s in pairs]
        yield _made(_NOT_SCALED, terms, f"((x * {s} + {m}) / 255 - {m}) / {s}")
    undone = [(s, m) for m, s in pairs]
    if low - 0.1 <= given.least < 0 and given.largest <= high + 0.1:
        yield _made(_TOO_MUCH, undone, f"x * {s} + {m}")
    if (low - max(mean)) / min(std) - 0.1 <= given.least < low - 0.1:
        yield _made(_TWICE, undone, f"x * {s} + {m}")
    if -max(std) / min(mean) - 0.1 <= given.least and given.largest <= (1 - min(std)) / min(mean) + 0.1:
        yield _made(_SWAPPED, [(m / s, 1 - m / s) for m, s in pairs], f"(x * {m} + {s} - {m}) / {s}")


def _made(words: str, terms: Sequence[tuple[float, float]], code: str) -> Preparation:
    return Preparation(words, tuple(scale for scale, _ in terms), tuple(shift for _, shift in terms), code)


def _text(values: Sequence[float], dims: int) -> str:
    if len(set(values)) == 1:
        return f"{values[0]:.6g}"
    ones = ", 1" * (dims - 2)
    return f"torch.tensor([{', '.join(f'{value:.6g}' for value in values)}]).view(1, -1{ones})"


def fitted(given: Range, scale: float, shifts: Sequence[float], dims: int) -> Preparation | None:
    """Return the preparation that a fitted scale and shifts amount to, if they amount to one."""
    if scale <= 0:
        return None
    shift = sum(shifts) / len(shifts)
    due = given.through(scale, shift)
    words = _meaning(given, due, scale, shift)
    if not words:
        return None
    return affine(1 / 255 if words == _NOT_SCALED else scale, shifts, dims, words)


def affine(scale: float, shifts: Sequence[float], dims: int, words: str = "") -> Preparation:
    """Return the preparation scale · x + shifts, one shift for all channels, or one for each."""
    scale = float(f"{scale:.5g}")
    shifts = [round(value, 4) for value in shifts]
    return Preparation(words, (scale,), tuple(shifts), f"{scale:g} * x + {_text(shifts, dims)}")


def _meaning(given: Range, due: Range, scale: float, shift: float) -> str:
    """Return what scale · x + shift says of how the inputs came about; ``""`` if nothing known."""
    undone = due.through(scale, shift)  # the raw picture, if scale and shift are std and mean
    if given.bytes and due.standard and abs(255 * scale - 1) > 0.2:
        return _NEITHER
    if given.largest > _LARGE and 1 / _NEAR < 255 * scale < _NEAR:
        return _NOT_SCALED
    if given.unit and due.standard and abs(shift) > 0.1:
        return _NOT_NORMALIZED
    if due.unit and given.standard and given.least < -_SLACK:
        return _TOO_MUCH
    if due.standard and undone.unit and scale < 1 and given.least < -1:
        return _TWICE
    # raw = std · due + mean with mean / std = scale: black is 0 there
    black = due.least + scale
    if due.standard and abs(shift - (1 - scale)) < _SAME and abs(black) < _SAME:
        return _SWAPPED
    return ""


def line_of(batch: Any, code: str) -> str | None:
    """Return a line of code that prepares every one of ``batches``; None where the input is inside something else."""
    if isinstance(batch, Tensor):
        return f"batches = [{code} for x in batches]"
    if isinstance(batch, Mapping):
        key = next((key for key, value in batch.items() if isinstance(value, Tensor)), None)
        value = re.sub(r"\bx\b", f"batch[{key!r}]", code) if key is not None else ""
        return None if key is None else f"batches = [{{**batch, {key!r}: {value}}} for batch in batches]"
    if isinstance(batch, Sequence) and batch and isinstance(batch[0], Tensor):
        return f"batches = [({code}, *rest) for x, *rest in batches]"
    return None
