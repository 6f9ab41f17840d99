"""Which norms are followed by an activation, directly or after an addition, and by nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.nn import Identity, Module
from torch.utils._pytree import tree_leaves

from batchnorm.dataflow.graph import Call, Graph, ModuleCall, Value
from batchnorm.dataflow.norms import is_norm
from batchnorm.dataflow.operator_kinds import family, fusible_activation
from batchnorm.dataflow.refusal import Refusal
from batchnorm.fusion.result import FusedNorm
from batchnorm.nn.frozen import THAWED, state_of
from batchnorm.nn.select import NormModule, named_norms
from batchnorm.nn.swap import TORCHS, class_name

__all__ = ["find_fusions"]


@dataclass(frozen=True, eq=False)
class _Chain:
    """One run of a norm, and what follows it: an addition or None, and an activation."""

    norm: Call
    add: Call | None
    last: Call
    activation: str


def find_fusions(model: Module, graph: Graph) -> tuple[dict[str, FusedNorm], dict[str, str]]:
    """Return the norms that can be fused with what follows them, and why each of the others cannot.

    A norm can be if, in each of its runs, its output is read by nobody but an activation, or by nobody but an addition
    whose sum is read by nobody but an activation. Of two norms that meet in one addition, only one can be: the one
    whose output is written into, if the addition is in place; else the later one, which waits for less.
    """
    chains: dict[str, list[_Chain]] = {}
    refused: dict[str, str] = {}
    compiled = _compiled_modules(model)
    for name, norm in named_norms(model).items():
        try:
            chains[name] = _chains_of(graph, norm)
            _require_one_side(chains[name], compiled)
        except Refusal as refusal:
            refused[name] = str(refusal)
            chains.pop(name, None)
    for name, other in _second_at_an_addition(chains).items():
        refused[name] = f"Its output is added to that of {other}, with which the sum is fused."
        del chains[name]
    found = {
        name: FusedNorm(name, runs[0].activation, runs[0].add is not None, runs[0].last.module)
        for name, runs in chains.items()
    }
    return found, refused


def _chains_of(graph: Graph, norm: NormModule) -> list[_Chain]:
    _require_layer(norm)
    runs = [run for run in graph.module_calls if run.module is norm]
    if not runs:
        raise Refusal("The example inputs do not reach it.")
    chains = [_follow(graph, _norm_call(run)) for run in runs]
    if len({(chain.activation, chain.add is None) for chain in chains}) > 1:
        raise Refusal("It runs several times, and not the same follows each time.")
    for chain in chains:
        if any(chain.norm.index < other.norm.index < chain.last.index for other in chains):
            raise Refusal("It runs again before what follows its first run.")
    return chains


def _require_layer(norm: NormModule) -> None:
    if state_of(norm) != THAWED:
        raise Refusal("It is frozen: unfreeze it first.")
    if type(norm) not in TORCHS:
        raise Refusal(f"It is {class_name(type(norm))}, no layer of this library.")
    if "forward" in norm.__dict__:
        raise Refusal("Its forward was replaced on the instance.")
    activation = norm.activation
    if activation is not None:
        raise Refusal(f"It applies {activation} itself.")
    if norm.inplace:
        raise Refusal("It writes over its input (inplace=True), which a fused layer reads later.")


def _norm_call(run: ModuleCall) -> Call:
    calls = [call for call in run.calls if is_norm(call)]
    inside = any(not isinstance(part, Identity) for part in run.module.children())  # timm's: the activation
    if len(calls) != 1 or not run.plain or (run.outputs != (calls[0].output,) and not inside):
        raise Refusal("It is called with more than its input.")
    return calls[0]


def _follow(graph: Graph, norm: Call) -> _Chain:
    reader = _only_reader(graph, norm.output, "Its output")
    add = reader if family(reader) == "add" else None
    if add is not None:
        _require_sum(add, norm.output)
        reader = _only_reader(graph, add.output, "Its sum with another tensor")
    activation = fusible_activation(reader)
    if activation is None:
        subject = "Its output" if add is None else "Its sum with another tensor"
        raise Refusal(f"{subject} is read by {_place(reader)}, which is no activation that can be fused.")
    _require_unwritten(graph, norm, add, reader)
    return _Chain(norm, add, reader, activation)


def _only_reader(graph: Graph, value: Value, subject: str) -> Call:
    reader = graph.only_reader(value)
    if reader is not None:
        return reader
    readers = [_place(call) for call in graph.readers(value)] + list(value.held_by)
    if graph.is_output(value):
        readers.append("the caller of the model (it is an output)")
    if not readers:
        raise Refusal(f"{subject} is read by nobody.")
    raise Refusal(f"{subject} is read by {' and by '.join(readers)}.")


def _require_sum(add: Call, output: Value) -> None:
    one, two, alpha = add.args["self"], add.args["other"], add.args.get("alpha", 1)
    other = two if one is output else one
    if not isinstance(other, Value) or other is output or alpha != 1 or len(add.outputs) != 1:
        raise Refusal(f"Its output is read by {_place(add)}, which adds no other tensor to it.")
    if (other.shape, other.dtype) != (output.shape, output.dtype):
        raise Refusal(f"Its output and what {_place(add)} adds to it differ in shape or dtype.")
    if add.name == "add_" and one is not output:
        raise Refusal(f"Its output is added in place to another tensor, by {_place(add)}.")


def _require_unwritten(graph: Graph, norm: Call, add: Call | None, last: Call) -> None:
    """Refuse where what the fused call reads has changed by the time that it runs, or by that of its gradient.

    The gradient needs the input and, with an activation behind it, the residual. It is computed after the whole pass;
    that the input is not written into by then is torch's own rule, for the residual it is the fused call's.
    """
    residual = [] if add is None else [value for value in add.tensor_args() if value is not norm.output]
    for call in graph.calls[norm.index + 1 :]:
        for value in _written(call):
            if value is norm.args["input"] and call.index < last.index:
                raise Refusal(f"Its input is written into by {_place(call)} before what follows it.")
            if add is not None and call.index > add.index and value in residual:
                raise Refusal(f"The tensor added to it is written into by {_place(call)}, and its gradient needs it.")


def _compiled_modules(model: Module) -> list[str]:
    """Return the names of the modules that are compiled, by ``torch.compile(module)`` or ``module.compile()``."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
    ]


