"""What counts as arithmetic on sizes, and as a condition on them: what torch writes, and nothing that does anything."""

from __future__ import annotations

import pytest

from batchnorm.files.program.expressions import is_guard, is_size


@pytest.mark.parametrize(
    "text",
    [
        "s0",
        "2*s0 + 1",
        " s77 ",
        "-s0",
        "(s0 - 3)//2 + 1",
        "s0**2",
        "oo",
        "Symbol('s0', integer=True, positive=True)",
        "Mul(Integer(-1), Pow(Symbol('s1', integer=True), Integer(2)))",
        "FloorDiv(Add(Symbol('s27'), Integer(-1)), Integer(2))",
        "Piecewise((Integer(1), Eq(Symbol('s0'), Integer(1))), (Integer(2), true))",
        "Float('1.5e-3', precision=53)",
        "True",
        "2**64",
    ],
)
def test_sizes(text: str) -> None:
    assert is_size(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s0; s1",
        "s0 = 1",
        "__import__('os')",
        "Symbol(__import__('os'))",
        "Symbol('__import__')",  # no name of a symbol
        "Symbol('s0', integer=exit())",
        "Symbol('s0', integer='exit()')",
        "Symbol('s0', **{})",
        "Float('exit()')",
        "Add('s0', 1)",
        "s0.real",
        "s0[0]",
        "lambda: s0",
        "[s0 for s0 in s1]",
        "f'{s0}'",
        "b'1'",
        "S0",
        "exit",
        "s0\n+ 1",
        "s\u0660",  # a digit that is none in ASCII
        "1" + "+1" * 12_000,  # too long
        "(" * 500 + "1" + ")" * 500,  # too deep for a parser
    ],
)
def test_what_is_no_size(text: str) -> None:
    assert not is_size(text)


@pytest.mark.parametrize(
    "text",
    [
        "L['x'].size()[0] >= 2",
        "L['args'][0][1].stride()[1] == L['x'].storage_offset() + 1",
        "L['x'].dim() == 4 and not L['flag'] is None",
        "math.sqrt(L['x'].size()[0]) < inf",
        "torch.sym_float(L['x'].size()[0]) < math.inf",
        "max(L['x'].size()[0], 2) <= 1024",
        "L['mode'] == 'bilinear'",
        "L['x'].size()[0] if L['y'] else 1",
    ],
)
def test_guards(text: str) -> None:
    assert is_guard(text)


@pytest.mark.parametrize(
    "text",
    [
        "L['x'].size",  # not called
        "L['x'].__class__() == 2",
        "L['x'].tolist()",
        "L['x'].size(dim=0)",  # keywords are nobody's
        "G['x'].size()[0] == 1",
        "math.__loader__()",
        "math.e",
        "torch.load('x')",
        "torch.sym_max",
        "open('x')",
        "L['it\"s'] == 1",  # ends the quotes of the message
        "L['x'] == (1, 2)",
        "(lambda: 1)()",
        "L['x'].size()[0] ==",
    ],
)
def test_what_is_no_guard(text: str) -> None:
    assert not is_guard(text)


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("2**4096", False),
        ("2**1000", True),
        ("9**9**9", False),
        ("Pow(Integer(9), Pow(Integer(9), Integer(9)))", False),
        ("Pow(Integer(2), Integer(-3))", True),
        ("Pow(Integer(2), Integer(1000))", True),
        ("s0**s1", True),  # 64 bits, 64 times
        ("Pow(Symbol('s0', integer=True), Symbol('s1', integer=True))", True),
        ("s0**((s1 - 3)//2)", True),
        ("s0**s1**s2", False),
        ("2**(s0 + 9**9**9)", False),  # a size in an exponent hides no large number beside it
        ("Pow(Integer(2), Add(Symbol('s0'), Pow(Integer(9), Integer(99999))))", False),
        ("2**(s0*1000000000)", False),
        ("1 << 5000", False),
        ("LShift(Integer(1), Symbol('s0'))", True),
        ("2**(1 + 1)", False),  # an exponent of several numbers has no bound that is seen
        ("2**1e300", False),
    ],
)
def test_numbers_that_take_memory_and_time_are_none(text: str, known: bool) -> None:
    assert is_size(text) is known
