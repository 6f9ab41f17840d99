"""BN011."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn import Module

from batchnorm.checks.axes import feature_axes
from batchnorm.checks.patterns import layer_name
from batchnorm.checks.rule import Finding, Rule
from batchnorm.dataflow.graph import Graph
from batchnorm.placement.sites import norm_calls

__all__ = ["NormOverOtherAxis"]


class NormOverOtherAxis(Rule):
    """A norm whose axis 1 is a position, while the features are on another axis.

    What it does:
        Finds batch norms of which the features lie on another axis than axis 1, the one that a batch norm takes for
        channels: behind linear layers, embeddings and recurrent layers, whose features are the last axis, or behind a
        convolution whose output was turned. Where it is not known which axis is which, because a tensor was reshaped
        or turned before, nothing is said. A linear layer that works along positions on purpose, with the variables on
        axis 1 of the model's input, looks the same: there, leave the rule out with ``ignore``.

    Why it matters:
        ``nn.BatchNorm1d`` takes (N, C, L), a linear layer gives (N, L, C). The norm then needs L channels, works for
        this length only, and pools all features into one mean and one variance a position. The features keep their
        different scales, and if L happens to be C nothing fails.

    Flagged:
        ::

            model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(32, 4))
            inputs = torch.randn(8, 10, 16)

    Use instead:
        ::

            class Turned(nn.BatchNorm1d):
                def forward(self, x):
                    return super().forward(x.transpose(1, 2)).transpose(1, 2)

            model = nn.Sequential(nn.Linear(16, 32, bias=False), Turned(32), nn.ReLU(), nn.Linear(32, 4))
            inputs = torch.randn(8, 10, 16)

    Fix safety:
        None: the norm needs another number of channels, and training from the start.
    """

    code = "BN011"
    name = "norm-over-other-axis"

    def find(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield the norms whose input has its features elsewhere."""
        axes = feature_axes(graph)
        for norm in norm_calls(graph):
            value = norm.args["input"]
            axis = axes.get(value, 1)
            if axis != 1:
                shape = "×".join(map(str, value.shape))
                yield self.finding(
                    layer_name(norm),
                    f"It takes axis 1 (size {value.shape[1]}) of {shape} for its channels; the features are on axis "
                    f"{axis} (size {value.shape[axis]}).",
                    "Turn the axes for the norm, and give it one channel a feature: "
                    f"norm(x.transpose(1, {axis})).transpose(1, {axis}).",
                    norm,
                )
