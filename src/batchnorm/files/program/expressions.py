"""Formulas in the text of a program: of sizes, which sympy evaluates as Python, and guards, which torch compiles."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

__all__ = ["is_guard", "is_size"]

_LONGEST = 20_000
_MOST_BITS = 4096
"""Larger numbers than any size has are there to take memory and time."""

_SYMBOL = re.compile(r"[a-z]+\d+")
_NUMBER = re.compile(r"[-+]?\d*\.?\d*(e[-+]?\d+)?")
_PLAIN = re.compile(r"[\w .:+-]*", re.ASCII)
_LEAVES = ("Symbol", "Float")
"""Whose first argument is a text, which they do not evaluate."""
_POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift")
_FUNCTIONS = frozenset(
    """
    Abs Add And CeilDiv CeilToInt CleanDiv Eq Equality ExprCondPair Float FloatPow FloatTrueDiv FloorDiv FloorToInt Ge
    GreaterThan Gt Identity IntTrueDiv Integer IsNonOverlappingAndDenseIndicator LShift Le LessThan Lt Max Min Mod
    ModularIndexing Mul Ne Not Or Piecewise Pow PowByNatural PythonMod RShift Rational RoundDecimal RoundToInt
    StrictGreaterThan StrictLessThan Symbol ToFloat TruncToFloat TruncToInt Unequality Where ceiling floor
    """.split()  # noqa: SIM905
)
_CONSTANTS = frozenset({"true", "false", "oo", "int_oo", "nan", "inf"})
_GUARD_FUNCTIONS = frozenset(
    {"IsNonOverlappingAndDenseIndicator", "abs", "cast_symbool_to_symint_guardless", "float", "int", "max", "min"}
)
_OF_TENSORS = frozenset({"dim", "size", "storage_offset", "stride"})
_OPERATORS = (
    ast.BinOp, ast.BoolOp, ast.Compare, ast.UnaryOp, ast.IfExp, ast.operator, ast.boolop, ast.cmpop, ast.unaryop,
    ast.expr_context,
)  # fmt: skip


def is_size(text: str) -> bool:
    """Return whether a text is arithmetic on sizes and nothing else.

    >>> is_size("Add(Symbol('s0', integer=True), Integer(2))"), is_size("2*s0"), is_size("exit()")
    (True, True, False)
    """
    return _consists_of(text, _is_of_size)


def is_guard(text: str) -> bool:
    """Return whether a text is a condition on the sizes of the inputs and nothing else.

    >>> is_guard("L['x'].size()[0] >= 2"), is_guard("L['x'].__class__ == 2")
    (True, False)
    """
    return _consists_of(text, _is_of_guard)


def _consists_of(text: str, is_known: Callable[[ast.expr], bool]) -> bool:
    if len(text) > _LONGEST or not text.isascii() or not text.isprintable():
        return False
    try:
        body = ast.parse(text.strip(), mode="eval").body
        return is_known(body) and _bits(body) <= _MOST_BITS
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_of_size(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, bool | int | float)
    if isinstance(node, ast.Name):
        return node.id in _CONSTANTS or _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS:
            return False
        settings = all(k.arg is not None and isinstance(k.value, ast.Constant) for k in node.keywords)
        values = node.args
        if node.func.id in _LEAVES and values and isinstance(values[0], ast.Constant):
            pattern = _SYMBOL if node.func.id == "Symbol" else _NUMBER
            if isinstance(values[0].value, str) and not pattern.fullmatch(values[0].value):
                return False
            values = values[1:]
        return settings and all(not _is_text(k.value) for k in node.keywords) and all(map(_is_of_size, values))
    if isinstance(node, ast.Tuple):
        return all(map(_is_of_size, node.elts))
    return isinstance(node, _OPERATORS) and all(map(_is_of_size, ast.iter_child_nodes(node)))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and not isinstance(node.value, bool | int | float)


def _is_of_guard(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        value = node.value
        return value is None or isinstance(value, bool | int | float) or _is_plain(value)
    if isinstance(node, ast.Name):
        return node.id in ("L", "inf")
    if isinstance(node, ast.Subscript):
        return _is_of_guard(node.value) and _is_of_guard(node.slice)
    if isinstance(node, ast.Attribute):  # not called
        return isinstance(node.value, ast.Name) and (node.value.id, node.attr) in (("math", "inf"), ("math", "pi"))
    if isinstance(node, ast.Call):
        return not node.keywords and _is_called_in_guards(node.func) and all(map(_is_of_guard, node.args))
    return isinstance(node, _OPERATORS) and all(map(_is_of_guard, ast.iter_child_nodes(node)))


def _is_plain(value: object) -> bool:
    return isinstance(value, str) and _PLAIN.fullmatch(value) is not None


def _is_called_in_guards(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id in _GUARD_FUNCTIONS
    if not isinstance(function, ast.Attribute):
        return False
    owner, name = function.value, function.attr
    if isinstance(owner, ast.Name) and owner.id in ("math", "torch"):
        return not name.startswith("_") if owner.id == "math" else name.startswith(("sym_", "_sym_"))
    return name in _OF_TENSORS and _is_of_guard(owner)


def _bits(node: ast.AST) -> int:
    """Return how many bits the largest number that a formula computes may have; symbols stand for sizes."""
    if isinstance(node, ast.Constant):
        return node.value.bit_length() if isinstance(node.value, int) else 64
    named = node.func if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None  # no number itself
    parts = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr) and child is not named]
    base, exponent = _power(node)
    if base is not None:
        return _bits(base) * max(1, _whole(exponent))
    if isinstance(node, ast.Name | ast.Attribute):
        return 64
    return sum(map(_bits, parts))


def _power(node: ast.AST) -> tuple[ast.expr | None, ast.expr | None]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
        return node.left, node.right
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    if called and isinstance(node, ast.Call) and len(node.args) == 2:
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in _POWERS or name in ("pow", "ldexp", "exp2"):
            return node.args[0], node.args[1]
    return None, None


def _whole(exponent: ast.expr | None) -> int:
    """Return the size of an exponent: a number, or 64 for sizes with neither powers nor large numbers among them."""
    while isinstance(exponent, ast.Call) and len(exponent.args) == 1 and not _is_symbol(exponent.func):  # Integer(2)
        exponent = exponent.args[0]
    if isinstance(exponent, ast.UnaryOp):
        exponent = exponent.operand
    if isinstance(exponent, ast.Constant) and isinstance(exponent.value, int | float):
        return int(abs(exponent.value)) if abs(exponent.value) < _MOST_BITS else _MOST_BITS + 1
    parts = [] if exponent is None else list(ast.walk(exponent))
    numbers = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, int | float)]
    is_small = all(abs(number) <= 64 for number in numbers) and all(_power(part)[0] is None for part in parts)
    return 64 if is_small and any(map(_is_symbol, parts)) else _MOST_BITS + 1


def _is_symbol(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and (node.id == "Symbol" or node.id not in _FUNCTIONS)
