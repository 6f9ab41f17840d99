"""Errors are harmless text, one family, and near names are offered."""

from __future__ import annotations

import pytest

from batchnorm import errors
from batchnorm.errors import BatchNormError, ShapeError, UnknownNameError, closest


def test_errors_keep_their_lines_and_nothing_else() -> None:
    assert str(ShapeError("bn\x1b[2J: one\ntwo")) == "bn\\x1b[2J: one\ntwo"
    assert str(UnknownNameError("bn\x07")) == "bn\\x07"


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ShapeError, ValueError),
        (errors.ArgumentTypeError, TypeError),
        (errors.InputError, RuntimeError),
        (errors.UnsupportedDtypeError, NotImplementedError),
        (errors.NonFiniteError, ValueError),
        (errors.EmptyStreamError, ValueError),
        (errors.BatchError, RuntimeError),
        (errors.StateError, RuntimeError),
        (errors.UnknownNameError, KeyError),
        (errors.VerificationError, ArithmeticError),
    ],
)
def test_each_is_caught_as_the_librarys_and_as_the_error_that_torch_raises_there(
    error: type[BatchNormError], builtin: type[Exception]
) -> None:
    assert issubclass(error, builtin)
    for caught in (BatchNormError, builtin):
        with pytest.raises(caught) as raised:
            raise error("bn1: expected 3; got 4.")
        assert str(raised.value) == "bn1: expected 3; got 4."  # not in quotes, as a KeyError prints it


def test_every_class_of_the_page_is_in_the_family() -> None:
    assert all(issubclass(getattr(errors, name), BatchNormError) for name in errors.__all__)
    assert str(UnknownNameError()) == ""


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("bn", ["stem.bn"], "; did you mean 'stem.bn'?"),  # inside something
        ("1", ["module.1", "net.1"], "; did you mean 'module.1'?"),  # the first of several
        ("bn.wieght", ["bn.weight", "bn.bias"], "; did you mean 'bn.weight'?"),
        ("", ["stem."], ""),  # the model itself is the end of no name
        ("zzz", ["bn1", "bn2"], ""),
        ("bn1", [], ""),
    ],
)
def test_the_closest_name_is_offered_if_it_is_close(name: str, known: list[str], hint: str) -> None:
    assert closest(name, iter(known)) == hint
