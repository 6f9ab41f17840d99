"""A folded program: what folding made of its layers, written back into its graph."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import Identity, Module

from batchnorm.folding.program.layers import LayerNode
from batchnorm.folding.program.open import Names, Opened, erase_unread, overlap
from batchnorm.folding.program.state import State, memory_of, put
from batchnorm.folding.writing.record import digest

__all__ = ["close_functions", "close_modules"]


@dataclass(frozen=True, eq=False)
class _Change:
    """A function that gets other parameters.

    Attributes:
        name: what it is called as a module.
        site: what it was.
        layer: what it is.
        node: stands for it until it is written.
    """

    name: str
    site: LayerNode
    layer: Module
    node: Node


def close_functions(state: State, opened: Opened, folded: Module, is_changed: Callable[[str], bool]) -> None:
    """Write what folding made of functions into a program's graph.

    Args:
        state: of the program: of a copy of the one that was opened.
        opened: the program as modules.
        folded: these, folded.
        is_changed: whether the module of that name is not what it was.
    """
    nodes = {node.name: node for node in state.graph.nodes}
    read_before = {node for node in state.nodes() if node.users}
    now: dict[str, Node] = {}
    changes: list[_Change] = []
    freed: set[str] = set()
    for name, site in opened.sites.items():
        if not is_changed(name):
            continue
        layer, old = folded.get_submodule(name), nodes[site.result.name]
        read = now.get(site.read.name, nodes[site.read.name])
        if isinstance(layer, Identity):
            new = read
            freed |= {_state_name(site, key).rpartition(".")[0] for key in ("running_mean", "weight")} - {""}
        else:
            new = _stand_in(state, old, read, site.operator.name)
            changes.append(_Change(name, site, layer, new))
        old.replace_all_uses_with(new)
        state.replaced(old, new)
        now[old.name] = new
        erase_unread(state.graph, [old, *nodes[site.node.name].users, nodes[site.node.name]])
    _discard_unread(state, read_before, freed)
    names = _NewStates(state)
    for change in changes:
        hold = partial(names.of, change)
        change.node.target, change.node.args = change.site.operator.written(change.layer, change.node, hold)


def _stand_in(state: State, old: Node, read: Node, name: str) -> Node:
    """Return a node that will be a layer, when the names of old states are free."""
    with state.graph.inserting_before(old):
        node = state.graph.create_node("call_function", torch.ops.aten.alias.default, (read,), name=name)
    node.meta = dict(old.meta)
    return node


def _state_name(site: LayerNode, key: str) -> str:
    """Return the name of the state that an argument is, an empty one where it is computed."""
    node = site.args.get(key)
    return str(node.target) if isinstance(node, Node) and node.op == "get_attr" else ""


def _discard_unread(state: State, read_before: set[Node], freed: set[str]) -> None:
    """Take away what only the replaced functions read, and what norms that are gone kept beside it: their counters."""
    unread = {node: name for node, name in state.nodes().items() if not node.users}
    gone = {n for n, name in unread.items() if n in read_before or name.rpartition(".")[0] in freed}
    # a tensor that modules share has several names, of which the graph may read one
    memory = {memory_of(state.value(unread[node])) for node in gone}
    state.discard([node for node, name in unread.items() if memory_of(state.value(name)) in memory])


class _NewStates:
    """New parameters of a program: under the old names where these are free, one for all that are the same."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._known: dict[tuple[str, str], Node] = {}

    def of(self, change: _Change, key: str, value: Tensor) -> Node:
        """Return the node that holds a layer's parameter or buffer."""
        origin = _state_name(change.site, key) or _state_name(change.site, "weight")
        same = (origin or change.name, f"{key} {digest(value)}")
        if same not in self._known:
            self._known[same] = self._state.add(
                self._free(_state_name(change.site, key), f"{change.name}.{key}"), value
            )
        return self._known[same]

    def _free(self, old: str, own: str) -> str:
        """Return the old name, if it had one and nothing else needs it; else its own, with a number where taken."""
        taken = set(self._state.taken())
        if old and old not in taken:
            return old
        candidate, number = own, 0
        while candidate in taken:
            number += 1
            candidate = f"{own}_{number}"
        return candidate


def close_modules(
    program: GraphModule,
    opened: Opened,
    folded: Module,
    is_changed: Callable[[str], bool],
    is_gone: Callable[[str], bool],
) -> None:
    """Write what folding made of a program's own modules into it: norms that are gone are called no more.

    Args:
        program: a copy of the one that was opened.
        opened: the program as modules.
        folded: these, folded.
        is_changed: whether the module of that name, or a part of it, is not what it was.
        is_gone: whether it was a norm that folding took away.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    before = {str(node.target) for node in nodes.values() if node.op == "call_module"}
    changed = {name: nodes[node_name] for name, node_name in opened.modules.items() if is_changed(name)}
    # a module that another node calls, or reads a part of, as it was stays what it is
    names = Names(_targets(program, set(nodes.values()) - set(changed.values())))
    for name, node in changed.items():
        layer: Any = folded.get_submodule(name)
        if is_gone(name) and isinstance(layer, Identity) and len(node.all_input_nodes) == 1:
            node.replace_all_uses_with(node.all_input_nodes[0])
            program.graph.erase_node(node)
        else:
            node.target = names.free(name)
            put(program, node.target, layer)
    after = _targets(program, set(program.graph.nodes))
    for target in before:
        if not any(overlap(target, other) for other in after):
            program.delete_submodule(target)


def _targets(program: GraphModule, nodes: Collection[Node]) -> list[str]:
    """Return the modules and attributes that some of a program's nodes call or read."""
    attributes = ("call_module", "get_attr")
    return [str(node.target) for node in program.graph.nodes if node in nodes and node.op in attributes]
