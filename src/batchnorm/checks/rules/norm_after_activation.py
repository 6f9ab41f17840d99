"""BN015."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn import Module

from batchnorm.checks.order import activated_layer, is_a_design
from batchnorm.checks.patterns import layer_name, swap
from batchnorm.checks.rule import Finding, Fix, Rule
from batchnorm.dataflow.graph import Graph
from batchnorm.dataflow.operator_kinds import family, suppresses
from batchnorm.placement.sites import norm_calls

__all__ = ["NormAfterActivation"]


class NormAfterActivation(Rule):
    """A norm after GELU, SiLU, PReLU, leaky ReLU or the like, instead of before it.

    What it does:
        Finds batch norms that follow an activation that directly follows a convolution or linear layer; dropout and
        maximum pooling may lie between activation and norm. Activations of the ReLU's family are meant that suppress
        nothing entirely; ReLU itself in deep networks that keep this order throughout, which ``norm-after-relu``
        leaves out. Off unless it is selected by its whole code or name: such networks are designed so (ConvMixer, some
        discriminators and speech encoders), and are trained well.

    Why it matters:
        The output of the layer itself is closer to a Gaussian than that of an activation, and to normalize it holds the
        activation's input in the range where it bends (Ioffe & Szegedy 2015, section 3.2). Unlike behind a ReLU
        (``norm-after-relu``), no zeros are moved, and what is lost is less: compare both orders on your own task.

    Flagged:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.BatchNorm2d(8))
            inputs = torch.randn(4, 3, 8, 8)

    Use instead:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2))
            inputs = torch.randn(4, 3, 8, 8)

    Fix safety:
        Unsafe: the model computes something else afterwards, with statistics that were measured elsewhere; train it
        again. The fix changes the order of the two modules where they are neighbours in one ``Sequential``. They keep
        their names, so that the keys of the state dict stay.
    """

    code = "BN015"
    name = "norm-after-activation"
    by_default = False

    def find(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield the norms that follow a layer and its activation."""
        relu_too = is_a_design(graph)
        for norm in norm_calls(graph):
            found = activated_layer(graph, norm)
            if found is None or (suppresses(found[0]) and not relu_too):
                continue
            activation, layer = found
            swapped = swap(model, graph, activation, norm)
            yield self.finding(
                layer_name(norm),
                f"It normalizes the output of the {family(activation)} behind {layer_name(layer) or 'the layer'}, not "
                "its input.",
                "Try the norm between the layer and the activation, and train again.",
                norm,
                None if swapped is None else Fix("let the norm and the activation change places", False, swapped),
            )
