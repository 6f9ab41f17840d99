"""BN014."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn import Module

from batchnorm.checks.patterns import layer_name
from batchnorm.checks.rule import Finding, Rule
from batchnorm.dataflow.graph import Call, Graph
from batchnorm.placement.sites import norm_calls

__all__ = ["FewValues"]

_ENOUGH = 4


class FewValues(Rule):
    """A norm that takes its statistics from two or three values.

    What it does:
        Looks at a model in training mode, and finds norms that normalize by a batch with fewer than four values a
        channel: batch size times positions. It is the example inputs that are counted, so give a batch of the size and
        the resolution that you train with. Several norms of one model are one finding.

    Why it matters:
        Of two values x₁ and x₂ the mean lies halfway, and the norm gives ±d / √(d² + ε), d = (x₁ − x₂) / 2: plus and
        minus one, whatever the values are. All that passes is which of the two was larger. With m values the variance
        (divisor m − 1) of a normal channel has a relative standard deviation of √(2 / (m − 1)): 141 % for m = 2, 100 %
        for 3, 37 % for 16. The running statistics become an average of such estimates. It happens to norms behind a
        global pooling, or at the end of a network for large images that gets small ones.

    Flagged:
        ::

            model = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
            )
            inputs = torch.randn(2, 3, 8, 8)

    Use instead:
        ::

            model = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
            )
            inputs = torch.randn(16, 3, 8, 8)

    Fix safety:
        None: train with larger batches or images, with norms synchronized across processes
        (``nn.SyncBatchNorm.convert_sync_batchnorm(model)``), or with pre-trained norms that are frozen
        (``batchnorm.freeze(model)``).
    """

    code = "BN014"
    name = "few-values"

    def find(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield the norm that has few values, or the model itself if there are several."""
        if not model.training:
            return
        few = [norm for norm in norm_calls(graph) if norm.args["training"] and _values(norm) < _ENOUGH]
        names = list(dict.fromkeys(layer_name(norm) for norm in few))
        if not few:
            return
        worst = min(few, key=_values)
        advice = (
            "Check with a batch of the size you train with. If it is this one: larger batches or images, norms "
            "synchronized across processes, or frozen ones, batchnorm.freeze(model)."
        )
        if len(names) == 1:
            yield self.finding(names[0], f"It normalizes over {_described(worst)}.", advice, worst)
            return
        named = ", ".join(name or "(the model)" for name in names[:3]) + (", …" if len(names) > 3 else "")
        where = layer_name(worst) or "the model"
        message = f"{len(names)} norms ({named}) normalize over fewer than {_ENOUGH} values a channel; {where} over "
        yield self.finding("", message + f"{_described(worst)}.", advice, few[0])


def _values(norm: Call) -> int:
    """Return how many values a channel has, over the batch and all positions."""
    batch, _, *space = norm.args["input"].shape
    for size in space:
        batch *= size
    return int(batch)


def _described(norm: Call) -> str:
    batch, _, *space = norm.args["input"].shape
    positions = f" × space {'×'.join(map(str, space))}" if space else ""
    return f"{_values(norm)} values a channel (batch {batch}{positions})"
