"""Code of a model that no run reached: ways that other inputs may take, of which the runs show nothing.

While the model runs, the instructions of its own functions that are executed are noted: of those in its classes' files,
not of torch or of this package. In the syntax tree, what has none of them was not reached, of a function that ran. Of
that only is told what depends on the inputs, where the condition that leads there reads an argument or a local
variable, and what another mode takes: training, tracing and export, gradients, another device or type. Of the second
kind only what computes something is told, of training only what reads a layer of the model. Conditions on the model's
settings, and ways that only raise, are no ways that inputs take. A local variable that is bound once, to what is read
from the model alone, is one of its settings.

A way need not have code of its own: where an ``if`` has no ``else``, the runs have to have left its condition both for
its body and past it. So the steps from one instruction to the next are noted, not the instructions alone. A loop takes
another way with another number of steps: one whose bound is an argument of the model's ``forward`` is told where that
has a default, and one value in all runs.
"""

from __future__ import annotations

import ast
import copy
import linecache
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeAlias

import torch
from torch.nn import Module

from batchnorm.models.transaction import on_failure
from batchnorm.nn.input_normalization import WithNormalizedInput

__all__ = ["Reached"]

_ROOTS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
"""Folders: torchvision's is none of torch's, though its name starts with that."""
_TRAINING = "training"
_MODES = {
    *(_TRAINING, "is_scripting", "is_tracing", "_is_tracing", "is_exporting", "is_compiling", "is_in_onnx_export"),
    *("is_torchdynamo_compiling", "is_dynamo_compiling", "is_autocast_enabled", "is_autocast_cpu_enabled"),
    *("is_grad_enabled", "is_inference_mode_enabled", "is_inference", "requires_grad"),
}
_OF_TENSORS = {"device", "dtype", "is_cuda", "is_mps", "is_xpu", "is_cpu", "is_meta", "get_device", "is_available"}
"""What is asked of a parameter or an argument: both go to another device, and to another type, with the model."""
_SAYS_ONLY = {"warnings", "warn", "print", "logging", "logger", "log", "_log_api_usage_once"}
_MOST_NAMED = 4
_Position: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
_NOWHERE: _Position = ((0, 0), (0, 0))
_START = -1
"""What comes before a frame's first instruction."""


_parsing = threading.Lock()
"""Before Python 3.13, of two threads that parse at once either may fail (cpython#106905)."""


