"""Constant inputs in the statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, names_of
from batchnorm.diagnosis.distance import layer_distance
from batchnorm.diagnosis.gaps import TOLERANCE, LayerGap
from batchnorm.diagnosis.kept_batches import batch_size, float_inputs, with_input
from batchnorm.diagnosis.norm_record import Statistics
from batchnorm.diagnosis.passes import Passes
from batchnorm.diagnosis.stem import explain, first_inputs
from batchnorm.moments import Moments

__all__ = ["Padding"]

_SHARE = 0.05
_EXPLAINED = 0.25
_SOME = 8


@dataclass(frozen=True)
class _Mixture:
    """Stored statistics as a mixture of what varies and of one constant vector."""

    stored: float  # the constant's share in the statistics
    met: float  # its share in the batches
    left: float  # what of the distance the mixture leaves


class Padding(Cause):
    r"""Padding, or other constant inputs, counted in the statistics of one side and not of the other.

    What it finds:
        A gap at the first norm whose stored statistics are a mixture: with a share q of one constant vector c (what
        the network makes of zeros, or the vector found most often among the positions of these batches) and the rest
        μ, v,

        .. math:: (1 - q) \mu + q\, c \qquad (1 - q)\, v + q (1 - q) (\mu - c)^2

        or without the last term, where constant batches alternate with others. Here q is another than in the batches
        given. Also batches that do not vary at all.

    What excludes it:
        Statistics that fit the training batches, unless these hold the padding and are like the batches without it.
        Norms that the user froze: the weights may have been trained with what they store.

    Evidence:
        The share q in the stored statistics, the share in the batches, and how much of the gap that explains.

    Cure:
        Leave padding out of the statistics (``batchnorm.nn.BatchNorm1d`` takes a mask), and measure them.
    """

    key = "padding"
    excluded_at_home = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion, at the first norm."""
        left = case.off
        if not left or left[0] is not case.layers[0]:
            return
        first = left[0]
        if all(map(_is_constant, case.passes.batches)):
            evidence = (
                f"All samples of a batch are the same; the largest variance met is "
                f"{float(first.measured[1].max()):.2g}, the largest stored {float(first.stored[1].max()):.2g}."
            )
        else:
            mixture = _mixture(case.passes, first)
            if mixture is None or not self._likely(case, first, mixture):
                return
            evidence = (
                f"{100 * mixture.stored:.0f} % of the stored statistics are those of a constant vector, as padding "
                f"gives it, and {100 * mixture.met:.0f} % of what these batches bring; that explains "
                f"{100 * (1 - mixture.left):.0f} % of the gap."
            )
        case.explained.update(names_of(left))
        yield Suspicion(names_of(left), evidence, case.recalibrate(left), case.corrected(left))

    def _likely(self, case: Case, first: LayerGap, mixture: _Mixture) -> bool:
        """Return whether it is padding rather than another contrast, or scale of weights, which look much alike."""
        if mixture.left > _EXPLAINED or abs(mixture.stored - mixture.met) < _SHARE:
            return False
        if mixture.met > 2 * _SHARE:
            return True
        if case.home is not None and _share(case.passes, case.home, first) > mixture.met + _SHARE:
            return _alike_without(case.passes, case.home, first) or not case.fits_home(first)
        if case.fits_home(first):
            return False
        change = explain(case.passes, first)
        return change is None or mixture.left < change.left


def _is_constant(batch: Any) -> bool:
    """Return whether all samples of a batch are the same."""
    if not float_inputs(batch) or batch_size(batch) < 2:
        return False
    first = next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    return torch.equal(first, first[:1].expand_as(first))


def _mixture(passes: Passes, layer: LayerGap) -> _Mixture | None:
    """Fit the share of a constant vector; None where the input of the norm cannot be had."""
    inputs = first_inputs(passes, passes.batches, layer)
    if not inputs:
        return None
    rows = _rows(inputs)
    candidates = [_most_frequent(rows)]
    if float_inputs(passes.batches[0]):
        zeros = first_inputs(passes, [with_input(passes.batches[0], torch.zeros_like)], layer)
        if zeros:
            candidates.append((_rows(zeros[:1]).double().mean(0), 0.0))
    fits = [fit for constant, met in candidates if (fit := _fit(layer, rows, constant, met)) is not None]
    return min(fits, key=lambda fit: fit.left, default=None)


def _share(passes: Passes, batches: Sequence[Any], layer: LayerGap) -> float:
    """Return the share of the vector that is found most often in what the norm meets on some batches."""
    inputs = first_inputs(passes, batches[:_SOME], layer)
    return _most_frequent(_rows(inputs))[1] if inputs else 0.0


def _alike_without(passes: Passes, batches: Sequence[Any], layer: LayerGap) -> bool:
    """Return whether some batches, without the vector found most often in them, are like the batches given."""
    inputs = first_inputs(passes, batches[:_SOME], layer)
    if not inputs:
        return False
    rows = _rows(inputs)
    constant, _ = _most_frequent(rows)
    rest = rows[~(rows.double() == constant).all(1)]
    if len(rest) < 2:
        return False
    met = Moments.of(rest)
    return layer_distance((met.mean, met.variance(correction=1)), layer.measured, layer.eps) < TOLERANCE


def _rows(inputs: Sequence[Tensor]) -> Tensor:
    """Return the vectors of all samples and positions, one a row."""
    return torch.cat([x.detach().movedim(1, -1).reshape(-1, x.shape[1]) for x in inputs]).cpu()


def _most_frequent(rows: Tensor) -> tuple[Tensor, float]:
    """Return the vector that is found most often among rows, and its share."""
    generator = torch.Generator().manual_seed(0)
    # equal rows have equal products with a random vector, others hardly ever
    keys = rows.double() @ torch.randn(rows.shape[1], generator=generator, dtype=torch.float64, device="cpu")
    _, places, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    most = int(counts.argmax())
    return rows[places == most][0].double(), float(counts[most]) / len(rows)


def _fit(layer: LayerGap, rows: Tensor, constant: Tensor, met: float) -> _Mixture | None:
    rest = rows[~(rows.double() == constant).all(1)] if met > _SHARE else rows
    met = met if met > _SHARE else 0.0
    if len(rest) < 2:
        return None
    moments = Moments.of(rest)
    mean, variance = moments.mean, moments.variance(correction=1)
    before = layer_distance(layer.stored, layer.measured, layer.eps)
    best: _Mixture | None = None
    for q in torch.linspace(0, 0.98, 99, dtype=torch.float64, device="cpu").tolist():
        for between in (1.0, 0.0):
            mixed: Statistics = (
                (1 - q) * mean + q * constant,
                (1 - q) * variance + between * q * (1 - q) * (mean - constant).square(),
            )
            left = layer_distance(layer.stored, mixed, layer.eps) / max(before, 1e-300)
            if best is None or left < best.left:
                best = _Mixture(q, met, left)
    return best
