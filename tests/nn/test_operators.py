from __future__ import annotations

from pathlib import Path

import torch

import batchnorm.functional
from batchnorm.nn.operators import NORM_OPERATORS, eps_key, is_norm_operator, named_arguments


def test_every_listed_operator_exists() -> None:
    for name in NORM_OPERATORS:
        namespace, operator = name.split("::")
        assert hasattr(getattr(torch.ops, namespace), operator), name


def test_arguments_have_the_names_of_the_schema_and_its_defaults() -> None:
    clamp = torch.ops.aten.clamp.default
    x = torch.ones(1)
    assert named_arguments(clamp, (x,), {"max": 2}) == {"self": x, "min": None, "max": 2}
    assert named_arguments(clamp, (x, 1), {}) == {"self": x, "min": 1, "max": None}


def test_a_norm_is_told_by_its_operator_and_has_its_eps_by_either_name() -> None:
    for name in NORM_OPERATORS:
        namespace, operator = name.split("::")
        packet = getattr(getattr(torch.ops, namespace), operator)
        op = getattr(packet, packet.overloads()[0])
        assert is_norm_operator(op)
        keys = {a.name for a in op._schema.arguments} & {"eps", "epsilon"}
        assert {eps_key(dict.fromkeys(keys))} == keys
    assert not is_norm_operator(torch.ops.aten.relu.default)
    assert not is_norm_operator(torch.ops.higher_order.cond)


def test_one_file_knows_the_names_of_norm_operators() -> None:
    package = Path(batchnorm.__file__).parent
    knowing = {path.relative_to(package) for path in package.rglob("*.py") if "NORM_OPERATORS" in path.read_text()}
    assert knowing == {Path("nn/operators.py")}
