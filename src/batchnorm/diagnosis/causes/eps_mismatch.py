"""Another ε than in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, module_line, names_of
from batchnorm.diagnosis.distance import squared_distance, typical
from batchnorm.diagnosis.gaps import LayerGap
from batchnorm.diagnosis.norm_record import Basis, Statistics
from batchnorm.diagnosis.passes import Pass
from batchnorm.errors import NonFiniteError
from batchnorm.statistics.sites import Site

__all__ = ["EpsMismatch"]

_USUAL = (1e-3, 1e-5, 1e-4, 1e-2, 1e-6, 1e-1)
_FELT = 0.03
_COLLAPSED = 0.4
_HURT = 0.1
_MOST_NAMES = 8
_NEAREST = 4
"""So many norms before the first gap are tried one by one."""


class EpsMismatch(Cause):
    """The ε that is added to the variance is not that of the training.

    What it finds:
        A gap that collapses when the norms before it use another of the usual ε: 10⁻³ (Keras, TensorFlow, EfficientNet)
        or 10⁻⁵ (PyTorch, Flax, ONNX), and a few others. A norm whose own ε is wrong stores the right statistics; its
        gain is wrong, and the norms behind it meet another scale. It takes variances that are not large beside ε.

    What excludes it:
        Statistics that fit the training batches: then the data changed, not the model.

    Evidence:
        The ε it has, the one that fits, and the gap on either.

    Cure:
        Set ε to that of the training.
    """

    key = "eps_mismatch"
    excluded_by_freeze = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion, at the first norm whose ε is wrong."""
        left = case.off
        # the first norm depends on no ε; what the others meet need not be far off each for all to be hurt
        hurt = left
        if not case.explained and not left:
            hurt = [layer for layer in case.layers if _distance(layer, layer.deployed) > _HURT]
        if not hurt or hurt[0] is case.layers[0]:
            return
        before = case.layers[: case.layers.index(hurt[0])]
        now = _gap(case, case.gaps.deployed)
        best: tuple[float, list[LayerGap], float] | None = None
        for candidates in [case.layers, *([layer] for layer in before[: -_NEAREST - 1 : -1])]:
            for eps in _USUAL:
                layers = [layer for layer in candidates if layer.eps != eps]
                if not any(_felt(layer, eps) for layer in layers if layer in before):
                    continue
                after = _try(case, layers, eps)
                if best is None or after < best[0]:
                    best = (after, layers, eps)
        if best is None or best[0] > _COLLAPSED * now:
            return
        after, layers, eps = best
        case.explained.update(names_of(left))
        first = layers[0]
        many = f"all {len(layers)} norms" if len(layers) > 1 else first.name or "the norm"
        evidence = (
            f"The mean gap in eval mode falls from {now:.2g} to {after:.2g} standard deviations with eps={eps:g} "
            f"instead of {first.eps:g} in {many}; the smallest variance there is {float(first.stored[1].min()):.2g}."
        )
        cure = (
            f"{module_line(first.name)}.eps = {eps:g}"
            if len(layers) == 1
            else f"for name in {names_of(layers)!r}: model.get_submodule(name).eps = {eps:g}"
            if len(layers) <= _MOST_NAMES
            else f"[setattr(m, 'eps', {eps:g}) for m in model.modules() if getattr(m, 'running_var', None) is not None]"
        )
        yield Suspicion(names_of(layers), evidence, cure, Basis("stored", eps=_eps(layers, eps)))


def _eps(layers: Sequence[LayerGap], eps: float) -> dict[Site, float]:
    return {layer.site: eps for layer in layers}


def _felt(layer: LayerGap, eps: float) -> bool:
    """Return whether the gain of the typical channel would be another."""
    variance = layer.stored[1]
    return float((0.5 * ((variance + eps) / (variance + layer.eps)).log()).abs().nan_to_num(0.0).mean()) > _FELT


def _gap(case: Case, done: Pass) -> float:
    """Return the mean over the norms of the distance between stored statistics and what is met, beyond chance."""
    return sum(_distance(layer, _met(done, layer)) for layer in case.layers) / len(case.layers)


def _distance(layer: LayerGap, met: Statistics) -> float:
    """Return the distance beyond chance between stored statistics and what is met, without the ε that is in doubt."""
    variance = layer.measured[1]
    noise = layer.noise * ((variance + layer.eps) / variance.clamp(min=1e-30)).clamp(max=1e3).square()
    return typical((squared_distance(*layer.stored, *met, 1e-12) - 3 * noise).nan_to_num(nan=0.0, posinf=0.0))


def _met(done: Pass, layer: LayerGap) -> Statistics:
    mean, variance = done.records[layer.site].statistics
    return mean.cpu(), variance.cpu()


def _try(case: Case, layers: Sequence[LayerGap], eps: float) -> float:
    basis = Basis("stored", eps=_eps(layers, eps))
    try:
        return _gap(case, case.passes.run(basis))
    except NonFiniteError:
        return float("inf")
