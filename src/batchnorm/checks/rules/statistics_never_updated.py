"""BN006."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.checks.patterns import initial_statistics, norm_module
from batchnorm.checks.rule import Finding, Rule
from batchnorm.dataflow.graph import Call, Graph
from batchnorm.placement.sites import norm_calls

__all__ = ["StatisticsNeverUpdated"]

_ADVICE = "Measure the statistics on training data, batchnorm.recalibrate(model, batches), or load the trained ones."


class StatisticsNeverUpdated(Rule):
    """A norm that uses running statistics which nobody ever measured.

    What it does:
        Finds norms that normalize by running statistics still at their initial values: mean 0 and variance 1 in every
        channel, or one and the same variance in every channel and a count of zero batches, as ``batchnorm.place``
        leaves them. Where that is so of every norm, there is one finding for the whole model: it was never trained, its
        buffers were not loaded, or it was trained with the statistics held back (``momentum=0``). A norm that uses the
        statistics of the batch, as all do in training mode, is not looked at.

    Why it matters:
        With those values the norm divides by √(1 + ε) and subtracts nothing: it does not normalize at all, while the
        layers around it were trained on values with mean 0 and variance 1. The output is wrong, without an error.

    Flagged:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
            inputs = torch.randn(2, 3, 8, 8)

    Use instead:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            inputs = torch.randn(2, 3, 8, 8)
            with torch.no_grad():
                for _ in range(10):  # or batchnorm.recalibrate(model, batches)
                    model(torch.randn(16, 3, 8, 8))
            model.eval()

    Fix safety:
        None: the statistics have to come from data, and a check has only an example. Use ``batchnorm.recalibrate``.
    """

    code = "BN006"
    name = "statistics-never-updated"

    def find(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield the norms on initial statistics, or the model itself if all of them are."""
        using: dict[_BatchNorm, Call] = {}
        for call in norm_calls(graph):
            module = norm_module(model, call)
            if module is not None and not call.args["training"]:
                using.setdefault(module, call)
        never = {norm: call for norm, call in using.items() if _is_initial(norm)}
        if len(never) == len(using) > 1:
            message = f"None of its {len(using)} norms ever had its running statistics updated{_why(list(never))}."
            yield self.finding("", message, _ADVICE, next(iter(never.values())))
            return
        for norm, call in never.items():
            message = f"Its running statistics were never updated{_why([norm])}, and it normalizes by them."
            yield self.finding(call.module, message, _ADVICE, call)


def _is_initial(norm: _BatchNorm) -> bool:
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None or mean.is_meta or var.is_meta or not var.numel():
        return False
    if initial_statistics(mean, var):
        return True
    # of measured variances no two are the same; γ = 1 tells a placed norm of one channel from a trained one
    return _count(norm) == 0 and bool((var == var[0]).all()) and _is_one(norm.weight)


def _is_one(weight: Tensor | None) -> bool:
    return weight is None or bool((weight == 1).all())


def _count(norm: _BatchNorm) -> int | None:
    return None if norm.num_batches_tracked is None else int(norm.num_batches_tracked)


def _why(norms: list[_BatchNorm]) -> str:
    """Return what is known about the reason, as the rest of a sentence."""
    if all(norm.momentum == 0 for norm in norms):
        return " (momentum is 0)"
    counts = [_count(norm) for norm in norms]
    return " (they count 0 batches)" if all(count == 0 for count in counts) else ""
