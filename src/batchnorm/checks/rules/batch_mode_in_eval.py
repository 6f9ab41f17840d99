"""BN005."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn import Module

from batchnorm.checks.patterns import layer_name, norm_module
from batchnorm.checks.rule import Finding, Fix, Rule
from batchnorm.dataflow.graph import Call, Graph
from batchnorm.errors import StateError
from batchnorm.placement.insertion import KeyChanges
from batchnorm.placement.sites import norm_calls

__all__ = ["BatchModeInEval"]


class BatchModeInEval(Rule):
    """A norm that uses the batch's statistics in a model that is in eval mode.

    What it does:
        Finds batch norms that normalize by the mean and variance of the batch while the model is in eval mode: because
        the norm itself was left in training mode, keeps no running statistics (``track_running_stats=False``), or is
        called as a function with ``training=True``. A model in training mode is not looked at.

    Why it matters:
        What the model says about one input then depends on the others in the batch: on their order, their number, and
        on the class they belong to. A batch of one has no variance at all. In training mode the norm also goes on
        changing its running statistics with every prediction.

    Flagged:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
            model[1].train()
            inputs = torch.randn(2, 3, 8, 8)

    Use instead:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
            inputs = torch.randn(2, 3, 8, 8)

    Fix safety:
        Unsafe: the output changes, to the one by the running statistics; those have to be good. The fix puts the norm
        into eval mode. There is none for a norm without running statistics: construct it with
        ``track_running_stats=True`` and measure them with ``batchnorm.recalibrate``.
    """

    code = "BN005"
    name = "batch-mode-in-eval"

    def find(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield the norms in batch mode, if the model is in eval mode."""
        if model.training:
            return
        for norm in norm_calls(graph):
            if norm.args["training"]:
                yield self._at(model, norm)

    def _at(self, model: Module, norm: Call) -> Finding:
        module = norm_module(model, norm)
        if module is not None and module.training and module.running_mean is not None:
            return self.finding(
                norm.module,
                "It is in training mode, though the model is in eval mode: each output depends on the rest of the "
                "batch, and the running statistics go on changing.",
                "Call model.eval() after whatever put the norm into training mode.",
                norm,
                Fix("put the norm into eval mode", False, _Eval(norm.module)),
            )
        if module is not None and module.running_mean is None:
            return self.finding(
                norm.module,
                "It keeps no running statistics, so that each output depends on the rest of the batch even now.",
                "Construct it with track_running_stats=True and measure them: batchnorm.recalibrate(model, batches).",
                norm,
            )
        return self.finding(
            layer_name(norm),
            "batch_norm is called with training=True, though the model is in eval mode: each output depends on the "
            "rest of the batch.",
            "Pass training=self.training, and the running statistics with it.",
            norm,
        )


class _Eval:
    """Puts the module of that name into eval mode."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, model: Module) -> KeyChanges:
        try:
            model.get_submodule(self._name).eval()
        except AttributeError:
            raise StateError(
                f"{self._name}: expected the norm that was there when the model was read, and it is not. "
                "Call check on the model as it is now."
            ) from None
        return KeyChanges({}, [])
