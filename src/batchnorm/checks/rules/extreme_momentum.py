"""BN008."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.checks.patterns import initial_statistics, layer_name, norm_module, setting, stored
from batchnorm.checks.rule import Finding, Fix, Rule
from batchnorm.dataflow.graph import Call, Graph
from batchnorm.nn.freeze import is_frozen
from batchnorm.placement.sites import norm_calls

__all__ = ["ExtremeMomentum"]

_FROM = 0.9
_DEFAULT = 0.1


class ExtremeMomentum(Rule):
    """A momentum that keeps next to nothing of the past, or takes in nothing at all.

    What it does:
        Finds norms with running statistics whose momentum is 0.9 or more, or is no number between 0 and 1. It also
        finds a momentum of 0 in a norm in training mode whose statistics still have their initial values, and so will
        have them for ever. A momentum of 0 that keeps statistics as they were measured is a choice, and not meant; nor
        is ``momentum=None``, the plain average of all batches.

    Why it matters:
        In PyTorch, momentum m is the weight of the new batch: running ← (1 − m)·running + m·batch. In TensorFlow, Keras
        and Caffe it is the weight of the old value. With 0.99 taken over from there, the running statistics are those
        of the last batch alone, to 1 %; a mean over B values then errs by σ/√B, and every evaluation depends on which
        batch came last. The average of the last batches has a variance m / (2 − m) times that of one batch: 0.98 for
        m = 0.99, and 0.005 for m = 0.01.

    Flagged:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.99), nn.ReLU())
            inputs = torch.randn(4, 3, 8, 8)

    Use instead:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.01), nn.ReLU())
            inputs = torch.randn(4, 3, 8, 8)

    Fix safety:
        Unsafe: statistics are collected in another way from now on. The fix sets 1 − m, and 0.1, the default, for 0, 1
        and what is outside. What is stored already stays: measure it again with
        ``batchnorm.recalibrate(model, batches)``. A norm called as a function has no fix.
    """

    code = "BN008"
    name = "extreme-momentum"

    def find(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield the norms whose momentum can hardly be meant."""
        for norm in norm_calls(graph):
            module = norm_module(model, norm)
            momentum = norm.args["momentum"] if module is None else module.momentum
            if momentum is None or norm.args["running_mean"] is None or (module is not None and is_frozen(module)):
                continue
            problem = _problem(model, norm, module, momentum)
            if problem is None:
                continue
            better = round(1 - momentum, 10) if _FROM <= momentum < 1 else _DEFAULT
            construct = "Call batch_norm with" if module is None else "Construct the norm with"
            yield self.finding(
                layer_name(norm),
                problem,
                f"{construct} momentum={better:g}, and measure what was collected before anew, "
                "batchnorm.recalibrate(model, batches).",
                norm,
                None
                if module is None
                else Fix(f"set the momentum to {better:g}", False, setting(norm.module, "momentum", better)),
            )


def _problem(model: Module, norm: Call, module: _BatchNorm | None, momentum: float) -> str | None:
    if not 0 <= momentum <= 1:
        return f"Its momentum is {momentum:g}; the running statistics are an average only between 0 and 1."
    if momentum >= _FROM:
        if module is None and (momentum == 1 or not norm.args["training"]):
            return None  # code that averages by itself passes 1 for the first batch, and anything where it is not read
        return (
            f"Its momentum is {momentum:g}, which is the weight of the new batch: the running statistics are those of "
            "the last batch, and hardly more."
        )
    mean, var = stored(model, norm, "running_mean"), stored(model, norm, "running_var")
    if momentum == 0 and norm.args["training"] and initial_statistics(mean, var):
        return "Its momentum is 0: the running statistics, mean 0 and variance 1, never change in training."
    return None
