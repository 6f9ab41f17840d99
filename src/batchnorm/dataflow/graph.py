"""The dataflow of one forward pass, as data: which operator read what, and what else holds its result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn import Module
from torch.utils._pytree import tree_leaves

__all__ = ["Call", "Graph", "ModuleCall", "Value"]


@dataclass(eq=False)
class Value:
    """A tensor between two operators. An in-place operator gives a new value, though the tensor stays the same object.

    Attributes:
        shape: sizes of the tensor.
        dtype: its element type.
        kind: ``"input"`` of the model, its ``"state"`` (a parameter or buffer), ``"computed"`` by a call, or a
            ``"constant"`` that came from anywhere else.
        producer: the call that computed it, if one did.
        names: every qualified name of a state tensor; several when it is shared.
        held_by: what reads it without an operator that the pass could see, as a phrase: ``"a hook of layer1"``.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Literal["input", "state", "computed", "constant"]
    producer: Call | None = None
    names: tuple[str, ...] = ()
    held_by: list[str] = field(default_factory=list)


_READ_A_SHAPE = {"expand_as", "reshape_as", "view_as"}


@dataclass(eq=False)
class Call:
    """One operator call.

    Attributes:
        index: its place in the order of execution.
        op: the operator overload, for example ``torch.ops.aten.conv2d.default``.
        args: every argument by its name in the operator's schema, defaults filled in; tensors as :class:`Value`.
        outputs: the values it computed, in order.
        module: qualified name of the innermost module whose forward was running; ``""`` is the model itself.
        run: in which of several runs, counted from 0.
    """

    index: int
    op: torch._ops.OpOverload[..., Any]
    args: Mapping[str, Any]
    outputs: tuple[Value, ...]
    module: str
    run: int = 0

    @property
    def name(self) -> str:
        """The operator's name without namespace and overload, for example ``"conv2d"``."""
        return str(self.op._schema.name.split("::")[1])

    @property
    def output(self) -> Value:
        """The only output of an operator that has one."""
        (value,) = self.outputs
        return value

    def holder(self, argument: str) -> str | None:
        """Return the module that holds a parameter or buffer read by the call, the running one if it does.

        None where the argument is no tensor of the model.
        """
        value = self.args.get(argument)
        if not isinstance(value, Value) or not value.names:
            return None
        owners = [name.rpartition(".")[0] for name in value.names]
        return self.module if self.module in owners else owners[0]

    def writes_into(self, value: Value) -> bool:
        """Whether the call writes into an argument that holds ``value``."""
        written = [a.name for a in self.op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return any(leaf is value for name in written for leaf in tree_leaves(self.args.get(name)))

    def tensor_args(self) -> Iterator[Value]:
        """Yield every tensor that the call reads, those inside lists too; not one of which it reads the shape only."""
        reads_a_shape = self.name in _READ_A_SHAPE
        for name, argument in self.args.items():
            if isinstance(argument, Value):
                if not (reads_a_shape and name == "other"):
                    yield argument
            elif isinstance(argument, list | tuple | dict):
                yield from (leaf for leaf in tree_leaves(argument) if isinstance(leaf, Value))


@dataclass(eq=False)
class ModuleCall:
    """One run of a module's forward: what went in, what came out, and the operators in between.

    ``calls`` are those between its begin and its end, nested modules included. ``plain`` says that it was called with
    one tensor and nothing else, and returned one tensor: ``torch.nn.Identity`` can take the place of such a run.
    ``run`` counts the model's runs, of several.
    """

    name: str
    module: Module
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...] = ()
    calls: list[Call] = field(default_factory=list)
    plain: bool = False
    run: int = 0


class Graph:
    """Every operator call of one forward pass, or of several one after the other, in order of execution."""

    def __init__(
        self,
        calls: list[Call],
        module_calls: list[ModuleCall],
        inputs: tuple[Value, ...],
        outputs: tuple[Value, ...],
    ) -> None:
        self.calls = calls
        self.module_calls = module_calls
        self.inputs = inputs
        self.outputs = outputs
        self._readers: dict[Value, list[Call]] = defaultdict(list)
        for call in calls:
            for value in dict.fromkeys(call.tensor_args()):
                self._readers[value].append(call)

    def of_run(self, run: int) -> Graph:
        """Return the dataflow of one of several runs, made of the same calls and values."""
        calls = [call for call in self.calls if call.run == run]
        own = {value for call in calls for value in (*call.tensor_args(), *call.outputs)}
        return Graph(
            calls,
            [item for item in self.module_calls if item.run == run],
            tuple(value for value in self.inputs if value in own),
            tuple(value for value in self.outputs if value in own),
        )

    def readers(self, value: Value) -> tuple[Call, ...]:
        """Return the calls that read ``value``, each once, in order."""
        return tuple(self._readers.get(value, ()))

    def is_output(self, value: Value) -> bool:
        """Whether the model returns ``value``."""
        return any(value is output for output in self.outputs)

    def only_reader(self, value: Value) -> Call | None:
        """Return the one call that reads ``value`` if nothing else does: no operator, no caller, no hook."""
        readers = self.readers(value)
        exclusive = len(readers) == 1 and not self.is_output(value) and not value.held_by
        return readers[0] if exclusive else None

    def other_readers(self, value: Value, known: Collection[Call]) -> list[str]:
        """Return what reads ``value`` besides some calls, each as a phrase for a sentence."""
        others = [f"{c.name} in {c.module or 'the model'}" for c in self.readers(value) if c not in known]
        if self.is_output(value):
            others.append("the caller of the model (it is an output)")
        return others + value.held_by

    def runs_of(self, name: str) -> list[ModuleCall]:
        """Return every run of the module of that qualified name."""
        return [run for run in self.module_calls if run.name == name]
