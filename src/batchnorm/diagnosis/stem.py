"""What lies between the input and the first norm, known by what it answers to changed inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from batchnorm.diagnosis.distance import layer_distance
from batchnorm.diagnosis.gaps import LayerGap
from batchnorm.diagnosis.kept_batches import float_inputs, with_input
from batchnorm.diagnosis.passes import Passes
from batchnorm.moments import Moments

__all__ = ["InputChange", "explain", "first_inputs"]

_MOST_CHANNELS = 8
"""Input channels up to this number may each have a shift of their own; more share one."""


@dataclass(frozen=True)
class InputChange:
    """A change of the input that would account for the stored statistics of the first norm.

    Attributes:
        contrast: the training inputs were this many times these, about zero; negative if they were inverted.
        brightness: plus these shifts, one for each input channel, or one for all.
        noise: standard deviation of white noise in these inputs that those of the training lacked.
        left: the share of the distance that it leaves unexplained.
    """

    contrast: float
    brightness: tuple[float, ...]
    noise: float
    left: float


def first_inputs(passes: Passes, batches: Sequence[Any], layer: LayerGap) -> list[Tensor] | None:
    """Return what the norm is given for each batch, (N, C, ...); None if the model cannot be run on them."""
    try:
        return [passes.input_of(layer.site, batch) for batch in batches]
    except Exception:  # inputs that no user's data hold may fail in any way
        return None


def explain(
    passes: Passes, layer: LayerGap, *, noisy: bool = True, contrast: float | None = None
) -> InputChange | None:
    r"""Fit a change of the inputs to the stored statistics of the first norm.

    If what lies before the norm is affine in the input x, then for a·x + b, with b one shift a channel,

    .. math::

        \mathrm{mean} = f(0) + a (\mathrm{mean} - f(0)) + \sum_c b_c (f(e_c) - f(0)) \qquad
        \mathrm{variance} = a^2\, \mathrm{variance}

    where f(0) and :math:`f(e_c)` are the mean answers to an input of zeros, and of ones in channel c; white noise of
    variance s in x adds s times the variance of the answer to unit noise. These are few unknowns for 2C equations.

    Args:
        passes: the model and its batches.
        layer: the first norm.
        noisy: whether these inputs may hold white noise that those of the training lacked.
        contrast: the contrast, where it is known and only the shifts are to be fitted.

    Returns:
        None where the input is no floating-point tensor or the model does not run on such inputs.
    """
    batch = passes.batches[0]
    if not float_inputs(batch):
        return None
    answers = _answers(passes, batch, layer)
    if answers is None:
        return None
    zero, ones, noise = answers
    squared, added = _fit_variance(layer, noise if noisy else torch.zeros_like(noise))
    variance = (squared * layer.measured[1] + added * noise).clamp(min=0)
    before = layer_distance(layer.stored, layer.measured, layer.eps)
    changes = []
    for factor in (squared**0.5, -(squared**0.5)) if contrast is None else (contrast,):
        shifts, mean = _fit_mean(layer, zero, ones, factor)
        left = layer_distance(layer.stored, (mean, variance), layer.eps) / max(before, 1e-300)
        changes.append(InputChange(factor, shifts, max(-added, 0.0) ** 0.5, left))
    return min(changes, key=lambda change: change.left)


def _answers(passes: Passes, batch: Any, layer: LayerGap) -> tuple[Tensor, list[Tensor], Tensor] | None:
    """Return the mean answer to zeros, what ones in each channel add to it, and the variance of that to unit noise."""
    generator = torch.Generator().manual_seed(0)

    def filled(channels: slice | int, value: float) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            out[:, channels] = value
            return out

        return change

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, device="cpu").to(x)

    sizes: list[int] = []
    with_input(batch, lambda x: sizes.extend(x.shape) or x)  # type: ignore[func-returns-value]
    separate = len(sizes) > 2 and sizes[1] <= _MOST_CHANNELS
    channels: list[slice | int] = list(range(sizes[1])) if separate else [slice(None)]
    changes = [filled(slice(None), 0.0), *(filled(c, 1.0) for c in channels)]
    inputs = first_inputs(passes, [with_input(batch, change) for change in changes], layer)
    # a variance is known from many samples only: there are as many as the measured one comes from
    noisy = first_inputs(passes, [with_input(one, noise) for one in passes.batches], layer)
    if inputs is None or noisy is None:
        return None
    zero, *ones = (Moments.of(x.cpu()).mean for x in inputs)
    return zero, [one - zero for one in ones], reduce(Moments.merge, (Moments.of(x.cpu()) for x in noisy)).variance()


def _fit_mean(layer: LayerGap, zero: Tensor, ones: list[Tensor], contrast: float) -> tuple[tuple[float, ...], Tensor]:
    """Return the shifts of the input channels that bring the mean nearest to the stored one, and that mean."""
    scale = (layer.measured[1] + layer.eps).sqrt()
    scaled = zero + contrast * (layer.measured[0] - zero)
    columns = torch.stack([one / scale for one in ones], 1)
    fitted = torch.linalg.lstsq(columns, ((layer.stored[0] - scaled) / scale)[:, None]).solution[:, 0]
    return tuple(fitted.tolist()), scaled + columns @ fitted * scale


def _fit_variance(layer: LayerGap, noise: Tensor) -> tuple[float, float]:
    """Return a² and s with stored variance ≈ a² · measured + s · noise, by relative least squares."""
    stored, measured = layer.stored[1], layer.measured[1]
    weight = 1 / (measured + layer.eps)
    columns = torch.stack([measured * weight, noise * weight], 1)
    a, s = torch.linalg.lstsq(columns, (stored * weight)[:, None]).solution[:, 0].tolist()
    if a <= 0 or s > 0:  # noise that only the training had is no shift of these data
        a = float((columns[:, 0] * stored * weight).sum() / columns[:, 0].square().sum().clamp(min=1e-300))
        s = 0.0
    return max(a, 0.0), s
