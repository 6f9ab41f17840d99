"""BN009."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn import Module

from batchnorm.checks.patterns import layer_name, norm_module, setting
from batchnorm.checks.rule import Finding, Fix, Rule
from batchnorm.dataflow.graph import Graph
from batchnorm.placement.sites import norm_calls

__all__ = ["ImplausibleEps"]

_FROM = 0.1
_DEFAULT = 1e-5


class ImplausibleEps(Rule):
    """An ε as large as the variance it is added to, or none.

    What it does:
        Finds norms whose ε is 0.1 or more, or zero. Published networks use 1e-5, PyTorch's value, to 1e-3,
        TensorFlow's.

    Why it matters:
        The norm divides by √(σ² + ε). ε only keeps that from being a division by zero; where it is as large as σ², the
        norm divides by something else than the standard deviation: with ε = 1 and σ = 0.1, the output has a standard
        deviation of 0.1 instead of 1. With ε = 0 a channel of variance 0, as one behind a dead ReLU, is 0/0, NaN; in
        training, torch refuses it. A value such as 1 is often the momentum in the wrong place:
        ``nn.BatchNorm2d(num_features, eps, momentum)``.

    Flagged:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, 0.1), nn.ReLU())
            inputs = torch.randn(4, 3, 8, 8)

    Use instead:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.1), nn.ReLU())
            inputs = torch.randn(4, 3, 8, 8)

    Fix safety:
        Unsafe: the output changes, and what was trained with the old ε has to be trained again, or keeps it. The fix
        sets 1e-5. A norm called as a function has no fix.
    """

    code = "BN009"
    name = "implausible-eps"

    def find(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield the norms whose ε is too large or none."""
        for norm in norm_calls(graph):
            eps = norm.args["eps"]
            if 0 < eps < _FROM:
                continue
            by_code = norm_module(model, norm) is None
            message = (
                f"Its eps is {eps:g}, added to the variance: it divides by something else than the standard deviation."
                if eps >= _FROM
                else f"Its eps is {eps:g}: a channel of variance 0 becomes NaN."
            )
            yield self.finding(
                layer_name(norm),
                message,
                ("Call batch_norm with" if by_code else "Construct the norm with")
                + " eps=1e-5, and train again if it was trained so.",
                norm,
                None if by_code else Fix("set eps to 1e-5", False, setting(norm.module, "eps", _DEFAULT)),
            )
