"""BN001."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.absorbers.table import linear_operator_of
from batchnorm.checks.bias_proof import BiasProof
from batchnorm.checks.patterns import layer_name, norm_module
from batchnorm.checks.rule import Finding, Fix, Rule
from batchnorm.checks.shifts import cancelling_norms
from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.norms import alternative_to, norm_uses, unreached_norms
from batchnorm.dataflow.operator_kinds import BATCH_NORMS, family
from batchnorm.errors import StateError
from batchnorm.nn.freeze import is_frozen
from batchnorm.nn.statistics_in_use import held_on_running
from batchnorm.placement.insertion import KeyChanges, module_obstacle, slots_of

__all__ = ["BiasBeforeNorm"]


class BiasBeforeNorm(Rule):
    """A bias that the norm after it takes out again.

    What it does:
        Finds convolutions, transposed convolutions and linear layers that have a bias and whose output goes to nothing
        but batch norms, directly or through what carries a constant per channel on unchanged: average and maximum
        pooling, means over positions, interpolation, turned axes. Norms that keep fixed statistics in training (frozen
        ones, or in eval mode inside a model in training mode) are left out: they do not subtract the batch mean.

    Why it matters:
        The norm subtracts the mean of each channel, and a bias is a part of that mean: it has no effect on the output,
        and its gradient is zero but for rounding, which optimizers such as Adam blow up to full steps. It costs memory
        and time, and takes part in weight decay and in the norm of the gradient for nothing. The norm's own β does what
        the bias was meant to (Ioffe & Szegedy 2015, section 3.2).

    Flagged:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            inputs = torch.randn(2, 3, 8, 8)

    Use instead:
        ::

            model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            inputs = torch.randn(2, 3, 8, 8)

    Fix safety:
        Safe. The bias is dropped and subtracted from the running mean, so that the output is the same in eval mode; in
        training mode it is the same anyway. The state dict loses the bias. There is no fix where the layer or the norm
        is called more than once, shares its tensors, is parametrized, or is not a module of its own, nor where several
        norms read one layer.
    """

    code = "BN001"
    name = "bias-before-norm"

    def find(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield the layers whose bias has no effect, each once."""
        biases = dict.fromkeys(call.args.get("bias") for call in graph.calls if linear_operator_of(call) is not None)
        for bias in biases:
            if not isinstance(bias, Value):
                continue
            readers = graph.readers(bias)
            ends = [_ends(graph, call, bias) for call in readers]
            norms = [norm for found, _ in ends for norm in found]
            if not all(found for found, _ in ends) or not norms or any(_keeps_its_statistics(model, n) for n in norms):
                continue
            call = readers[0]
            obstacle = _obstacle(model, graph, call, norms, ends[0][1])
            yield self.finding(
                layer_name(call),
                f"Its bias ({bias.shape[0]} numbers) has no effect: {_called(norms)} each channel's mean, and the bias "
                "with it.",
                "Construct the layer with bias=False." + (f" It cannot be fixed here: {obstacle}" if obstacle else ""),
                call,
                None if obstacle else _fix(model, call, norms[0]),
            )


def _ends(graph: Graph, call: Call, bias: Value) -> tuple[list[Call], list[Value]]:
    """Return the norms that take the bias out again, and the values on the way, if ``call`` is a layer of that bias."""
    meant = linear_operator_of(call) is not None and call.args.get("bias") is bias
    return cancelling_norms(graph, call) if meant else ([], [])


_MOST_NAMES = 4


def _called(norms: list[Call]) -> str:
    names = list(dict.fromkeys(norm.module for norm in norms))
    if len(names) == 1:
        return f"the norm {names[0]} subtracts" if names[0] else "the norm subtracts"
    shown = [name or "(a function)" for name in names]
    more = [f"{len(shown) - _MOST_NAMES} more"] if len(shown) > _MOST_NAMES else []
    *first, last = [*shown[:_MOST_NAMES], *more]
    return f"the norms {', '.join(first)} and {last} subtract"


def _keeps_its_statistics(model: Module, norm: Call) -> bool:
    module = norm_module(model, norm)
    held = module is not None and (is_frozen(module) or held_on_running(module))
    return held or (model.training and not norm.args["training"])


def _obstacle(model: Module, graph: Graph, layer: Call, norms: list[Call], values: list[Value]) -> str | None:
    """Return why the bias cannot be dropped without a change elsewhere, as a sentence."""
    for norm in norms:
        obstacle = _norm_obstacle(model, graph, norm)
        if obstacle is not None:
            return obstacle
    for value in values:
        if value.held_by:
            return f"The layer's output is also read by {value.held_by[0]}."
    obstacle = module_obstacle(model, graph, layer)
    if obstacle is not None:
        return obstacle
    if len(norms) > 1:
        return "Several norms read its output, and the bias is a part of each of their running means."
    module = norm_module(model, norms[0])
    assert module is not None
    other = alternative_to(model, module, unreached_norms(model, norm_uses(model, graph)))
    if other is not None:
        return f"{other} stands beside the norm and is not reached by the example inputs: its mean would need the bias."
    return None


def _norm_obstacle(model: Module, graph: Graph, norm: Call) -> str | None:
    """Return why the running mean of a norm cannot take a bias over, as a sentence."""
    module = norm_module(model, norm)
    if module is None:
        return "The norm is a function called by code, not a module."
    name = norm.module
    if len(graph.runs_of(name)) != 1 or sum(c.module == name and family(c) in BATCH_NORMS for c in graph.calls) != 1:
        return "The norm is called more than once."
    mean = norm.args["running_mean"]
    if mean is not None and (
        not mean.names or any(m.rpartition(".")[0] not in slots_of(model, module) for m in mean.names)
    ):
        return "The norm's running mean is shared or computed."
    if mean is not None and not isinstance(module.running_mean, torch.Tensor):
        return "The norm's running mean is not a buffer of its own."
    return None


def _fix(model: Module, layer: Call, norm: Call) -> Fix:
    name, norm_name = layer_name(layer), norm.module

    slots = slots_of(model, model.get_submodule(name))

    def apply(copy: Module) -> KeyChanges:
        module, target = _get(copy, name), _get(copy, norm_name)
        bias = module._parameters.get("bias") if module is not None else None
        if module is None or bias is None or not isinstance(target, _BatchNorm):
            raise StateError(
                f"{name}: expected a layer with a bias before {norm_name}, as there was when the model was read. "
                "Call check on the model as it is now."
            )
        if target.running_mean is not None:
            with torch.no_grad():
                target.running_mean.sub_(bias.to(target.running_mean))
        module._parameters["bias"] = None
        return KeyChanges({}, [f"{slot}.bias" for slot in slots])

    def proof(before: Module, after: Module) -> Any:
        return BiasProof(before, after, name, norm_name)

    return Fix("drop the bias; the running mean takes it over", True, apply, proof)


def _get(model: Module, name: str) -> Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
