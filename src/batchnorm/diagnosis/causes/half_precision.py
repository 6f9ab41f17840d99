"""Statistics rounded to half precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from batchnorm.diagnosis.case import SMALL, Case, Severity, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, module_line, names_of
from batchnorm.diagnosis.causes.initial import is_initial
from batchnorm.diagnosis.gaps import LayerGap

__all__ = ["HalfPrecision"]

_HALF = (torch.bfloat16, torch.float16)  # what fits into the first often fits into the second
_NOTHING = 0.05
"""Rounding by less, in standard deviations, is felt nowhere."""

_FEWEST = 4
"""So many values that fit into half precision by chance: once in 2¹³ each."""

_SHORT = 4
"""Numbers of so few significant bits fit into any precision: they were written by hand, as 5.0 is."""


class HalfPrecision(Cause):
    """Running statistics kept, or once kept, in half precision.

    What it finds:
        Buffers of dtype float16 or bfloat16, as ``model.half()`` and ``model.bfloat16()`` make them; and buffers in
        float32 whose every value is one of half precision, as a checkpoint that went through it leaves them. A mean far
        from zero loses what matters about it, small updates of a moving average are rounded away, and variances beyond
        65504 overflow in float16.

    What excludes it:
        A float32 buffer with one value that no half precision has. One whose values say nothing: numbers of few bits,
        such as 0, 1 or 5.0, and a number that is there many times counts once.

    Evidence:
        The dtype, and half a unit in the last place of the means, in standard deviations.

    Cure:
        Keep the norms in float32, which a half-precision model allows, and measure the statistics.
    """

    key = "half_precision"
    severity = "doubtful"
    excluded_at_home = False
    excluded_by_freeze = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion for all such layers."""
        found = {layer: dtype for layer in case.layers if (dtype := _half(layer)) is not None}
        if not found:
            return
        # where others are rounded, a layer of so few channels that chance could do it is, too
        found = {layer: dtype for layer in case.layers if (dtype := _half(layer, fewest=1)) is not None}
        wrong = [layer for layer in found if layer.off]
        case.explained.update(names_of(found))
        first, dtype = next(iter(found.items()))
        kept = "is kept in" if first.site.running_mean.dtype in _HALF else "went through"
        loss = max(_loss(layer, dtype) for layer, dtype in found.items())
        evidence = (
            f"running_mean {kept} {str(dtype).removeprefix('torch.')} in {len(found)} of {len(case.layers)} norms: its "
            f"rounding is up to {loss:.2g} standard deviations"
        )
        evidence += f"; {len(wrong)} of them have a gap." if wrong else "."
        layers = list(found)
        norms = module_line(first.name) if len(found) == 1 else "m"
        loop = (
            ""
            if len(found) == 1
            else " for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)"
        )
        cast = f"[{norms}.float(){loop}]; " if first.site.running_mean.dtype in _HALF else ""
        severity: Severity | None = "wrong" if wrong or loss > 0.1 else None
        if not wrong and _harmless(case, found, loss):
            severity = "note"
        yield Suspicion(
            names_of(found), evidence, f"{cast}{case.recalibrate(layers)}", case.corrected(layers), severity=severity
        )


def _harmless(case: Case, found: Mapping[LayerGap, torch.dtype], loss: float) -> bool:
    """Return whether nobody feels the rounding: by the metric, or by its size beside what else is uncertain.

    Averages that were updated in half precision stand still before they arrive, which rounding alone does not tell.
    """
    if case.goal.eval_is_as_good:
        return True
    kept = any(layer.site.running_mean.dtype in _HALF for layer in found)
    return not kept and loss < _NOTHING and max(layer.apart for layer in found) < SMALL


def _half(layer: LayerGap, fewest: int = _FEWEST) -> torch.dtype | None:
    """Return the half-precision dtype that the statistics have, or whose values they hold."""
    dtype = layer.site.running_mean.dtype
    if dtype in _HALF:
        return dtype
    telling = _telling(torch.cat(layer.stored))
    if dtype != torch.float32 or is_initial(layer) or telling.numel() < fewest:
        return None
    return next((half for half in _HALF if torch.equal(telling.to(half).double(), telling)), None)


def _telling(values: Tensor) -> Tensor:
    """Return the different values that would not fit into half precision unless they had been rounded to it."""
    significand = torch.frexp(values).mantissa * 2**_SHORT
    telling: Tensor = values[torch.isfinite(values) & (significand != significand.round())].unique()
    return telling


def _loss(layer: LayerGap, dtype: torch.dtype) -> float:
    """Return half a unit in the last place of the largest mean, in standard deviations of its channel."""
    unit = torch.finfo(dtype).eps * 2.0 ** layer.stored[0].abs().clamp(min=1e-30).log2().floor()
    return float((unit / 2 / (layer.measured[1] + layer.eps).sqrt()).nan_to_num(0.0).max())