class Reached:
    """The instructions of a model's own code that ran, in the file and function that they belong to.

    Args:
        model: the model, whose classes say which files are its own.
    """

    def __init__(self, model: Module) -> None:
        if isinstance(model, WithNormalizedInput):
            model = model.inner
        classes = {kind for module in model.modules() for kind in type(module).__mro__}
        files = {code.co_filename for kind in classes if (code := _forward_of(kind)) is not None}
        self._files = {file for file in files if not file.startswith(_ROOTS) and not file.startswith("<")}
        self._root = _forward_of(type(model))
        named = (model.named_modules(), model.named_parameters())
        self._parts = {name.rpartition(".")[2] for names in named for name, _ in names}
        self._ran: dict[CodeType, set[tuple[int, int]]] = {}
        self._values: dict[str, set[str]] = {}

    def another(self) -> Reached:
        """Return one of the same model of which nothing has run."""
        other = copy.copy(self)
        other._ran, other._values = {}, {}
        return other

    def add(self, other: Reached) -> None:
        """Count as reached what another one saw too."""
        for code, steps in other._ran.items():
            self._ran.setdefault(code, set()).update(steps)
        for name, values in other._values.items():
            self._values.setdefault(name, set()).update(values)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what runs in the body, in this thread."""
        if not self._files:
            yield
            return
        before = sys.gettrace()
        on_failure(lambda: sys.settrace(before))
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        del event, arg
        code = frame.f_code
        if code.co_filename not in self._files:
            return None
        steps = self._ran.setdefault(code, set())
        if code is self._root:
            for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
                self._values.setdefault(name, set()).update(_told_apart(frame.f_locals.get(name)))
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        before = _START

        def note(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal before
            del event, arg
            steps.add((before, frame.f_lasti))
            before = frame.f_lasti
            return note

        return note

    def sentences(self) -> list[str]:
        """Return, as at most two sentences, which code was not reached: by these inputs, and in this mode."""
        places = [place for file in sorted(self._files) for place in self._unreached_in(file)]
        by_inputs, in_modes = (_listed([told for told, mode in places if mode is of]) for of in (False, True))
        sentences = []
        if by_inputs:
            sentences.append(
                f"No run took these ways through the model's code, so that nothing is known of them: {by_inputs}. "
                "Inputs that take them can be given as examples=[...]."
            )
        if in_modes:
            sentences.append(
                "The model's code goes other ways in another mode (training, tracing or export, gradients, another "
                f"device or type), of which nothing is known: {in_modes}. What was found holds in the mode in which "
                "it ran."
            )
        return sentences

    def _unreached_in(self, file: str) -> Iterator[tuple[str, bool]]:
        codes = [code for code in self._ran if code.co_filename == file]
        lines = linecache.getlines(file)
        if not codes or not lines:
            return
        try:
            with _parsing:
                tree = ast.parse("".join(lines))
        except (SyntaxError, SystemError):  # the file is no longer what was run; or another thread parses by itself
            return
        steps = {step for code in codes for step in _steps(code, self._ran[code])}
        for node in ast.walk(tree):
            code = next((c for c in codes if _is_code_of(node, c)), None)
            if code is None or not isinstance(node, ast.FunctionDef):
                continue
            found = _Function(node, code, steps, self._parts, self._values if code is self._root else None)
            for way in found.unreached(node.body, None, []):
                name = code.co_qualname if hasattr(code, "co_qualname") else code.co_name
                yield f"{name}, {way.told(file)}", way.of_mode


def _listed(places: Sequence[str]) -> str:
    more = f"; and {len(places) - _MOST_NAMED} more" * (len(places) > _MOST_NAMED)
    return "; ".join(places[:_MOST_NAMED]) + more


def _forward_of(kind: type) -> CodeType | None:
    forward: Any = vars(kind).get("forward")
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return getattr(forward, "__code__", None)


def _is_code_of(node: ast.AST, code: CodeType) -> bool:
    if not isinstance(node, ast.FunctionDef) or node.name != code.co_name:
        return False
    return code.co_firstlineno == min([node.lineno, *(d.lineno for d in node.decorator_list)])


def _steps(code: CodeType, steps: set[tuple[int, int]]) -> Iterator[tuple[_Position, _Position]]:
    """Yield, of each step from an instruction to the next, where the two are."""
    positions = dict(_positions(code))
    for before, at in steps:
        yield positions.get(before, _NOWHERE), positions.get(at, _NOWHERE)


def _positions(code: CodeType) -> Iterator[tuple[int, _Position]]:
    """Yield where instructions start and end, line and column; -1 where columns are not known (Python 3.10)."""
    if sys.version_info >= (3, 11):
        for number, (line, last, column, end) in enumerate(code.co_positions()):
            if line is not None:
                known = column is not None and last is not None and end is not None
                yield 2 * number, ((line, column or 0), (last or 0, end or 0)) if known else ((line, -1), (line, -1))
    else:
        for start, end, line in code.co_lines():
            if line is not None:
                yield from ((offset, ((line, -1), (line, -1))) for offset in range(start, end, 2))


@dataclass(frozen=True)
class _Way:
    """Code that was not reached, the condition that leads there, and whether that asks for the mode.

    Or, where ``is_past``, code that no run went past, for the condition was true each time; or a bound, of a loop or a
    slice, that depends on the argument ``other``, of which there was one value.
    """

    first: ast.stmt | ast.expr
    last: ast.stmt | ast.expr
    condition: ast.expr
    of_mode: bool
    is_past: bool = False
    other: str | None = None

    def told(self, file: str) -> str:
        """Return where it is, and what it depends on."""
        end = self.last.end_lineno or self.last.lineno
        lines = f"{self.first.lineno}" if end == self.first.lineno else f"{self.first.lineno}-{end}"
        text = ast.unparse(self.condition)
        text = f"`{text if len(text) <= 60 else text[:57] + '...'}`"
        note = " was only ever true" * self.is_past if self.other is None else f" with another value of `{self.other}`"
        return f"{'past ' * self.is_past}{Path(file).name}:{lines} ({text}{note})"


class _Function:
    """A function that ran, with what of it did."""

    def __init__(
        self,
        node: ast.FunctionDef,
        code: CodeType,
        steps: set[tuple[_Position, _Position]],
        parts: set[str],
        values: dict[str, set[str]] | None,
    ) -> None:
        self._steps = {(before, at) for before, at in steps if before != at}
        self._ran = {at for _, at in steps}
        self._parts = parts
        self._is_root = values is not None
        args = node.args
        positional = [*args.posonlyargs, *args.args]
        owner = {positional[0].arg} if positional else set()
        defaulted = {arg.arg for arg in positional[len(positional) - len(args.defaults) :]}
        defaulted |= {arg.arg for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default}
        # the model's own code calls another function, always without these, or as it does here
        ignored = owner if self._is_root else owner | defaulted
        self._fixed = {name for name in defaulted if len((values or {}).get(name, ())) == 1}
        names = {*code.co_varnames, *code.co_cellvars}
        self._names = names - ignored - _read_from(owner, node, names)
        # what a model keeps for each device is the same on each: no other inputs lead there
        devices = {arg.arg for arg in [*positional, *args.kwonlyargs]} & {"device"}
        self._keys = (devices | _read_from(devices, node, names)) if devices else set()

    def _reached(self, node: ast.stmt | ast.expr) -> bool:
        # as a whole: what chooses between two expressions starts where the first of them does
        return any(_is_within(position, node) for position in self._ran)

    def _went_past(self, statement: ast.If) -> bool:
        """Whether a run went from the condition to something else than the body; True where that cannot be told."""
        test, body = statement.test, statement.body
        if sys.version_info < (3, 11) and body[0].lineno == test.end_lineno:
            return True  # only lines are known, and the condition and the body are in one

        def decides(position: _Position) -> bool:  # the jump's place is the whole statement's
            return _is_within(position, test) or (
                _is_within(position, statement) and position[0] == _start_of(statement)
            )

        exits = {at for before, at in self._steps if decides(before) and not decides(at)}
        return not exits or any(not any(_is_within(at, part) for part in body) for at in exits)

    def unreached(
        self, block: Sequence[ast.stmt], condition: ast.expr | None, follows: Sequence[ast.stmt]
    ) -> Iterator[_Way]:
        """Yield what was not reached of a block that was, or that ``condition`` leads to.

        Args:
            block: the statements.
            condition: what leads to the first of them.
            follows: what runs after the block unless it is left.
        """
        before = condition
        block = [statement for statement in block if not _says_nothing(statement)]
        for number, statement in enumerate(block):
            if not self._reached(statement):
                if before is not None and not _only_stops(block[number:]):
                    yield from self._way(block[number:], before, follows)
                return
            yield from self._within(statement, [*block[number + 1 :], *follows])
            before = statement.test if isinstance(statement, ast.If) else before if number == 0 else None

    def _within(self, statement: ast.stmt, follows: Sequence[ast.stmt]) -> Iterator[_Way]:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return
        blocks: list[tuple[Sequence[ast.stmt], ast.expr | None]] = []
        if isinstance(statement, ast.If | ast.While):
            blocks = [(statement.body, statement.test), (statement.orelse, statement.test)]
        elif isinstance(statement, ast.For):
            blocks = [(statement.body, statement.iter)]
        elif isinstance(statement, ast.With):
            blocks = [(statement.body, None)]
        elif isinstance(statement, ast.Try):
            blocks = [(statement.body, None), (statement.orelse, None), (statement.finalbody, None)]
        elif isinstance(statement, ast.Match):
            blocks = [(case.body, statement.subject) for case in statement.cases]
        if isinstance(statement, ast.For | ast.While):
            follows = [*statement.body, *follows]
        for block, condition in blocks:
            # what leaves the body of an ``if`` leaves out its ``else`` too, where that reads a layer
            others = statement.orelse if isinstance(statement, ast.If) and block is statement.body else []
            yield from self.unreached(block, condition, [*filter(self._reads_a_layer, others), *follows])
        if isinstance(statement, ast.If):
            yield from self._past(statement)
        yield from self._bounded(statement)
        if sys.version_info < (3, 11):
            return
        for choice in _choices(statement):
            if self._reached(choice.test):
                for way in (choice.body, choice.orelse):
                    if not self._reached(way):
                        yield from self._way([way], choice.test, [])

    def _past(self, statement: ast.If) -> Iterator[_Way]:
        """Yield the body of an ``if`` without ``else`` that every run went into, and that goes on after it."""
        body = [part for part in statement.body if not _says_nothing(part)]
        if any(not _says_nothing(part) for part in statement.orelse) or not body or not any(map(_computes, body)):
            return
        if not self._reached(body[0]) or _leaves(body) or self._went_past(statement):
            return
        named = {_name_of(node) for node in ast.walk(statement.test)}
        for way in () if named & {"isinstance", "hasattr"} else self._way(body, statement.test, []):
            yield replace(way, is_past=True)

    def _bounded(self, statement: ast.stmt) -> Iterator[_Way]:
        """Yield what is run so many times, or taken so far, as an argument says that had one value in all runs."""
        bounds: list[ast.expr] = []
        if isinstance(statement, ast.For | ast.While) and any(map(_computes, statement.body)):
            bounds = [statement.iter if isinstance(statement, ast.For) else statement.test]
        for part in ast.iter_child_nodes(statement):
            for node in ast.walk(part) if isinstance(part, ast.expr) else ():
                if isinstance(node, ast.Subscript) and any(isinstance(n, ast.Slice) for n in ast.walk(node.slice)):
                    bounds.append(node)
                elif isinstance(node, ast.ListComp | ast.GeneratorExp) and _computes(node.elt):
                    bounds += [generator.iter for generator in node.generators]
        for bound in bounds:
            names = {n.id for n in ast.walk(bound) if isinstance(n, ast.Name)} & self._fixed
            if names and self._reached(bound):
                yield _Way(bound, bound, bound, of_mode=False, other=min(names))
                return

    def _way(
        self,
        nodes: Sequence[ast.stmt] | Sequence[ast.expr],
        condition: ast.expr,
        follows: Sequence[ast.stmt],
    ) -> Iterator[_Way]:
        """Yield code that was not reached, if inputs, or a mode in which it matters, lead there."""
        asked = [node for node in ast.walk(condition) if isinstance(node, ast.expr) and self._reached(node)]
        modes = {name for node in asked if (name := _name_of(node)) in _MODES}
        if not modes and self._depends_on_inputs(condition):
            yield _Way(nodes[0], nodes[-1], condition, of_mode=False)
            return
        if not modes:
            modes = {name for node in asked if (name := _name_of(node)) in _OF_TENSORS}
        # a way that leaves the function or the loop leaves out what follows
        differs: list[ast.stmt | ast.expr] = [*nodes, *(follows if _leaves(nodes) else [])]
        matters = any(map(self._reads_a_layer if modes <= {_TRAINING} else _computes, differs))
        if modes and matters:
            yield _Way(nodes[0], nodes[-1], condition, of_mode=True)

    def _reads_a_layer(self, node: ast.AST) -> bool:
        return any(isinstance(part, ast.Attribute) and part.attr in self._parts for part in ast.walk(node))

    def _depends_on_inputs(self, condition: ast.expr) -> bool:
        """Whether what was looked at to decide is an argument or a local variable, and nothing else decided."""
        names = [node for node in ast.walk(condition) if isinstance(node, ast.Name | ast.Attribute)]
        if any(_name_of(node) in _MODES for node in names):
            return False
        if not self._is_root and any(isinstance(n, ast.Name) and n.id in ("isinstance", "hasattr") for n in names):
            return False
        of_tensors = [n for n in names if isinstance(n, ast.Attribute) and n.attr in _OF_TENSORS]
        for_device = {id(inner) for node in of_tensors for inner in ast.walk(node)}  # ``x`` in ``x.is_cuda``
        read = {
            n.id
            for n in names
            if isinstance(n, ast.Name) and n.id in self._names and id(n) not in for_device and self._reached(n)
        }
        return bool(read - self._keys if self._looks_into_own(condition) else read)

    def _looks_into_own(self, condition: ast.expr) -> bool:
        """Whether it asks if something is among what the model itself holds: ``key not in self.cache``."""
        return (
            isinstance(condition, ast.Compare)
            and isinstance(condition.ops[-1], ast.In | ast.NotIn)
            and not any(isinstance(n, ast.Name) and n.id in self._names for n in ast.walk(condition.comparators[-1]))
        )


def _read_from(owner: set[str], function: ast.FunctionDef, names: set[str]) -> set[str]:
    """Return the local variables that are bound once, to what is read from ``owner`` and from no other of ``names``.

    ``aa = getattr(self, "aa", None)`` is one, and so is ``block`` in ``for block in self.blocks``. What is bound twice
    may depend on the way that was taken between, and what is bound to a constant may be changed in place.
    """
    stored = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)]
    sources = [
        (target, node.value) for node in ast.walk(function) if isinstance(node, ast.Assign) for target in node.targets
    ]
    sources += [(node.target, node.iter) for node in ast.walk(function) if isinstance(node, ast.For)]
    settings = set(owner)
    while True:
        before = len(settings)
        for target, value in sources:
            read = {n.id for n in ast.walk(value) if isinstance(n, ast.Name)} & names
            bound = {n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            if read and read <= settings:
                settings |= {name for name in bound if stored.count(name) == 1}
        if len(settings) == before:
            return settings - owner


def _choices(statement: ast.stmt) -> Iterator[ast.IfExp]:
    """Yield ``a if test else b`` in the expressions of a statement, not in the statements inside it."""
    waiting: list[ast.AST] = [child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.expr)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.IfExp):
            yield node
        if not isinstance(node, ast.Lambda):
            waiting += list(ast.iter_child_nodes(node))


def _told_apart(value: Any) -> set[str]:
    """Return what tells a value from others: two things where that is not known, so that it is never the only one."""
    parts = value if isinstance(value, tuple) else (value,)
    known = all(part is None or isinstance(part, bool | int | float | str) for part in parts)
    return {repr(value)} if known else {"one", "another"}


def _name_of(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def _computes(node: ast.AST) -> bool:
    """Whether something new comes of it: not what only says something, or packs what there is into an object."""
    if isinstance(node, ast.BinOp | ast.UnaryOp | ast.AugAssign):
        return True
    if isinstance(node, ast.Call):
        names = [name for inner in ast.walk(node.func) if (name := _name_of(inner)) is not None]
        packs = isinstance(node.func, ast.Name) and node.func.id[:1].isupper()
        if _SAYS_ONLY & set(names):
            return False
        if not packs:
            return True
    return any(_computes(child) for child in ast.iter_child_nodes(node))


def _says_nothing(statement: ast.stmt) -> bool:
    """Whether a statement compiles to nothing: text, declarations."""
    text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    bare = isinstance(statement, ast.AnnAssign) and statement.value is None
    return text or bare or isinstance(statement, ast.Pass | ast.Global | ast.Nonlocal)


def _only_stops(statements: Sequence[ast.stmt]) -> bool:
    return all(isinstance(s, ast.Raise | ast.Assert) for s in statements) or isinstance(statements[-1], ast.Raise)


def _leaves(nodes: Sequence[ast.stmt] | Sequence[ast.expr]) -> bool:
    """Whether what comes after a block is not run after it."""
    return isinstance(nodes[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)


def _is_within(position: _Position, node: ast.stmt | ast.expr) -> bool:
    at, until = position
    start, end = _start_of(node), (node.end_lineno or 0, node.end_col_offset or 0)
    return start <= at and until <= end if at[1] >= 0 else start[0] <= at[0] <= end[0]


def _start_of(node: ast.stmt | ast.expr) -> tuple[int, int]:
    return node.lineno, node.col_offset
