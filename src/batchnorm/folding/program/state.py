"""Where a program keeps its state: as attributes that its graph reads, or as inputs that its signature names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node
from torch.nn import Module, Parameter

from batchnorm.folding.program.constants import attribute
from batchnorm.models.copying import copied
from batchnorm.observers import detect_fake_mode

__all__ = ["Attributes", "Signature", "State", "memory_of", "put"]


class State(ABC):
    """The state of a program that is being rewritten.

    Attributes:
        graph: the program's graph.
    """

    graph: Graph

    @abstractmethod
    def nodes(self) -> Mapping[Node, str]:
        """Return the nodes that hold state, and what it is called."""

    @abstractmethod
    def value(self, name: str) -> Any:
        """Return what is called so."""

    @abstractmethod
    def taken(self) -> Collection[str]:
        """Return every name that is in use."""

    @abstractmethod
    def add(self, name: str, value: Tensor) -> Node:
        """Add a parameter, or a buffer if it is no parameter, and return the node that holds it."""

    @abstractmethod
    def discard(self, nodes: Collection[Node]) -> None:
        """Remove states that nothing reads."""

    @abstractmethod
    def replaced(self, old: Node, new: Node) -> None:
        """Note that one node stands for another now."""


class Attributes(State):
    """The state of a ``torch.fx.GraphModule``: its parameters and buffers."""

    def __init__(self, program: GraphModule) -> None:
        self.graph = program.graph
        self._program = program

    def nodes(self) -> Mapping[Node, str]:
        """Return the nodes that hold state, and what it is called."""
        return {node: str(node.target) for node in self.graph.nodes if node.op == "get_attr"}

    def value(self, name: str) -> Any:
        """Return what is called so."""
        return attribute(self._program, name)

    def taken(self) -> Collection[str]:
        """Return every name that is in use."""
        names = [name for name, _ in self._program.named_parameters(remove_duplicate=False)]
        names += [name for name, _ in self._program.named_buffers(remove_duplicate=False)]
        return [*names, *(name for name, _ in self._program.named_modules(remove_duplicate=False) if name)]

    def add(self, name: str, value: Tensor) -> Node:
        """Add a parameter, or a buffer if it is no parameter, and return the node that holds it."""
        put(self._program, name, value)
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.inserting_before(first):
            return self.graph.create_node("get_attr", name, name=name.replace(".", "_"))

    def discard(self, nodes: Collection[Node]) -> None:
        """Remove states that nothing reads."""
        targets = {str(node.target) for node in nodes}
        for node in nodes:
            self.graph.erase_node(node)
        for target in targets - set(self.nodes().values()):
            self._delete(target)

    def replaced(self, old: Node, new: Node) -> None:
        """Note that one node stands for another now: nothing but the graph names nodes."""

    def _delete(self, target: str) -> None:
        """Delete a state, and the modules that held nothing else."""
        holder, _, leaf = target.rpartition(".")
        delattr(self._program.get_submodule(holder), leaf)
        while holder and type(module := self._program.get_submodule(holder)) is Module:
            if module._parameters or module._buffers or module._modules:
                return
            holder, _, leaf = holder.rpartition(".")
            delattr(self._program.get_submodule(holder), leaf)


def put(root: Module, name: str, value: Any) -> None:
    """Put a module, parameter, buffer or any other thing at a qualified name, in modules that are made for it."""
    *parents, leaf = name.split(".")
    module = root
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, Module())
        module = module.get_submodule(parent)
    if isinstance(value, Tensor) and not isinstance(value, Parameter):
        module.register_buffer(leaf, value)
    else:
        setattr(module, leaf, value)


def memory_of(value: Any) -> object:
    """Return what two tensors have in common that are one."""
    if not isinstance(value, Tensor) or not value.numel():
        return id(value)
    return value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype


_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class Signature(State):
    """The state of a ``torch.export.ExportedProgram``: inputs of its graph that the signature gives a name.

    Attributes:
        module: the graph as it becomes.
        signature: the signature as it becomes.
        values: parameters and persistent buffers by their names.
        constants: the others.
        module_calls: what the program says of the modules that it was made of.
    """

    def __init__(self, program: ExportedProgram, module: GraphModule) -> None:
        self.module = module
        self.graph = module.graph
        self.signature = copied(program.graph_signature)
        self.values = dict(program.state_dict)
        self.constants = dict(program.constants)
        self.module_calls = copied(program.module_call_graph)
        self._modules = _modules_of(program.graph)

    def nodes(self) -> Mapping[Node, str]:
        """Return the nodes that hold state, and what it is called."""
        pairs = zip(self._placeholders(), self.signature.input_specs, strict=True)
        return {node: spec.target for node, spec in pairs if spec.kind in _KINDS and spec.target is not None}

    def value(self, name: str) -> Any:
        """Return what is called so."""
        return self.values[name] if name in self.values else self.constants.get(name)

    def taken(self) -> Collection[str]:
        """Return every name that is in use."""
        return [*self.values, *self.constants]

    def add(self, name: str, value: Tensor) -> Node:
        """Add a parameter, or a buffer if it is no parameter, and return the node that holds it."""
        specs = self.signature.input_specs
        is_parameter = isinstance(value, Parameter)
        kinds = {InputKind.TOKEN, InputKind.PARAMETER} | (set() if is_parameter else {InputKind.BUFFER})
        place = next((i for i, spec in enumerate(specs) if spec.kind not in kinds), len(specs))
        nodes = self._placeholders()
        before = nodes[place] if place < len(nodes) else next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(before):
            node = self.graph.placeholder(f"{'p' if is_parameter else 'b'}_{name.replace('.', '_')}")
        node.target = node.name
        mode = detect_fake_mode([n.meta.get("val") for n in self.graph.nodes])
        if mode is not None:
            node.meta["val"] = mode.from_tensor(value, static_shapes=True)
        kind = InputKind.PARAMETER if is_parameter else InputKind.BUFFER
        persistent = None if is_parameter else True
        specs.insert(place, InputSpec(kind, TensorArgument(node.name), name, persistent))
        self.values[name] = value
        return node

    def discard(self, nodes: Collection[Node]) -> None:
        """Remove states that nothing reads."""
        names = {node.name for node in nodes}
        gone = {spec.target for spec in self.signature.input_specs if spec.arg.name in names}
        for node in nodes:
            self.graph.erase_node(node)
        self.signature.input_specs[:] = [spec for spec in self.signature.input_specs if spec.arg.name not in names]
        for target in gone - set(self.nodes().values()):
            self.values.pop(str(target), None)
            self.constants.pop(str(target), None)

    def replaced(self, old: Node, new: Node) -> None:
        """Note that one node stands for another now."""
        self.signature.replace_all_uses(old.name, new.name)
        for entry in self.module_calls:
            if entry.signature is not None:
                entry.signature.replace_all_uses_with(old, new)

    def forget_modules(self) -> None:
        """Keep no signature of a module of which nothing is left: it could not be built again."""
        gone = self._modules - _modules_of(self.graph)
        for entry in self.module_calls:
            if entry.fqn in gone:
                entry.signature = None

    def _placeholders(self) -> list[Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]


def _modules_of(graph: Graph) -> set[str]:
    """Return the names of the modules that an exported program's nodes come from."""
    stacks = [node.meta.get("nn_module_stack") or {} for node in graph.nodes]
    return {path for stack in stacks for path, _ in stack.values()}
