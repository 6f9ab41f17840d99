from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from batchnorm.errors import ArgumentTypeError, BatchNormError, InputError, ShapeError, UnknownNameError
from batchnorm.functional import batch_norm, use_backend

X, MEAN, VAR, W = torch.randn(4, 3), torch.zeros(3), torch.ones(3), torch.ones(3)
NAMES = ("input", "running_mean", "running_var", "weight", "bias")


def call(**changed):
    return {"input": X, "running_mean": MEAN.clone(), "running_var": VAR.clone(), "weight": W, "bias": W} | changed


# what is changed, and a piece of our message
BAD = {
    "one dimension": ({"input": torch.zeros(3)}, r"expected an input of shape \(N, C\).*got \(3,\)"),
    "running_mean too short": (
        {"running_mean": torch.zeros(2)},
        "expected 2 channels, for running_mean .* got 3 in",
    ),
    "running_var of one": (
        {"running_var": torch.ones(1)},
        "expected 1 channels, for running_var .* got 3 in",
    ),
    "weight too long": ({"weight": torch.ones(4)}, r"expected 4 channels, for weight holds"),
    "bias too long": ({"bias": torch.ones(4)}, r"expected 4 channels, for bias holds"),
    "only running_var": ({"running_mean": None}, "running_mean is None"),
    "only running_mean": ({"running_var": None}, "running_var is None"),
    "integers": ({"input": X.int()}, "floating-point input .* got torch.int32"),
    "complex": ({"input": X.cfloat()}, "got torch.complex64"),
    "double input": ({"input": X.double()}, r"torch.float64 needs parameters and statistics all of torch.float64; got"),
    "double state": (
        {k: torch.ones(3).double() for k in NAMES[1:]},
        "all of torch.float32; got running_mean torch.float64",
    ),
    "double weight": ({"weight": W.double()}, r"got .*weight torch.float64"),
    "half state": ({k: torch.ones(3).half() for k in NAMES[1:]}, "all of torch.float32"),
    "bfloat16 with float16 state": (
        {"input": X.bfloat16()} | {k: torch.ones(3).half() for k in NAMES[1:]},
        "torch.bfloat16 or torch.float32",
    ),
    "bfloat16 weight, float16 input": ({"input": X.half(), "weight": W.bfloat16()}, "weight torch.bfloat16"),
    "a list of statistics": ({"running_mean": [0.0]}, "running_mean must be a tensor; got list"),
    "negative eps": ({"eps": -1.0}, "eps must be .*; got -1.0"),
    "eps of zero": ({"eps": 0.0, "training": True}, "eps must be positive during training; got 0.0"),
    "eps of a wrong type": ({"eps": "small"}, "eps must be a number; got str"),
    "momentum None": ({"momentum": None}, "momentum must be a number; got NoneType"),
    "one value": (
        {"input": X[:1], "training": True},
        r"at least 2 values per channel; got 1 \(batch 1\)\.\nUse a larger batch",
    ),
    "one value in space": (
        {"input": torch.zeros(1, 3, 1, 1), "training": True},
        r"got 1 \(batch 1 × space 1×1\)",
    ),
    "statistics that need gradients": (
        {"running_mean": torch.zeros(3, requires_grad=True)},
        "cannot require gradients",
    ),
    "another device": ({"weight": torch.ones(3, device="meta")}, "input is on cpu, weight on meta"),
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_raise_torchs_type_in_better_words(name, training, backend):
    changed, message = BAD[name]
    training = changed.get("training", training)
    with pytest.raises(Exception) as torchs:  # noqa: PT011  whatever torch raises is what we compare with
        F.batch_norm(**call(**(changed | {"training": training})))
    arguments = call(**(changed | {"training": training}))
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
    with use_backend(backend), pytest.raises(BatchNormError, match=f"(?s)^batch_norm: .*{message}") as ours:
        batch_norm(**arguments)
    assert isinstance(ours.value, torchs.type)
    if name != "another device" or backend != "torch":  # there torch itself notices only after it wrote the statistics
        assert all(torch.equal(arguments[k], v) for k, v in before.items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [None, [1.0], 3])
def test_an_input_that_is_no_tensor_is_a_type_error(value, training):
    # torch says AttributeError in training and TypeError in evaluation
    with pytest.raises(ArgumentTypeError, match=f"input must be a tensor; got {type(value).__name__}"):
        batch_norm(value, MEAN, VAR, training=training)


def test_a_scalar_is_an_input_error():
    # torch says IndexError in training and RuntimeError in evaluation
    with pytest.raises(InputError, match=r"got \(\)"):
        batch_norm(torch.tensor(1.0), MEAN, VAR, training=True)


@pytest.mark.parametrize(
    ("extras", "error", "message"),
    [
        ({"activation": "rellu"}, UnknownNameError, "activation 'rellu' is unknown; .*did you mean 'relu'"),
        ({"activation": torch.relu}, ArgumentTypeError, "activation must be one of relu"),
        (
            {"residual": torch.zeros(4, 1)},
            ShapeError,
            r"residual must have the shape of the input, \(4, 3\); got \(4, 1\)",
        ),
        ({"residual": X.double()}, InputError, "residual must be torch.float32 on cpu .* got torch.float64"),
        ({"residual": 1.0}, ArgumentTypeError, "residual must be a tensor; got float"),
        ({"mask": torch.ones(4)}, InputError, "boolean tensor.* got torch.float32"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ShapeError, r"expected shape \(4,\).*got \(5,\)"),
        ({"mask": [True] * 4}, ArgumentTypeError, "mask must be a boolean tensor; got list"),
        ({"mask": torch.ones(4, dtype=torch.bool, device="meta")}, InputError, "mask on meta"),
    ],
)
def test_what_torch_does_not_have_is_checked(extras, error, message):
    with pytest.raises(error, match=re.compile(f"^batch_norm: .*{message}", re.DOTALL)):
        batch_norm(X, MEAN.clone(), VAR.clone(), training=True, **extras)


def test_an_error_that_is_not_about_the_arguments_passes_through():
    class Broken(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise RuntimeError("out of paper")

    with Broken(), pytest.raises(RuntimeError, match=r"^out of paper$") as caught:
        batch_norm(X, MEAN, VAR)
    assert not isinstance(caught.value, BatchNormError)
