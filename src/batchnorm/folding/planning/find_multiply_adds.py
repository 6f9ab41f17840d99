"""Norms that no layer can absorb: each becomes one multiply-add per channel, with the activation behind it.

A norm in evaluation mode reads its input once and writes it once, and so does s·x + t: what can be saved is the pass of
the activation behind it. Hence a norm is never split into a part that travels and a part that stays: the part would
cost as much as the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch.nn import Identity, Module

from batchnorm.dataflow.graph import Call, Graph, ModuleCall
from batchnorm.dataflow.norms import NormUse, require_no_alternative
from batchnorm.dataflow.operator_kinds import fusible_activation
from batchnorm.dataflow.refusal import Refusal
from batchnorm.folding.planning.merged_parameters import Parameters
from batchnorm.folding.planning.multiply_add import MultiplyAdd, _rounded
from batchnorm.folding.planning.removable_norm import check_norm
from batchnorm.folding.planning.splits import norm_map
from batchnorm.models.hooks import hooks_of
from batchnorm.models.parameters import find_tensor

__all__ = ["failing", "find_multiply_adds"]

Item = TypeVar("Item")


def find_multiply_adds(
    model: Module, graph: Graph, parameters: Parameters, uses: Iterable[NormUse], unreached: Sequence[str]
) -> list[MultiplyAdd]:
    """Return those norms as multiply-adds that can become one.

    Args:
        model: the model; it is not changed.
        graph: its dataflow.
        parameters: what its parameters become.
        uses: the norms.
        unreached: names of the norms that do not run.
    """
    found = []
    for use in uses:
        try:
            require_no_alternative(model, use.owner, unreached)
            found.append(_multiply_add(model, graph, parameters, use))
        except Refusal:  # it stays the norm that it is, and the reason why it was not folded is the same
            continue
    return _with_activations_of_their_own(graph, found)


def _multiply_add(model: Module, graph: Graph, parameters: Parameters, use: NormUse) -> MultiplyAdd:
    state, replacement = check_norm(graph, use)
    map_ = norm_map(parameters, state)
    like = find_tensor(model, state.running_mean)
    assert like is not None
    if not all(bool(torch.isfinite(_rounded(v, like)).all()) for v in (map_.scale, map_.shift)):
        raise Refusal("Its scale or shift is not finite.")
    name = use.calls[0].module
    norm = model.get_submodule(name)
    parts = [p for p in replacement.parts if not (isinstance(p, str) and type(norm.get_submodule(p)) is Identity)]
    if len(parts) > 1:
        raise Refusal("Its module does more than normalize and activate.")
    moved = None if parts else _module_behind(graph, use)
    activation = parts[0] if parts else moved
    function = None if activation is None else _function_behind(graph, use)
    return MultiplyAdd(use, name, state, map_.scale.reshape(-1), map_.shift.reshape(-1), activation, function, moved)


def _function_behind(graph: Graph, use: NormUse) -> str | None:
    """Return the one function, of those that kernels know, that is all that reads the norm's output."""
    readers = [graph.only_reader(call.output) for call in use.calls]
    functions = {None if reader is None else fusible_activation(reader) for reader in readers}
    return functions.pop() if len(functions) == 1 else None


def _module_behind(graph: Graph, use: NormUse) -> str | None:
    """Return the module that computes that function, right after the norm, in all its runs."""
    if _function_behind(graph, use) is None:
        return None
    names: set[str | None] = set()
    for call in use.calls:
        reader = graph.only_reader(call.output)
        run = None if reader is None or reader.index != call.index + 1 else _run_of(graph, reader)
        names.add(None if run is None else run.name)
    return names.pop() if len(names) == 1 else None


def _run_of(graph: Graph, reader: Call) -> ModuleCall | None:
    """Return the run of one of torch's activations that consists of this operator and of nothing else."""
    for run in graph.module_calls:
        own = run.calls == [reader] and run.plain and run.outputs == (reader.output,)
        if own and type(run.module).__module__ == "torch.nn.modules.activation" and not hooks_of(run.module):
            return run
    return None


def _with_activations_of_their_own(graph: Graph, found: Sequence[MultiplyAdd]) -> list[MultiplyAdd]:
    """Return the same, without activations that also run elsewhere: those go on running where they stand."""
    fused = [call for item in found if item.moved is not None for call in item.use.calls]
    ends = {graph.only_reader(call.output) for call in fused}

    def elsewhere(name: str) -> bool:
        module = graph.runs_of(name)[0].module
        return any(c not in ends for run in graph.module_calls if run.module is module for c in run.calls)

    return [
        item
        if item.moved is None or not elsewhere(item.moved)
        else replace(item, activation=None, function=None, moved=None)
        for item in found
    ]


def failing(items: Sequence[Item], fails: Callable[[Sequence[Item]], bool]) -> list[Item]:
    """Return those with which something fails, found by halves; all of them if none of the halves alone fails."""
    if len(items) == 1:
        return list(items)
    middle = len(items) // 2
    found = [item for half in (items[:middle], items[middle:]) if fails(half) for item in failing(half, fails)]
    return found or list(items)
