"""What the verbs of graphs say of a model that fails on its example inputs."""

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.dataflow.example_error import example_error
from batchnorm.errors import InputError

VERBS = {
    "fold": lambda net, x: batchnorm.fold(net.eval(), x),
    "place": batchnorm.place,
    "check": batchnorm.check,
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_in_half_precision_inside_a_float_model_is_named(verb, dtype):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).to(dtype))
    said = r"fails on the example inputs: RuntimeError.*1 holds half precision"
    with pytest.raises(InputError, match=said) as caught:
        verb(net, torch.randn(2, 3, 8, 8))
    assert str(caught.value).endswith("model.get_submodule('1').float() makes it fit.")


def test_nothing_is_said_of_norms_that_are_not_to_blame():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert str(example_error(net, ValueError("no"))) == "Sequential fails on the example inputs: ValueError: no"


def test_the_example_that_fails_is_named():
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(InputError, match=r"Sequential fails on examples\[1\]: RuntimeError"):
        batchnorm.fold(net, x, examples=[x, x[:, :2]])
