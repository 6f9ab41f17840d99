"""Channels that carry nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from batchnorm.diagnosis.case import Case, Severity, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, listing, module_line, names_of
from batchnorm.diagnosis.causes.initial import is_zero
from batchnorm.diagnosis.gaps import LayerGap

__all__ = ["DeadChannels", "constant_channels"]

_TINY = 1e-6
_SMALL_GAMMA = 1e-3
_LEAST = 0.02
"""A smaller share of dead channels is not worth a finding."""
_FROM_ZERO = 0.2
"""A greater share of negative γ is of a norm that was initialized with γ = 0."""


class DeadChannels(Cause):
    """Channels whose γ, or whose variance, is as good as zero.

    What it finds:
        γ below 10⁻³ of the layer's largest: the channel is β whatever comes in. Or a measured variance below 10⁻⁶ of
        the layer's largest, and a stored one that agrees or is on its way there: the channel is constant, and
        1/√(v + ε) multiplies its noise by up to 1/√ε. Norms behind dead channels may meet constants in their turn; they
        are counted with them.

    What excludes it:
        A norm whose every γ and β is exactly 0; see ``zero_init``. γ of both signs, a fifth or more of the others below
        0: such a norm was initialized with 0 and has not been trained for long, and some γ have not left it.

    Evidence:
        Which channels, of how many, and their γ or variance.

    Cure:
        Nothing is lost where they were pruned on purpose: remove them. Else set γ to 1, or give the filters before
        constant channels new weights, and train on, without weight decay on γ.
    """

    key = "dead_channels"
    severity = "doubtful"
    excluded_at_home = False
    excluded_by_freeze = False
    judged_by_metric = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion for all layers with dead channels."""
        found: list[tuple[LayerGap, Tensor]] = []
        seen_gamma = False
        for layer in case.layers:
            if is_zero(layer):
                continue
            gamma, constant = _small_gamma(layer), constant_channels(layer)
            if bool((constant & _kept(layer, constant)).any()) and not seen_gamma:
                continue  # statistics of a channel that was alive: its weights were changed since
            dead = gamma | constant
            if float(dead.double().mean()) > _LEAST:
                found.append((layer, dead))
                if seen_gamma or not layer.excess(dead) > case.gaps.threshold:
                    case.explained.add(layer.name)
            seen_gamma |= bool(gamma.any())
        if not found:
            return
        first, dead = found[0]
        # a γ that was set to zero after training changes what the norms behind it meet
        hurt = [layer for layer in case.off if seen_gamma and case.layers.index(layer) > case.layers.index(first)]
        case.explained.update(names_of(hurt))
        channels = dead.nonzero().flatten().tolist()
        by_gamma = bool(_small_gamma(first)[dead].any())
        values = first.record.weight if by_gamma else first.measured[1]
        assert values is not None
        largest = float(values.detach().cpu().double().abs()[dead].max())
        more = f"; {_norms(len(found) - 1, 'more ')} some" if len(found) > 1 else ""
        more += f"; {_norms(len(hurt), '', ' behind it')} a gap" if hurt else ""
        evidence = (
            f"{len(channels)} of {dead.numel()} channels ({listing(channels)}) have "
            f"{'|γ|' if by_gamma else 'a variance'} of at most {largest:.2g}{more}."
        )
        gamma_of = f"{module_line(first.name)}.weight.data"
        cure = (
            f"w = {gamma_of}; w[w.abs() <= {_SMALL_GAMMA:g} * w.abs().max()] = 1.0  # then train on, γ without decay"
            if by_gamma
            else "# remove these channels, or give the filters before them new weights, and train on"
        )
        severity: Severity | None = "wrong" if hurt else None
        yield Suspicion(names_of(layer for layer, _ in found), evidence, cure, severity=severity)


def _small_gamma(layer: LayerGap) -> Tensor:
    weight = layer.record.weight
    if weight is None:
        return torch.zeros_like(layer.stored[0], dtype=torch.bool)
    gamma = weight.detach().cpu().double()
    small = gamma.abs() <= _SMALL_GAMMA * gamma.abs().max()
    around_zero = bool((gamma < 0)[~small].double().mean() > _FROM_ZERO)
    return torch.zeros_like(small) if around_zero else small


def _kept(layer: LayerGap, constant: Tensor) -> Tensor:
    """Return which channels have a stored variance as large as that of the channels that vary."""
    varying = layer.stored[1][~constant]
    return layer.stored[1] > 0.1 * varying.median() if varying.numel() else layer.stored[1] > 0


def constant_channels(layer: LayerGap) -> Tensor:
    """Return which channels have a variance of at most 10⁻⁶ of the layer's largest; none where no channel varies."""
    variance = layer.measured[1]
    varying = variance[variance > 0]
    if not varying.numel():
        return torch.zeros_like(variance, dtype=torch.bool)
    return variance <= _TINY * varying.max()


def _norms(count: int, more: str, where: str = "") -> str:
    return f"{count} {more}{'norm' if count == 1 else 'norms'}{where} {'has' if count == 1 else 'have'}"
