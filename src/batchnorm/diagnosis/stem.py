"""What lies between the input and the first norm, known by what it answers to changed inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.diagnosis.distance import layer_distance
from batchnorm.diagnosis.gaps import LayerGap
from batchnorm.diagnosis.held import float_inputs, with_input
from batchnorm.diagnosis.passes import Passes
from batchnorm.moments import Moments

__all__ = ["InputChange", "explain", "first_inputs"]

_MOST_CHANNELS = 8
"""Input channels up to this number may each have a shift of their own; more share one."""


@dataclass(frozen=True)
class InputChange:
    """A change of the input that would account for the stored statistics of the first norm.

    Attributes:
        contrast: the training inputs were this many times these, about zero.
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


def explain(passes: Passes, layer: LayerGap) -> InputChange | None:
    r"""Fit a change of the inputs to the stored statistics of the first norm.

    If what lies before the norm is affine in the input x, then for a·x + b, with b one shift a channel,

    .. math::

        \mathrm{mean} = f(0) + a (\mathrm{mean} - f(0)) + \sum_c b_c (f(e_c) - f(0)) \qquad
        \mathrm{variance} = a^2\, \mathrm{variance}

    where f(0) and :math:`f(e_c)` are the mean answers to an input of zeros, and of ones in channel c; white noise of
    variance s in x adds s times the variance of the answer to unit noise. These are few unknowns for 2C equations.

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
    scale = (layer.measured[1] + layer.eps).sqrt()
    squared, added = _fit_variance(layer, noise)
    contrast = squared**0.5
    scaled = zero + contrast * (layer.measured[0] - zero)
    columns = torch.stack([one / scale for one in ones], 1)
    fitted = torch.linalg.lstsq(columns, ((layer.stored[0] - scaled) / scale)[:, None]).solution[:, 0]
    mean = scaled + columns @ fitted * scale
    variance = squared * layer.measured[1] + added * noise
    before = layer_distance(layer.stored, layer.measured, layer.eps)
    left = layer_distance(layer.stored, (mean, variance.clamp(min=0)), layer.eps) / max(before, 1e-300)
    shifts = tuple(fitted.tolist())
    return InputChange(contrast, shifts, max(-added, 0.0) ** 0.5, left)


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
        return torch.randn(x.shape, generator=generator).to(x)

    sizes: list[int] = []
    with_input(batch, lambda x: sizes.extend(x.shape) or x)  # type: ignore[func-returns-value]
    separate = len(sizes) > 2 and sizes[1] <= _MOST_CHANNELS
    channels: list[slice | int] = list(range(sizes[1])) if separate else [slice(None)]
    changes = [filled(slice(None), 0.0), *(filled(c, 1.0) for c in channels), noise]
    inputs = first_inputs(passes, [with_input(batch, change) for change in changes], layer)
    if inputs is None:
        return None
    met = [Moments.of(x.cpu()) for x in inputs]
    zero = met[0].mean
    return zero, [m.mean - zero for m in met[1:-1]], met[-1].variance()


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
