"""timm's norm with an activation inside, as this library's."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import ShapeError, StateError
from batchnorm.nn.batch_norm import _Layer
from batchnorm.nn.pending import deferring_always

try:
    import timm
    from timm.layers import BatchNormAct2d, convert_sync_batchnorm, freeze_batch_norm_2d
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)


def network(**settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), BatchNormAct2d(6, **settings), nn.Conv2d(6, 5, 3), BatchNormAct2d(5, apply_act=False)]
    model = nn.Sequential(*layers)
    for norm in (model[1], model[3]):
        nn.init.uniform_(norm.weight, 0.5, 2)
        norm.running_mean.uniform_()
    return model


def images() -> torch.Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


ACTIVATIONS = {
    "relu": (nn.ReLU, {}),
    "relu6": (nn.ReLU6, {}),
    "silu": (nn.SiLU, {}),
    "leaky_relu(0.1)": (nn.LeakyReLU, {"negative_slope": 0.1}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_converted_and_fused_they_compute_the_same(activation: str, training: bool) -> None:
    kind, settings = ACTIVATIONS[activation]
    model = network(act_layer=kind, act_kwargs=settings).train(training)
    result = batchnorm.convert(model, images(), fuse=True)
    assert [str(norm) for norm in result.fused] == [f"1 → {activation} in 1.act: fused."]
    assert (len(result.converted), result.left) == (2, ())
    assert list(result.model.state_dict()) == list(model.state_dict())
    outputs, gradients = [], []
    for one in (model, result.model):
        with deferring_always():
            y = one(images())
        outputs.append(y.detach())
        gradients.append(torch.autograd.grad(y.square().sum(), list(one.parameters())))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(*(dict(m.named_buffers()) for m in (result.model, model)))


def test_the_way_back_and_the_classes() -> None:
    model = network()
    ours = batchnorm.convert(model).model
    assert all(isinstance(ours[k], BatchNormAct2d) and isinstance(ours[k], _Layer) for k in (1, 3))
    back = batchnorm.revert(ours).model
    assert type(back[1]) is BatchNormAct2d
    assert vars(back[1]).keys() == vars(model[1]).keys()
    back.load_state_dict(ours.state_dict())
    ours.load_state_dict(model.state_dict())


def test_activations_and_drops_that_no_call_can_hold_run_as_they_are() -> None:
    model = network(act_layer=nn.PReLU, drop_layer=nn.Dropout)
    result = batchnorm.convert(model, images(), fuse=True)
    assert not result.fused
    assert "1.act.weight" in result.model.state_dict()
    torch.testing.assert_close(result.model.eval()(images()), model.eval()(images()))


def test_copies_files_programs() -> None:
    model = network().eval()
    result = batchnorm.convert(model, images(), fuse=True)
    expected = model(images())
    file = io.BytesIO()
    torch.save(result.model, file)
    file.seek(0)
    others = {
        "copy": copy.deepcopy(result.model),
        "pickle": pickle.loads(pickle.dumps(result.model)),
        "file": torch.load(file, weights_only=False),
        "script": torch.jit.script(result.model),
        "trace": torch.jit.trace(result.model, images()),
        "fx": torch.fx.symbolic_trace(result.model),
        "export": torch.export.export(result.model, (images(),)).module(),
        "compile": torch.compile(result.model, backend="eager", fullgraph=True),
    }
    for name, other in others.items():
        torch.testing.assert_close(other(images()), expected, rtol=1e-5, atol=1e-5, msg=name)


def test_frozen_and_thawed() -> None:
    model = batchnorm.convert(network()).model
    batchnorm.freeze(model)
    expected = model(images())
    assert torch.equal(model.train()(images()), expected)
    batchnorm.unfreeze(model)
    assert type(model[1]) is type(batchnorm.convert(network()).model[1])
    assert model[1].training


def test_timms_converters_take_them_and_torchs_does_not_drop_the_activation() -> None:
    model = batchnorm.convert(network().eval()).model
    expected = model(images())
    torch.testing.assert_close(convert_sync_batchnorm(copy.deepcopy(model))(images()), expected)
    torch.testing.assert_close(freeze_batch_norm_2d(copy.deepcopy(model))(images()), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(StateError, match=r"^1: .*it runs ReLU\. Use timm\.layers\.convert_sync_batchnorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(StateError, match="it runs ReLU"):
        torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])


def test_errors_name_the_layer() -> None:
    model = batchnorm.convert(network()).model
    with pytest.raises(ShapeError, match=r"^1: expected 4D input"):
        model[1](torch.randn(3, 6))


def test_whole_networks_fuse_what_those_of_torchvision_do() -> None:
    torchvision = pytest.importorskip("torchvision")
    x = torch.randn(2, 3, 32, 32)
    pairs = {"mobilenetv2_100": torchvision.models.mobilenet_v2, "efficientnet_b0": torchvision.models.efficientnet_b0}
    for name, build in pairs.items():
        ours = batchnorm.convert(timm.create_model(name), x, fuse=True)
        theirs = batchnorm.convert(build(), x, fuse=True)
        assert ours.left == ()
        assert len(ours.fused) == len(theirs.fused) >= 33
