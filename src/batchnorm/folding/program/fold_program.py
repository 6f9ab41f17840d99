"""Norms of a program, absorbed: it is opened into modules, these are folded, and the outcome is written back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeAlias

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.nn import Module

from batchnorm.dataflow.run import run
from batchnorm.errors import InputError, StateError, VerificationError
from batchnorm.folding.fold_model import Folded
from batchnorm.folding.program.open import Opened, copy_program, open_program
from batchnorm.folding.program.state import Attributes, Signature
from batchnorm.folding.program.write_back import close_functions, close_modules
from batchnorm.folding.result import FoldResult
from batchnorm.folding.writing.record import FoldRecord
from batchnorm.models.outputs import difference
from batchnorm.models.program_inputs import own_inputs

__all__ = ["Program", "fold_program"]

Program: TypeAlias = GraphModule | ExportedProgram


def fold_program(program: Program, example_inputs: Any, inplace: bool, fold_model: Callable[..., Folded]) -> FoldResult:
    """Fold a program.

    Args:
        program: the program; it stays as it is, but for ``inplace``.
        example_inputs: as for a module; None takes those that an exported program holds.
        inplace: whether a ``torch.fx.GraphModule`` is to become the folded one.
        fold_model: folds an ordinary model: given that, the inputs, and what says which others it is meant for.

    Raises:
        InputError: there are no inputs, or the program fails on them.
        StateError: it cannot be copied, or an exported program is to be changed in place.
        VerificationError: the outputs differ by more than rounding explains.
    """
    inputs = example_inputs if example_inputs is not None else own_inputs(program)
    if inplace and isinstance(program, ExportedProgram):
        raise StateError("fold: an exported program cannot be changed in place. Take result.model, the folded one.")
    module = _module_of(program) if isinstance(program, ExportedProgram) else program
    opened = open_program(module, inputs)
    folded, pairs, outcome = fold_model(
        opened.model, inputs, accepts=_guard(module) if isinstance(program, ExportedProgram) else None
    )
    if pairs is None:
        return FoldResult.of(outcome, model=program, pairs=None)
    closed = _closed(program, opened, folded, pairs)
    error = _difference(folded, closed, inputs)
    if not error <= outcome.bound:
        raise VerificationError(
            f"fold: written back into the program, what was folded differs by {error:.3g}; rounding explains at most "
            f"{outcome.bound:.3g}. The folded program is not returned, and the original is unchanged."
        )
    if isinstance(program, GraphModule):
        closed = _moved(closed, program if inplace else _twin(program))
    return FoldResult.of(outcome, model=closed, pairs=None, original=program, error=outcome.error + error)


def _guard(module: GraphModule) -> Callable[[Any], bool]:
    """Return whether an exported program takes inputs, as a function: the module that it is opened to checks none."""

    def accepts(inputs: Any) -> bool:
        try:
            run(module, inputs)
        except InputError:
            return False
        return True

    return accepts


def _module_of(program: ExportedProgram) -> GraphModule:
    """Return the program as a module, whose nodes have the names that they have in the program."""
    module = program.module()
    states = set(Signature(program, program.graph_module).nodes())
    one = [node for node in program.graph.nodes if node.op in ("placeholder", "call_function") and node not in states]
    two = [node for node in module.graph.nodes if node.op in ("placeholder", "call_function")]
    # what the program writes into its buffers comes last, as calls that only the module has
    for old, new in zip(one, two, strict=False):
        if old.op != new.op or (old.op == "call_function" and old.target != new.target):
            raise StateError(f"fold: the program's {old.name} is not what its module runs ({new.name}).")
        new.name = old.name
    return module


def _closed(program: Program, opened: Opened, folded: Module, pairs: FoldRecord) -> Program:
    changed = {name.rpartition(".")[0] for name in pairs.digests} | set(pairs.norms) | set(pairs.bordered)

    def is_changed(name: str) -> bool:
        return any(f"{other}.".startswith(f"{name}.") for other in changed)

    if isinstance(program, ExportedProgram):
        graph = copy_program(program.graph_module)
        state = Signature(program, graph)
        close_functions(state, opened, folded, is_changed)
        state.forget_modules()
        return ExportedProgram(
            root=graph,
            graph=graph.graph,
            graph_signature=state.signature,
            state_dict=state.values,
            range_constraints=dict(program.range_constraints),
            module_call_graph=state.module_calls,
            example_inputs=program.example_inputs,
            constants=state.constants,
            verifiers=program.verifiers,
        )
    module = copy_program(program)
    close_functions(Attributes(module), opened, folded, is_changed)
    close_modules(module, opened, folded, is_changed, pairs.norms.__contains__)
    module.graph.lint()
    module.recompile()
    return module


def _difference(folded: Module, closed: Program, inputs: Any) -> float:
    """Return how far the program is from the modules that were folded."""
    module = closed.module() if isinstance(closed, ExportedProgram) else closed
    with torch.inference_mode(False):
        before, after = run(folded, inputs), run(module, inputs)
    return max((difference(a.tensor, b.tensor).largest for a, b in zip(before, after, strict=True)), default=0.0)


def _twin(program: GraphModule) -> GraphModule:
    """Return a program of the same class, with the same hooks and attributes: torch's own copy has none of them."""
    twin = GraphModule.__new__(type(program))
    type(twin).__name__ = type(program).__name__
    for key, value in vars(program).items():
        if isinstance(value, MethodType) and value.__self__ is program:
            twin.__dict__[key] = MethodType(value.__func__, twin)
        else:
            twin.__dict__[key] = copy.copy(value) if isinstance(value, dict | list | set) else value
    return twin


def _moved(closed: Program, target: GraphModule) -> GraphModule:
    """Let a program become another one."""
    assert isinstance(closed, GraphModule)
    target._parameters, target._buffers, target._modules = closed._parameters, closed._buffers, closed._modules
    target.graph = closed.graph
    return target
