"""Which names in a program are operators that only compute."""

from __future__ import annotations

import pytest

from batchnorm.files.program.operators import is_operator


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.convolution.default",
        "torch.ops.aten.add.Tensor",
        "torch.ops.aten.relu",  # the overload may be left out
        "torch.ops.aten.relu_.default",
        "torch.ops.prims.convert_element_type.default",
        "torch.ops.higher_order.cond",
        "torch.ops.higher_order.wrap_with_set_grad_enabled",
        "_operator.floordiv",
        "math.ceil",
        "torch.sym_max",
        "torch._sym_sqrt",
    ],
)
def test_operators(target: str) -> None:
    assert is_operator(target)


@pytest.mark.parametrize(
    "target",
    [
        "",
        "relu",
        "torch.os.system",
        "torch.load",
        "torch.ops.load_library",
        "torch.ops.aten.nothing_of_that_name.default",
        "torch.ops.aten.relu.other",
        "torch.ops.aten.from_file.default",  # reads a file
        "torch.ops.aten.__contains__.str_list",  # of TorchScript, on its own objects
        "torch.ops.aten._operator.default.extra",
        "torch.ops.profiler._record_function_enter.default",
        "torch.ops.higher_order.cond.default",
        "torch.ops.higher_order.triton_kernel_wrapper_mutation",
        "torch.ops.aten.relu\n.default",
        "torch.ops.аten.relu.default",  # a Cyrillic а
        "_operator.methodcaller",
        "_operator.attrgetter",
        "operator.mul",
        "math.__loader__",
        "math.",
        "builtins.eval",
    ],
)
def test_other_names(target: str) -> None:
    assert not is_operator(target)
