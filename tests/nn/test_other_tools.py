"""Other libraries' converters, each as installed, on layers that add nothing and on layers that add something."""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    QConfigMapping,
    fuse_modules,
    fuse_modules_qat,
    get_default_qat_qconfig_mapping,
    get_default_qconfig,
    get_default_qconfig_mapping,
    quantize_dynamic,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.fx.experimental import optimization
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.mkldnn import to_mkldnn

import batchnorm
from batchnorm import nn as ours
from batchnorm.errors import StateError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(observer|quant|dtype|TypedStorage|erase_node).*:UserWarning"),
]

SYNC = nn.SyncBatchNorm.convert_sync_batchnorm


def network(**settings: Any) -> nn.Sequential:
    """Two convolutions with a norm each; the first norm has the settings. Statistics, γ and β are not trivial."""
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), ours.BatchNorm2d(6, **settings), nn.ReLU()]
    layers += [nn.Conv2d(6, 5, 3, bias=False), ours.BatchNorm2d(5), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * 16, 4))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.3)
        for norm in norms(model):
            norm.running_var.abs_().add_(0.5)
    return model.eval()


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(other(images()), model(images()), rtol=1e-4, atol=1e-4)


ADDED = {
    "applies relu": {"activation": "relu"},
    "has a shift β without a scale γ": {"scale": False},
}


# -- SyncBatchNorm -----------------------------------------------------------------------------------------------------


