"""BN002."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn import Module

from batchnorm.checks.order import activated_layer, is_a_design
from batchnorm.checks.patterns import layer_name, swap
from batchnorm.checks.rule import Finding, Fix, Rule
from batchnorm.dataflow.graph import Graph
from batchnorm.dataflow.operator_kinds import family, suppresses
from batchnorm.placement.sites import norm_calls

__all__ = ["NormAfterReLU"]


class NormAfterReLU(Rule):
    """A norm after the ReLU instead of before it.

    What it does:
        Finds batch norms that follow a ReLU (or ReLU6, or a clamp at zero) that directly follows a convolution or
        linear layer. Dropout and maximum pooling may lie between ReLU and norm. A norm that reads a concatenation or a
        sum of such outputs is a different design (DenseNet, pre-activation ResNet) and is not meant, nor is a deep
        network that keeps this order throughout (ConvMixer, time-delay networks): ten norms or more, and nine tenths of
        those behind layers. Select ``norm-after-activation`` to have these found, too.

    Why it matters:
        The ReLU sets what is negative to zero. The norm subtracts the mean after that, which moves the zeros to a
        negative constant and puts part of the positive values below zero: the suppression is undone. The mean and the
        variance of a rectified value also describe it badly, for half of its distribution sits in one point. The output
        of the layer itself is closer to a Gaussian, and to normalize that makes the distribution stable (Ioffe &
        Szegedy 2015, section 3.2).

    Flagged:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8))
            inputs = torch.randn(2, 3, 8, 8)

    Use instead:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            inputs = torch.randn(2, 3, 8, 8)

    Fix safety:
        Unsafe: the model computes something else afterwards, with statistics that were measured elsewhere; train it
        again. The fix changes the order of the two modules where they are neighbours in one ``Sequential``. They keep
        their names, so that the keys of the state dict stay.
    """

    code = "BN002"
    name = "norm-after-relu"

    def find(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield the norms that follow a layer and its ReLU."""
        if is_a_design(graph):
            return
        for norm in norm_calls(graph):
            found = activated_layer(graph, norm)
            if found is None or not suppresses(found[0]):
                continue
            relu, layer = found
            swapped = swap(model, graph, relu, norm)
            yield self.finding(
                layer_name(norm),
                f"It normalizes the output of the {family(relu)} behind {layer_name(layer) or 'the layer'}: its shift "
                "moves the suppressed values away from zero again.",
                "Put the norm between the layer and the activation, and train again.",
                norm,
                None if swapped is None else Fix("let the norm and the activation change places", False, swapped),
            )
