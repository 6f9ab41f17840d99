"""BN010."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn import Module

from batchnorm.checks.patterns import layer_name, sole_reader
from batchnorm.checks.rule import Finding, Rule
from batchnorm.dataflow.graph import Graph
from batchnorm.placement.sites import norm_calls

__all__ = ["NormAfterNorm"]


class NormAfterNorm(Rule):
    """A norm that reads nothing but another norm's output.

    What it does:
        Finds batch norms whose output goes to nothing but a second batch norm. Where others read it too, a shortcut
        for instance, both norms do something, and they are not meant.

    Why it matters:
        A channel that comes out of the first norm has mean β₁ and variance γ₁²: the second one subtracts β₁ and divides
        by abs(γ₁) again. The two compute what one alone would, but for ε, with the sign of γ₁. β₁ has no effect at all,
        γ₁ none but through ε, and both get gradients of rounding errors; time and memory are spent twice.

    Flagged:
        ::

            model = nn.Sequential(
                nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU()
            )
            inputs = torch.randn(4, 3, 8, 8)

    Use instead:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            inputs = torch.randn(4, 3, 8, 8)

    Fix safety:
        None: which of the two a checkpoint should keep is for its owner to say. ``batchnorm.fold`` makes one map of
        both in a model that is only evaluated.
    """

    code = "BN010"
    name = "norm-after-norm"

    def find(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield the second norm of each pair."""
        norms = norm_calls(graph)
        for first in norms:
            second = sole_reader(graph, first.output)
            if second is not None and second in norms and second.args["input"].producer is not None:
                yield self.finding(
                    layer_name(second),
                    f"It normalizes what the norm {layer_name(first) or 'before it'} has normalized already.",
                    "Take one of the two norms away, and train again.",
                    second,
                )