def _require_one_side(chains: list[_Chain], compiled: list[str]) -> None:
    """Refuse what begins outside a compiled module and ends inside: a compiler takes no tensor that waits."""

    def around(call: Call) -> set[str]:
        return {name for name in compiled if not name or f"{call.module}.".startswith(f"{name}.")}

    for chain in chains:
        for call in (chain.add, chain.last):
            entered = set() if call is None else around(call) - around(chain.norm)
            if call is not None and entered:
                raise Refusal(f"Its output is read by {_place(call)}, in compiled code, which fuses by itself.")


def _written(call: Call) -> Iterator[Value]:
    for argument in call.op._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from (leaf for leaf in tree_leaves(call.args[argument.name]) if isinstance(leaf, Value))


def _second_at_an_addition(chains: dict[str, list[_Chain]]) -> dict[str, str]:
    """Return the norms that meet another one in an addition and come second, with that other."""
    at: dict[Call, list[tuple[int, str]]] = {}
    for name, runs in chains.items():
        for chain in runs:
            if chain.add is not None:
                at.setdefault(chain.add, []).append((chain.norm.index, name))
    second: dict[str, str] = {}
    for meeting in at.values():
        *others, (_, first) = sorted(meeting)
        second |= {name: first for _, name in others}
    return second


def _place(call: Call) -> str:
    return f"{call.name} in {call.module or 'the model'}"
