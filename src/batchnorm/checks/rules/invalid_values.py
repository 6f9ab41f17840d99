"""BN007."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Module

from batchnorm.checks.patterns import layer_name, stored
from batchnorm.checks.rule import Finding, Rule
from batchnorm.dataflow.graph import Graph
from batchnorm.placement.sites import norm_calls

__all__ = ["InvalidValues"]

_STATISTICS = ("running_mean", "running_var")
_PARAMETERS = ("weight", "bias")


class InvalidValues(Rule):
    """A norm that holds numbers which no data can have given it.

    What it does:
        Finds norms with NaN or infinity in the running mean, the running variance, γ or β, and with a running variance
        below zero. A mean of squares is never negative: such a variance was computed as E[x²] − E[x]² and rounded,
        averaged with weights of both signs, extrapolated, or belongs to a damaged file.

    Why it matters:
        One NaN in one channel makes every output NaN that depends on this channel. The running average never gets rid
        of it, as (1 − m)·NaN + m·x is NaN. Below −ε, a variance gives the square root of a negative number, which is
        NaN; above, it gives a factor of up to 1/√ε too much, without any sign of an error.

    Flagged:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            model[1].running_var[2] = -0.1
            inputs = torch.randn(4, 3, 8, 8)

    Use instead:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            inputs = torch.randn(4, 3, 8, 8)

    Fix safety:
        None: what the right numbers are, only data can tell, or a file that is not damaged. For statistics use
        ``batchnorm.recalibrate(model, batches)``; parameters have to be loaded from before the training diverged.
    """

    code = "BN007"
    name = "invalid-values"

    def find(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield the norms whose statistics or parameters are invalid."""
        for norm in norm_calls(graph):
            wrong = {name: _wrong(name, stored(model, norm, name)) for name in _STATISTICS + _PARAMETERS}
            said = [f"its {name} {problem}" for name, problem in wrong.items() if problem is not None]
            if said:
                message = f"{', '.join(said)}."
                yield self.finding(layer_name(norm), message[0].upper() + message[1:], _advice(wrong), norm)


def _wrong(name: str, tensor: Tensor | None) -> str | None:
    """Return what is wrong with a tensor, as the rest of a sentence; None if nothing is."""
    if tensor is None:
        return None
    broken, what = ~torch.isfinite(tensor), "not finite"
    if name == "running_var" and not broken.any():
        broken, what = tensor < 0, "negative"
    if not broken.any():
        return None
    first = int(broken.nonzero()[0])
    return (
        f"is {what} in {int(broken.sum())} of {tensor.numel()} channels (channel {first}: {float(tensor[first]):.3g})"
    )


def _advice(wrong: dict[str, str | None]) -> str:
    if any(wrong[name] is not None for name in _PARAMETERS):
        return "Load the weights from before the training diverged; what became NaN cannot be computed from anything."
    return "Measure the statistics on training data: batchnorm.recalibrate(model, batches), or load a sound checkpoint."
