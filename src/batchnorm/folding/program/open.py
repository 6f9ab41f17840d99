"""A program as a model: every layer a module of its own, so that it can be folded as every other model is."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.nn import Module

from batchnorm.dataflow.trace import trace
from batchnorm.folding.program.constants import Constants, attribute
from batchnorm.folding.program.layers import LayerNode, find_layer_nodes
from batchnorm.folding.program.numbers import numbers_as_tensors
from batchnorm.folding.program.state import put
from batchnorm.models.copying import copy_model

__all__ = ["Names", "Opened", "copy_program", "erase_unread", "open_program", "overlap"]


@dataclass(frozen=True, eq=False)
class Opened:
    """A program with modules in place of its layers.

    Attributes:
        model: the modules.
        sites: the functions that became modules, by the names of those.
        modules: the program's own modules: the name of the node that calls it, by the name that it has here, where each
            node has one of its own.
    """

    model: GraphModule
    sites: Mapping[str, LayerNode]
    modules: Mapping[str, str]


def open_program(program: GraphModule, example_inputs: Any) -> Opened:
    """Return the model that computes what a program does. The program is as it was.

    Args:
        program: any ``torch.fx.GraphModule`` that runs.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        InputError: the program fails on the inputs.
        StateError: it cannot be copied.
    """
    work = copy_program(program)
    sites = find_layer_nodes(work.graph, Constants(work, _written_states(program, example_inputs)))
    calls = _call_modules(work.graph, sites)
    # what checks shapes and types would not let it run in float64
    erase_unread(work.graph, [node for node in work.graph.nodes if _is_check(work, node)])
    erase_unread(work.graph, [node for node in work.graph.nodes if node.op == "get_attr"])
    numbers_as_tensors(work.graph)
    root = Module()
    rest = [n for n in work.graph.nodes if n.op in ("get_attr", "call_module") and n not in calls.values()]
    for node in rest:
        put(root, str(node.target), attribute(work, node.target))
    names = Names(str(node.target) for node in rest)
    for site, node in calls.items():
        node.target = names.of_site(site)
        put(root, node.target, site.layer)
    own = _one_for_each_call(root, [node for node in rest if node.op == "call_module"], names)
    root.training = program.training  # of the program alone: what its layers do is fixed
    model = GraphModule(root, work.graph)
    return Opened(model, {str(node.target): site for site, node in calls.items()}, own)


def copy_program(program: GraphModule) -> GraphModule:
    """Return a copy of a program, whose nodes have the same names.

    Raises:
        StateError: it cannot be copied.
    """
    copied = copy_model("fold", program, "Fold the model that it was made from.")
    assert isinstance(copied, GraphModule)
    for new, old in zip(copied.graph.nodes, program.graph.nodes, strict=True):
        new.name = old.name  # copying a graph renames what is called as a function of Python's, such as input
    return copied


def erase_unread(graph: Graph, nodes: Iterable[Node]) -> None:
    """Take nodes that nothing reads out of a graph, and then nodes that only those read, but for inputs and state."""
    waiting = list(nodes)
    erased: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node in erased or node.users:
            continue
        waiting += [read for read in node.all_input_nodes if read.op not in ("placeholder", "get_attr")]
        graph.erase_node(node)
        erased.add(node)


def _written_states(program: GraphModule, example_inputs: Any) -> set[str]:
    graph = trace(program, example_inputs)
    values = {value for call in graph.calls for value in call.tensor_args() if call.writes_into(value)}
    return {name for value in values for name in value.names}


def _call_modules(graph: Graph, sites: Iterable[LayerNode]) -> dict[LayerNode, Node]:
    """Let a module be called in place of each function; which one is not known yet."""
    calls: dict[LayerNode, Node] = {}
    now: dict[Node, Node] = {}
    for site in sites:
        with graph.inserting_before(site.node):
            node = graph.create_node("call_module", "", (now.get(site.read, site.read),), name=site.operator.name)
        site.result.replace_all_uses_with(node)
        calls[site] = now[site.result] = node
        erase_unread(graph, [*site.node.users, site.node])
    return calls


def _is_check(program: GraphModule, node: Node) -> bool:
    if node.users or node.op not in ("call_function", "call_module"):
        return False
    if node.op == "call_module":
        return type(attribute(program, node.target)).__name__ == "GuardsFn"
    return getattr(node.target, "__name__", "").partition(".")[0] in _CHECKS


_CHECKS = {"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "sym_constrain_range"}


def _one_for_each_call(root: Module, nodes: Iterable[Node], names: Names) -> dict[str, str]:
    """Give every node a module of its own; return the nodes' names by those of the modules."""
    called: dict[str, str] = {}
    for node in nodes:
        target = str(node.target)
        if target in called:
            node.target = names.free(target)
            put(root, node.target, copy.deepcopy(attribute(root, target)))
        called[str(node.target)] = node.name
    return called


class Names:
    """Names for modules that the program does not have, beside those that it has."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)

    def of_site(self, site: LayerNode) -> str:
        """Return the name of the module that holds a layer's state, if it holds nothing else; or the node's."""
        for key in ("running_mean", "weight", "bias"):
            state = site.args.get(key)
            holder = str(state.target).rpartition(".")[0] if isinstance(state, Node) and state.op == "get_attr" else ""
            if holder and self._is_free(holder):
                self._taken.add(holder)
                return holder
        return self.free(site.node.name)

    def free(self, name: str) -> str:
        """Return a name that nothing has: this one, or with a number; not within a module that is called as a whole."""
        if any(name.startswith(f"{t}.") for t in self._taken):
            name = name.replace(".", "_")
        candidate, number = name, 0
        while not self._is_free(candidate):
            number += 1
            candidate = f"{name}_{number}"
        self._taken.add(candidate)
        return candidate

    def _is_free(self, name: str) -> bool:
        return not any(overlap(name, taken) for taken in self._taken)


def overlap(name: str, other: str) -> bool:
    """Whether two qualified names are one, or one is that of a part of the other."""
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")
