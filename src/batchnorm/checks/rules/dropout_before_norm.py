"""BN004."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn import Module

from batchnorm.checks.patterns import layer_name, source, swap
from batchnorm.checks.rule import Finding, Fix, Rule
from batchnorm.dataflow.graph import Call, Graph
from batchnorm.dataflow.operator_kinds import DROPOUTS, family
from batchnorm.placement.sites import norm_calls

__all__ = ["DropoutBeforeNorm"]

_FROM = 0.01


class DropoutBeforeNorm(Rule):
    """Dropout whose output goes straight into a norm.

    What it does:
        Finds batch norms that directly follow dropout, of units, channels (``Dropout2d``) or the alpha kind, with
        p of 0.01 or more: below, the variance changes by a percent at most where the mean is zero. Dropout that is
        switched off for good (``training=False`` in a module in training mode) does not count.

    Why it matters:
        Dropout keeps the mean but not the variance: a unit with mean μ and variance σ² has variance
        (σ² + μ²) / (1 − p) − μ² while training, and σ² in eval mode. The norm stores the former and then divides the
        latter by it: its output shrinks in eval mode, and so does everything after it. Recalibration cannot cure
        it, for the weights were trained on the other scale (Li et al. 2019, arXiv 1801.05134, section 3).

    Flagged:
        ::

            model = nn.Sequential(
                nn.Linear(20, 50, bias=False), nn.Dropout(0.5), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 10)
            )
            inputs = torch.randn(8, 20)

    Use instead:
        ::

            model = nn.Sequential(
                nn.Linear(20, 50, bias=False), nn.BatchNorm1d(50), nn.ReLU(), nn.Dropout(0.5), nn.Linear(50, 10)
            )
            inputs = torch.randn(8, 20)

    Fix safety:
        Unsafe: training is different afterwards, and statistics that were measured behind the dropout have to be
        measured again. The fix changes the order of the two modules where they are neighbours in one ``Sequential``.
        They keep their names, so that the keys of the state dict stay.
    """

    code = "BN004"
    name = "dropout-before-norm"

    def find(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield the norms that read the output of dropout."""
        for norm in norm_calls(graph):
            dropout = source(norm.args["input"])
            if dropout is None or family(dropout) not in DROPOUTS or not _drops(model, dropout):
                continue
            swapped = swap(model, graph, dropout, norm)
            yield self.finding(
                layer_name(norm),
                f"It normalizes the output of {dropout.module or family(dropout)} (p = {dropout.args['p']:g}), whose "
                "variance is smaller in eval mode than the one it stores.",
                "Put the dropout behind the norm, best behind the last norm of the network, and train again.",
                norm,
                None if swapped is None else Fix("let the dropout and the norm change places", False, swapped),
            )


def _drops(model: Module, dropout: Call) -> bool:
    """Whether it drops enough in training mode to be seen in the variance."""
    switched_off = not dropout.args["train"] and model.get_submodule(dropout.module).training
    return dropout.args["p"] >= _FROM and not switched_off
