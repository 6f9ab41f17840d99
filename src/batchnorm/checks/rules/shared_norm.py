"""BN012."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn import Module

from batchnorm.absorbers.table import linear_operator_of
from batchnorm.checks.patterns import layer_name, source
from batchnorm.checks.rule import Finding, Rule
from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.placement.sites import norm_calls

__all__ = ["SharedNorm"]


class SharedNorm(Rule):
    """One norm for the outputs of several layers.

    What it does:
        Finds running statistics that several calls of batch norm share, if these calls read the outputs of different
        convolutions or linear layers. A layer and its norm that are called together several times, as in siamese
        networks and heads shared by the levels of a pyramid, are not meant.

    Why it matters:
        In training each call normalizes by its own batch. The running statistics become a mixture of all of them,
        weighted for the call that came last, and in eval mode every call is normalized by this mixture, which is the
        distribution of none. The model is good while training and wrong afterwards. Even at different steps of a
        recurrent network the distributions differ so much that each step needs statistics of its own (Cooijmans et al.
        2017, arXiv 1603.09025, section 3).

    Flagged:
        ::

            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
                    self.conv2 = nn.Conv2d(8, 8, 3, bias=False)
                    self.norm = nn.BatchNorm2d(8)

                def forward(self, x):
                    x = F.relu(self.norm(self.conv1(x)))
                    return F.relu(self.norm(self.conv2(x)))

            model = Net()
            inputs = torch.randn(4, 3, 8, 8)

    Use instead:
        ::

            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
                    self.conv2 = nn.Conv2d(8, 8, 3, bias=False)
                    self.norm1 = nn.BatchNorm2d(8)
                    self.norm2 = nn.BatchNorm2d(8)

                def forward(self, x):
                    x = F.relu(self.norm1(self.conv1(x)))
                    return F.relu(self.norm2(self.conv2(x)))

            model = Net()
            inputs = torch.randn(4, 3, 8, 8)

    Fix safety:
        None: the model's code decides which norm it calls. Give each layer a norm of its own, and train again; for a
        trained model it helps to copy the norm and to measure the copies, ``batchnorm.recalibrate(model, batches)``.
    """

    code = "BN012"
    name = "shared-norm"

    def find(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield the norms behind different layers, each once."""
        behind: dict[str, dict[str, Call]] = {}
        for norm in norm_calls(graph):
            mean, layer = norm.args["running_mean"], source(norm.args["input"])
            if isinstance(mean, Value) and mean.names and layer is not None and linear_operator_of(layer) is not None:
                behind.setdefault(mean.names[0], {}).setdefault(layer_name(layer), norm)
        for layers in behind.values():
            if len(layers) > 1:
                second = list(layers.values())[1]
                named = ", ".join(list(layers)[:3]) + (", …" if len(layers) > 3 else "")
                yield self.finding(
                    layer_name(second),
                    f"It normalizes the outputs of {len(layers)} layers ({named}) and has one set of running "
                    "statistics for all of them.",
                    "Give each layer a norm of its own, and train again.",
                    second,
                )
