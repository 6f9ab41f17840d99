from __future__ import annotations

import torch

import batchnorm.functional  # noqa: F401 - registers the library's own operator
from batchnorm.nn.operators import NORM_OPERATORS, named_arguments


def test_every_listed_operator_exists() -> None:
    for name in NORM_OPERATORS:
        namespace, operator = name.split("::")
        assert hasattr(getattr(torch.ops, namespace), operator), name


def test_arguments_have_the_names_of_the_schema_and_its_defaults() -> None:
    clamp = torch.ops.aten.clamp.default
    x = torch.ones(1)
    assert named_arguments(clamp, (x,), {"max": 2}) == {"self": x, "min": None, "max": 2}
    assert named_arguments(clamp, (x, 1), {}) == {"self": x, "min": 1, "max": None}
