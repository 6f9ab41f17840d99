"""BN013."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn import Module

from batchnorm.checks.patterns import initial_statistics, layer_name, norm_module, stored
from batchnorm.checks.rule import Finding, Rule
from batchnorm.dataflow.graph import Call, Graph
from batchnorm.placement.sites import norm_calls

__all__ = ["FunctionalNormWithoutMode"]

_ADVICE = "Pass training=self.training to batch_norm."


class FunctionalNormWithoutMode(Rule):
    """A functional batch norm that does the same in training and in eval mode.

    What it does:
        Looks at a model in training mode, at calls of ``F.batch_norm`` by its code, with running statistics that the
        model holds. Finds those without ``training=True`` if the statistics still have their initial values, or γ is
        being trained. Finds those with ``training=True`` that have it in eval mode too, for which the model is run
        once more, in eval mode. A norm with fixed statistics and a fixed γ is frozen, and not meant.

    Why it matters:
        ``training`` is False by default. Without it the batch normalizes nothing, and nothing is ever stored: with
        mean 0 and variance 1 the call divides by √(1 + ε), and the network trains as one without a norm. With a fixed
        ``training=True``, what the model says about one input depends on the others in the batch even in eval mode, and
        each prediction changes the running statistics.

    Flagged:
        ::

            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.conv = nn.Conv2d(3, 8, 3, bias=False)
                    self.register_buffer("mean", torch.zeros(8))
                    self.register_buffer("var", torch.ones(8))

                def forward(self, x):
                    return F.relu(F.batch_norm(self.conv(x), self.mean, self.var))

            model = Net()
            inputs = torch.randn(4, 3, 8, 8)

    Use instead:
        ::

            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.conv = nn.Conv2d(3, 8, 3, bias=False)
                    self.register_buffer("mean", torch.zeros(8))
                    self.register_buffer("var", torch.ones(8))

                def forward(self, x):
                    return F.relu(F.batch_norm(self.conv(x), self.mean, self.var, training=self.training))

            model = Net()
            inputs = torch.randn(4, 3, 8, 8)

    Fix safety:
        None: the call is in the code of the model, which has to pass the mode on.
    """

    code = "BN013"
    name = "functional-norm-without-mode"

    def find(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield the calls that use running statistics in training."""
        for norm in _by_code(model, graph):
            if norm.args["training"] or not model.training or not model.get_submodule(norm.module).training:
                continue
            mean, var = stored(model, norm, "running_mean"), stored(model, norm, "running_var")
            initial = initial_statistics(mean, var)
            if initial or _is_trained(model, norm):
                what = "mean 0 and variance 1" if initial else "what is stored"
                yield self.finding(
                    layer_name(norm),
                    f"batch_norm is called with training=False in training mode: it normalizes by {what}, and takes "
                    "no batch in.",
                    _ADVICE,
                    norm,
                )

    def needs_eval(self, model: Module, graph: Graph) -> bool:
        """Whether code calls batch_norm with training=True: so it may do in eval mode."""
        return any(norm.args["training"] for norm in _by_code(model, graph))

    def find_in_eval(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield the calls that use the batch in eval mode."""
        for norm in _by_code(model, graph):
            if norm.args["training"] and not model.get_submodule(norm.module).training:
                yield self.finding(
                    layer_name(norm),
                    "batch_norm is called with training=True in eval mode, too: each output depends on the rest of "
                    "the batch, and the running statistics go on changing.",
                    _ADVICE,
                    norm,
                )


def _by_code(model: Module, graph: Graph) -> list[Call]:
    """Return the calls that no norm module made, and that read running statistics which the model holds."""
    calls = [norm for norm in norm_calls(graph) if norm_module(model, norm) is None]
    return [norm for norm in calls if stored(model, norm, "running_mean") is not None]


def _is_trained(model: Module, norm: Call) -> bool:
    value = norm.args["weight"]
    names = () if value is None else value.names
    return any(parameter.requires_grad for name, parameter in model.named_parameters() if name in names)
