"""Conversion, freezing, watching and checking of models and inputs of every layout in memory."""

import copy

import pytest
import torch
from tests.layouts import DENSE, LAYOUTS, input_of, model_of

from batchnorm import check, convert, freeze, revert, watch

EVERY = [*((layout, "contiguous") for layout in DENSE), *(("channels_last", layout) for layout in LAYOUTS)]


@pytest.mark.every(6)
@pytest.mark.parametrize(("layout", "of_input"), EVERY)
@pytest.mark.parametrize("fuse", [False, True])
def test_converted_models_train_alike_and_go_back(layout, of_input, fuse):
    model, x = model_of(layout), input_of(of_input)
    converted = (convert(model, x, fuse=True) if fuse else convert(model)).model
    torch.testing.assert_close(converted(x), model(x), atol=1e-4, rtol=1e-4)
    if not fuse:
        torch.testing.assert_close(revert(converted).model(x), model(x))
    one, other = copy.deepcopy(model).train(), copy.deepcopy(converted).train()
    inputs = [x.detach().clone().requires_grad_() for _ in range(2)]
    for m, leaf in zip((one, other), inputs, strict=True):
        m(leaf).square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, atol=1e-3, rtol=1e-3)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_models_compute_what_they_did(layout):
    model, x = model_of(layout), input_of(layout)
    before = model(x)
    freeze(model)
    torch.testing.assert_close(model.train()(x), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_watching_and_checking_do_not_depend_on_the_layout(layout):
    model, plain = model_of(layout), model_of("contiguous")
    if layout in DENSE:
        x = input_of(layout)
        found = [str(check(m, x)) for m in (model, plain)]
        assert found[0] == found[1]
    given = input_of(layout)
    results = []
    for x in (given, given.clone(memory_format=torch.contiguous_format)):
        with watch(model) as watching:
            model(x)
        results.append(str(watching.result()))
    assert results[0] == results[1]