def installed(name: str) -> Any:
    """Import a module, or skip the test where that or what it needs itself (torchvision) cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported: {error}")


def lightning_converter(model: nn.Module) -> nn.Module:
    return installed("lightning.pytorch.plugins.layer_sync").TorchSyncBatchNorm().apply(model)


def timm_converter(model: nn.Module) -> nn.Module:
    return installed("timm.layers").convert_sync_batchnorm(model)


SYNCHRONIZERS = pytest.mark.parametrize("converter", [SYNC, lightning_converter, timm_converter])


@SYNCHRONIZERS
def test_synchronized_norms_take_over_layers_that_add_nothing(converter: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    synchronized = converter(copy.deepcopy(model))
    assert all(type(norm) is nn.SyncBatchNorm for norm in norms(synchronized))
    assert_same(model, synchronized)


@SYNCHRONIZERS
@pytest.mark.parametrize(("what", "settings"), ADDED.items())
def test_synchronized_norms_drop_nothing_of_others(
    converter: Callable[[nn.Module], nn.Module], what: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(StateError, match=f"would drop what this layer does: it {what}"):
        converter(network(**settings))


@SYNCHRONIZERS
@pytest.mark.parametrize("convert", [True, False])
@pytest.mark.parametrize("parts", [{"affine": False}, {"stats": False}, {}])
def test_synchronized_norms_thaw_nothing(
    converter: Callable[[nn.Module], nn.Module], convert: bool, parts: dict[str, bool]
) -> None:
    model = network() if convert else batchnorm.revert(network()).model
    batchnorm.freeze(model, **parts)
    with pytest.raises(StateError, match=r"it is frozen. Unfreeze it first"):
        converter(model)
    batchnorm.unfreeze(model)
    assert all(type(norm) is nn.SyncBatchNorm for norm in norms(converter(model)))


def test_a_converted_layer_says_its_name() -> None:
    model = network()
    batchnorm.convert(model, inplace=True)
    assert model[1].layer_name is None  # it was this library's before
    model = batchnorm.convert(batchnorm.revert(model).model).model
    batchnorm.freeze(model)
    with pytest.raises(StateError, match=r"^1: torch.nn.SyncBatchNorm"):
        SYNC(model)


# -- folding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"scale": False}, {"center": False}, {"affine": False}])
@pytest.mark.parametrize("frozen", [False, True])
def test_fusing_a_convolution_keeps_all_of_a_norm_without_activation(settings: dict[str, Any], frozen: bool) -> None:
    model = network(**settings)
    if frozen:
        batchnorm.freeze(model)
    fused = fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(fused(images()), model[:2](images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_fusing_drops_no_activation(frozen: bool) -> None:
    model = network(activation="relu")
    if frozen:
        batchnorm.freeze(model)
    with pytest.raises(StateError, match="fuse_conv_bn_eval would drop what this layer does: it applies relu"):
        fuse_conv_bn_eval(model[0], model[1])
    with pytest.raises(StateError, match="fuse_linear_bn_eval would drop"):
        fuse_linear_bn_eval(nn.Linear(3, 6).eval(), ours.BatchNorm1d(6, activation="silu").eval())
    with pytest.raises(StateError, match="to_mkldnn would drop"):
        to_mkldnn(model)


def test_timms_freeze_drops_nothing() -> None:
    freeze = installed("timm.layers").freeze_batch_norm_2d
    model = network()
    assert_same(model, freeze(copy.deepcopy(model)))
    for what, settings in ADDED.items():
        with pytest.raises(StateError, match=f"timm's freeze_batch_norm_2d would drop .* it {what}"):
            freeze(network(**settings))


def test_mkldnn_takes_layers_that_add_nothing() -> None:
    model = network()[:5]
    expected = model(images())
    torch.testing.assert_close(to_mkldnn(model)(images().to_mkldnn()).to_dense(), expected, rtol=1e-4, atol=1e-4)


def test_the_optimizer_of_fx_folds_layers_that_add_nothing() -> None:
    model = network()
    fused = optimization.fuse(model)
    assert norms(fused) == []
    assert_same(model, fused)
    assert type(model[1]) is ours.BatchNorm2d  # it works on a copy


def test_the_optimizer_of_fx_leaves_others() -> None:
    model = network(activation="relu")
    with pytest.warns(UserWarning, match="leaves this layer as it is, in floating point: it applies relu"):
        fused = optimization.fuse(model)
    assert [type(norm) for norm in norms(fused)] == [ours.BatchNorm2d]
    assert_same(model, fused)


# -- quantization ------------------------------------------------------------------------------------------------------


def quantized(model: nn.Module, training: bool = False) -> nn.Module:
    """Return the int8 model; ``model`` is left alone."""
    model = copy.deepcopy(model)
    if training:
        prepared = prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), (images(),)).eval()
    else:
        prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (images(),))
    prepared(images(64))
    return convert_fx(prepared)


@pytest.mark.parametrize("training", [False, True])
def test_fx_quantization_folds_what_it_folds_of_torch(training: bool) -> None:
    model = network()
    int8 = quantized(model, training)
    assert norms(int8) == []
    if not training:
        assert torch.equal(int8(images()), quantized(batchnorm.revert(model).model)(images()))


@pytest.mark.parametrize("training", [False, True])
def test_fx_quantization_keeps_what_layers_add(training: bool) -> None:
    with pytest.warns(UserWarning, match="leaves this layer as it is, in floating point: it applies relu"):
        int8 = quantized(network(activation="relu"), training)
    (left,) = norms(int8)
    assert left.activation == "relu"


@pytest.mark.parametrize("convert", [True, False])
def test_fx_quantization_thaws_nothing(convert: bool) -> None:
    model = network() if convert else batchnorm.revert(network()).model
    batchnorm.freeze(model)
    with pytest.warns(UserWarning, match="it is frozen. Unfreeze it first"):
        int8 = quantized(model, training=True)
    assert all(batchnorm.is_frozen(norm) for norm in norms(int8))
    assert len(norms(int8)) == 2


def test_eager_quantization_fuses_layers_that_add_nothing() -> None:
    model = network()
    fused = fuse_modules(model, [["0", "1", "2"], ["3", "4", "5"]])
    assert norms(fused) == []
    assert_same(model, fused)
    assert type(model[1]) is ours.BatchNorm2d  # it works on a copy
    trained = fuse_modules_qat(network().train(), [["0", "1", "2"]])
    assert type(trained[0]).__name__ == "ConvBnReLU2d"


@pytest.mark.parametrize("frozen", [False, True])
def test_eager_quantization_refuses_others(frozen: bool) -> None:
    model = network() if frozen else network(activation="relu")
    if frozen:
        batchnorm.freeze(model)
    what = "is frozen" if frozen else "applies relu"
    with pytest.raises(StateError, match=f"torch.ao.quantization cannot fuse this layer: it {what}"):
        fuse_modules(model, [["0", "1", "2"]])


def test_dynamic_quantization_of_linear_layers_is_free_to_pass_by() -> None:
    model = network(activation="relu")
    batchnorm.freeze(model, "4")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*(TypedStorage|quantiz).*")
        small = quantize_dynamic(model, {nn.Linear})
    assert small[1].activation == "relu"
    assert batchnorm.is_frozen(small[4])
    torch.testing.assert_close(small(images()), model(images()), rtol=0.1, atol=0.3)


def test_settings_by_type_reach_the_layers() -> None:
    mapping = QConfigMapping().set_global(get_default_qconfig("x86"))
    prepared = prepare_fx(network(), mapping, (images(),))
    assert norms(prepared) == []


def test_quantization_of_exported_programs() -> None:
    pt2e = installed("torchao.quantization.pt2e.quantize_pt2e")
    inductor = installed("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    model = network(activation="relu")
    model[2] = nn.Identity()
    quantizer = inductor.X86InductorQuantizer().set_global(inductor.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(torch.export.export(model, (images(),)).module(), quantizer)
    prepared(images(4))
    int8 = pt2e.convert_pt2e(prepared)
    assert "batch_norm" not in int8.code
    assert "relu" in int8.code
    assert (int8(images()) - model(images())).abs().max() < 0.2 * model(images()).abs().max()


# -- torch.func, torch.jit, parametrizations ---------------------------------------------------------------------------


def test_functional_replacement_keeps_activations_and_refuses_frozen_statistics() -> None:
    model = network(activation="relu", scale=False)
    replaced = torch.func.replace_all_batch_norm_modules_(copy.deepcopy(model))
    assert replaced[:2](images()).min() == 0
    assert replaced[1].running_mean is None
    batchnorm.freeze(model)
    before = model(images())
    with pytest.raises(StateError, match="its statistics are frozen, and running_mean = None would take them away"):
        torch.func.replace_all_batch_norm_modules_(model)
    assert torch.equal(model(images()), before)


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_programs_of_jit_do_the_same(frozen: bool) -> None:
    model = network(scale=False)
    if frozen:
        batchnorm.freeze(model)
    for program in (torch.jit.script(model), torch.jit.trace(model, images())):
        assert_same(model, torch.jit.optimize_for_inference(torch.jit.freeze(program)))


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_can_still_be_parametrized(frozen: bool) -> None:
    norm = ours.BatchNorm2d(6)
    norm.eps = 0.25
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus(), unsafe=True)
    assert nn.utils.parametrize.is_parametrized(norm)
    assert norm.eps == 0.25
    assert isinstance(norm.parametrizations, nn.ModuleDict)
    if frozen:
        norm = ours.BatchNorm2d(6)
        batchnorm.freeze(norm)
    assert not hasattr(ours.BatchNorm2d(6), "parametrizations")
    assert weight_norm(nn.Linear(2, 2)).weight.shape == (2, 2)


@pytest.mark.parametrize("frozen", [False, True])
def test_eps_is_an_attribute_like_any_other(frozen: bool) -> None:
    torch.compiler.reset()  # other tests have compiled the same code up to the limit
    norm = ours.BatchNorm1d(6, eps=0.5, activation="relu").eval()
    if frozen:
        batchnorm.freeze(norm)
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        copied.eps = 2.0
        assert (norm.eps, copied.eps, vars(copied)["eps"]) == (0.5, 2.0, 2.0)
        x = torch.full((2, 6), 3.0)
        torch.testing.assert_close(copied(x), x / 3.0**0.5)
        torch.testing.assert_close(torch.compile(copied, backend="eager", fullgraph=True)(x), x / 3.0**0.5)
    assert "eps=0.5" in repr(norm)
