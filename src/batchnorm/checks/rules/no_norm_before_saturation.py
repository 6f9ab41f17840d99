"""BN003."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn import Module

from batchnorm.checks.patterns import layer_name
from batchnorm.checks.rule import Finding, Fix, Rule
from batchnorm.dataflow.graph import Graph
from batchnorm.dataflow.operator_kinds import family
from batchnorm.placement.insertion import Insertion, module_obstacle
from batchnorm.placement.sites import find_placements, obstacle

__all__ = ["NoNormBeforeSaturation"]


class NoNormBeforeSaturation(Rule):
    """A sigmoid or tanh that reads a layer's output as it is, in a network that normalizes elsewhere.

    What it does:
        Finds convolutions and linear layers whose output goes to a sigmoid, a tanh or one of their piecewise linear
        forms (across dropout or pooling, perhaps) with no norm in between, while there is a batch norm earlier or later
        on the same path. Gates, whose value is multiplied with another tensor (squeeze-and-excitation, GLU, recurrent
        cells), and activations after which no further layer comes are not meant.

    Why it matters:
        A saturating function is flat outside a small region: of N(0, 1), 95 % lie within ±2, where the sigmoid's slope
        is still 0.1, but a layer whose output drifts to ±10 sends back a gradient of 5e-5. A norm holds the
        pre-activations in the region where the function responds, and lets γ and β move them out where that helps.
        With it, networks of sigmoids train that do not otherwise (Ioffe & Szegedy 2015, sections 1, 3.2 and 4.2.2).

    Flagged:
        ::

            model = nn.Sequential(
                nn.Linear(20, 50, bias=False), nn.BatchNorm1d(50), nn.Sigmoid(),
                nn.Linear(50, 50), nn.Sigmoid(),
                nn.Linear(50, 10),
            )
            inputs = torch.randn(8, 20)

    Use instead:
        ::

            model = nn.Sequential(
                nn.Linear(20, 50, bias=False), nn.BatchNorm1d(50), nn.Sigmoid(),
                nn.Linear(50, 50, bias=False), nn.BatchNorm1d(50), nn.Sigmoid(),
                nn.Linear(50, 10),
            )
            inputs = torch.randn(8, 20)

    Fix safety:
        Unsafe: a norm is put behind the layer, as ``batchnorm.place`` does it for the whole model, and its bias is
        dropped. In eval mode the output stays the same until the model is trained again, but training is different, and
        the keys of the state dict change (``conv.weight`` becomes ``conv.conv.weight``). There is no fix where the
        layer cannot be wrapped: it is called more than once, shares its parameters, or has other readers.
    """

    code = "BN003"
    name = "no-norm-before-saturation"

    def find(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield the layers whose output saturates without a norm."""
        for site in find_placements(graph):
            meant = site.kind == "saturating" and site.role == "hidden" and not site.summed
            if not (meant and site.norms_in_stack):
                continue
            reason = obstacle(site) or module_obstacle(model, graph, site.layer)
            fix = None if reason else Fix("put a norm behind the layer", False, Insertion.at(model, site).do)
            yield self.finding(
                layer_name(site.layer),
                f"Its output goes into the {family(site.activation)} as it is, though the network has norms elsewhere.",
                "Put a norm between them, and train again." + (f" It cannot be fixed here: {reason}" if reason else ""),
                site.layer,
                fix,
            )
