from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import batchnorm.nn as ours
from batchnorm.errors import ArgumentTypeError, BatchNormError, InputError, ShapeError, UnknownNameError
from batchnorm.functional import use_backend
from batchnorm.kernels import ACCURACY, Transform
from batchnorm.kernels.accuracy import backward_bounds, train_forward_bound
from batchnorm.moments import Moments

DIMS = [1, 2, 3]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = {1: (4, 3, 5), 2: (4, 3, 5, 2), 3: (2, 3, 4, 2, 3)}


def backend_or_dispatch(name):
    return nullcontext() if name is None else use_backend(name)


def classes(dim):
    return getattr(ours, f"BatchNorm{dim}d"), getattr(nn, f"BatchNorm{dim}d")


def data(dim, dtype=torch.float32, seed=0):
    return torch.randn(SHAPES[dim], generator=torch.Generator().manual_seed(seed)).to(dtype)


def randomize(layer, seed=0):
    """Give a layer parameters and statistics that are not the neutral ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        if layer.running_var is not None:
            layer.running_var.copy_(0.5 + torch.rand(layer.running_var.shape, generator=generator))
    return layer


def step(layer, x, dy):
    """Return output, gradients and buffers after one forward and backward pass."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    parameters = dict(layer.named_parameters())
    gradients = torch.autograd.grad(y, (x, *parameters.values()), dy)
    named = dict(zip(("input", *parameters), gradients, strict=True))
    return {"output": y, **{f"d {k}": v for k, v in named.items()}, **dict(layer.named_buffers())}


# -- torch's own module inputs, with torch as the oracle -----------------------------------------------------------


@pytest.fixture(scope="module")
def module_db():
    # imported here: it takes seconds, and only the worker that runs these tests should pay
    from torch.testing._internal.common_modules import module_db

    found = {m.module_cls: m for m in module_db if m.module_cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)}
    assert len(found) == 3
    return found


def inputs_of(module_db, dim, dtype, training):
    """Return constructor and forward inputs: torch's, and those again in channels-last layout."""
    info = module_db[classes(dim)[1]]
    made = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    assert len(made) >= 7
    for entry in made:
        x = entry.forward_input.args[0]
        layouts = [x]
        if x.dim() in (4, 5):
            last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            layouts.append(x.detach().contiguous(memory_format=last))
        for layout in layouts:
            yield entry.constructor_input, layout


@pytest.mark.every(6)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_torchs_inputs_give_torchs_numbers_bit_for_bit(module_db, dim, dtype, training):
    our_class, torch_class = classes(dim)
    for constructor, x in inputs_of(module_db, dim, dtype, training):
        a = randomize(our_class(*constructor.args, **constructor.kwargs, dtype=dtype)).train(training)
        b = randomize(torch_class(*constructor.args, **constructor.kwargs, dtype=dtype)).train(training)
        assert a.extra_repr() == b.extra_repr()
        for round_ in range(2):
            dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(round_)).to(dtype)
            got, expected = step(a, x, dy), step(b, x, dy)
            assert list(got) == list(expected)
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, rtol=0, atol=0, msg=name)
            assert got["output"].stride() == expected["output"].stride()
        assert list(a.state_dict()) == list(b.state_dict())


@pytest.mark.every(6)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_torchs_inputs_on_the_reference_give_torchs_numbers_in_float64(module_db, dim, dtype, training):
    our_class, torch_class = classes(dim)
    for constructor, x in inputs_of(module_db, dim, dtype, training):
        a = randomize(our_class(*constructor.args, **constructor.kwargs, dtype=dtype)).train(training)
        b = torch_class(*constructor.args, **constructor.kwargs, dtype=torch.float64).train(training)
        b.load_state_dict(a.state_dict())
        dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        bounds = bounds_of(a, x.detach(), dy)
        with use_backend("reference"):
            got = step(a, x, dy)
        expected = step(b, x.double(), dy.double())
        for name, value in expected.items():
            assert ((got[name].double() - value).abs() <= bounds[name](value)).all(), name


def bounds_of(layer, x, dy):
    """Return, by name, the function of the exact value that bounds its error.

    Twice the bound of the contract, because torch rounds in float64 as the reference does; n more units of it in
    float64, for torch's sums over n values.
    """
    eps, m = ACCURACY[x.dtype].eps, Moments.of(x)
    batch = layer.training or layer.running_mean is None
    mean, var = (m.mean, m.variance()) if batch else (layer.running_mean.double(), layer.running_var.double())
    parameters = [None if p is None else p.detach().clone() for p in (layer.weight, layer.bias)]
    t = Transform(mean, (var.nan_to_num() + layer.eps).rsqrt(), *parameters)
    factor = 2.0 + (m.count.max().item() if x.dtype == torch.float64 else 0.0)
    sums = backward_bounds(dy, x, t, torch.zeros_like(x))
    before = {name: b.double().clone() for name, b in layer.named_buffers()}

    def of_buffer(name):
        return lambda exact: (2 * eps + 8 * m.count.max() * 2**-52) * (exact.abs() + before[name].abs() + 1)

    return {
        "output": lambda exact: factor * train_forward_bound(x, t, exact, m),
        "d input": lambda exact: factor * backward_bounds(dy, x, t, exact).input,
        "d weight": lambda exact: factor * sums.sum_dy_xhat + eps * exact.abs(),
        "d bias": lambda exact: factor * sums.sum_dy + eps * exact.abs(),
        "num_batches_tracked": torch.zeros_like,
        **{name: of_buffer(name) for name in ("running_mean", "running_var")},
    }


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dim", DIMS)
def test_torchs_error_inputs_raise_torchs_errors(module_db, dim, backend):
    info = module_db[classes(dim)[1]]
    entries = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    assert entries
    for entry in entries:
        constructor, x = entry.module_error_input.constructor_input, entry.module_error_input.forward_input.args[0]
        layer = classes(dim)[0](*constructor.args, **constructor.kwargs)
        with backend_or_dispatch(backend), pytest.raises(entry.error_type, match=entry.error_regex):
            layer(x)


@pytest.mark.every(4)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dim", DIMS)
def test_gradients_of_torchs_inputs(module_db, dim, backend, training):
    for constructor, x in inputs_of(module_db, dim, torch.float64, training):
        if x.numel() > 100:  # the larger ones differ in their size only
            x = x.detach()[:, :, :2].contiguous()
        layer = randomize(classes(dim)[0](*constructor.args, **constructor.kwargs, dtype=torch.float64))
        layer.train(training)
        names = [name for name, _ in layer.named_parameters()]

        def function(x, *values, layer=layer, names=names):
            fresh = {name: b.clone() for name, b in layer.named_buffers()}
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)) | fresh, (x,))

        leaves = (
            x.detach().clone().requires_grad_(),
            *(p.detach().clone().requires_grad_() for p in layer.parameters()),
        )
        with backend_or_dispatch(backend):
            assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
            assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


# -- running statistics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_running_statistics_over_several_batches(momentum, backend):
    layer, batches = ours.BatchNorm1d(3, momentum=momentum), [data(1, seed=s) for s in range(4)]
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for index, batch in enumerate(batches):
        with backend_or_dispatch(backend):
            layer(batch)
        m, factor = Moments.of(batch), 1 / (index + 1) if momentum is None else momentum
        mean = (1 - factor) * mean + factor * m.mean
        var = (1 - factor) * var + factor * m.variance(correction=1)
    assert layer.num_batches_tracked.item() == 4
    # four float32 roundings of values of size one
    tolerance = {"rtol": 0, "atol": 16 * torch.finfo(torch.float32).eps}
    torch.testing.assert_close(layer.running_mean.double(), mean, **tolerance)
    torch.testing.assert_close(layer.running_var.double(), var, **tolerance)


def test_a_refused_batch_leaves_no_trace():
    layer = randomize(ours.BatchNorm2d(3, momentum=None))
    before = copy.deepcopy(layer.state_dict())
    one = torch.zeros(4, 2, 2, dtype=torch.bool)
    one[0, 0, 0] = True
    for x, kwargs in [
        (torch.zeros(1, 3, 1, 1), {}),
        (torch.zeros(4, 2, 2, 2), {}),
        (torch.zeros(4, 3, 2, 2).double(), {}),
        (torch.zeros(4, 3, 2, 2), {"residual": torch.zeros(1)}),
        (torch.zeros(4, 3, 2, 2), {"mask": one}),
    ]:
        with pytest.raises(BatchNormError):
            layer(x, **kwargs)
        assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


# -- center, scale, activation, residual, mask -----------------------------------------------------------------------


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("center", "scale"), [(True, True), (True, False), (False, True), (False, False)])
def test_center_and_scale_apart(dim, center, scale):
    layer = randomize(classes(dim)[0](3, center=center, scale=scale))
    assert (layer.center, layer.scale) == (center, scale)
    assert [name for name, _ in layer.named_parameters()] == ["weight"] * scale + ["bias"] * center
    assert layer.affine is scale
    x, shape = data(dim), (1, -1, *(1,) * dim)
    xhat = torch.nn.functional.batch_norm(x, None, None, training=True)
    expected = xhat * layer.weight.view(shape) if scale else xhat
    expected = expected + layer.bias.view(shape) if center else expected
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=16 * torch.finfo(torch.float32).eps)
    if center or scale:
        layer(x).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    layer.reset_parameters()
    assert not center or layer.bias.eq(0).all()
    assert not scale or layer.weight.eq(1).all()
    assert layer.running_mean.eq(0).all()


def test_affine_false_wins_over_center_and_scale():
    layer = ours.BatchNorm1d(3, affine=False, center=True, scale=True)
    assert (layer.weight, layer.bias, layer.center, layer.scale) == (None, None, False, False)


def test_bias_is_torchs_name_for_center():
    assert ours.BatchNorm1d(3, bias=False).bias is None
    assert ours.BatchNorm1d(3, bias=False).weight is not None
    assert ours.BatchNorm1d(3, center=False).bias is None


def test_the_constructor_takes_torchs_arguments_in_torchs_order():
    layer = ours.BatchNorm2d(3, 1e-3, None, True, True, "meta", torch.bfloat16)
    assert (layer.eps, layer.momentum, layer.weight.device.type) == (1e-3, None, "meta")
    assert layer.running_mean.dtype == torch.bfloat16
    assert layer.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("training", [True, False])
def test_activation_residual_and_mask(dim, training):
    our_class, torch_class = classes(dim)
    layer = randomize(our_class(3, activation="relu", dtype=torch.float64)).train(training)
    plain = randomize(torch_class(3, dtype=torch.float64)).train(training)
    x, residual = data(dim, torch.float64), data(dim, torch.float64, seed=1)
    atol = 100 * torch.finfo(torch.float64).eps
    expected = torch.relu(plain(x) + residual)
    torch.testing.assert_close(layer(x, residual=residual), expected, rtol=0, atol=atol)
    mask = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool)
    mask[-1] = False
    y = layer(x, residual=residual, mask=mask)
    torch.testing.assert_close(y[:-1], torch.relu(plain(x[:-1]) + residual[:-1]), rtol=0, atol=atol)
    assert y[-1].eq(0).all()
    torch.testing.assert_close(layer.running_var, plain.running_var, rtol=0, atol=atol)
    assert layer.num_batches_tracked.item() == plain.num_batches_tracked.item() == 2 * training


def test_half_data_in_a_float32_layer():
    layer, x = ours.BatchNorm2d(3), data(2, torch.bfloat16)
    assert torch.equal(layer(x), nn.BatchNorm2d(3)(x))
    assert layer.running_mean.dtype == torch.float32


# -- errors ----------------------------------------------------------------------------------------------------------


def test_errors_name_the_layer_the_value_and_the_remedy():
    layer = ours.BatchNorm2d(64)
    with pytest.raises(ShapeError) as caught:
        layer(torch.zeros(1, 64, 1, 1))
    assert str(caught.value) == (
        "BatchNorm2d(64): training needs at least 2 values per channel; got 1 (batch 1 × space 1×1).\n"
        "Use a larger batch, or freeze the layer: batchnorm.freeze(model, name)."
    )
    layer.layer_name = "layer2.0.bn1"
    with pytest.raises(ShapeError) as caught:
        layer(torch.zeros(1, 64, 1, 1))
    assert str(caught.value) == (
        "layer2.0.bn1: training needs at least 2 values per channel; got 1 (batch 1 × space 1×1).\n"
        'Use a larger batch, or freeze the layer: batchnorm.freeze(model, "layer2.0.bn1").'
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dim", DIMS)
def test_bad_inputs_raise_torchs_type(dim, training):
    our_class, torch_class = classes(dim)
    a, b = our_class(3).train(training), torch_class(3).train(training)
    x = data(dim)
    bad = [torch.zeros(3), torch.zeros(1, 2, 3, 4, 5, 6), x[:, :2], x.int(), x.double(), torch.zeros(())]
    for value in bad:
        with pytest.raises(Exception) as torchs:  # noqa: PT011  whatever torch raises is what we compare with
            b(value)
        with pytest.raises(BatchNormError, match=rf"^BatchNorm{dim}d\(3\): ") as caught:
            a(value)
        assert isinstance(caught.value, torchs.type)
    with pytest.raises(ArgumentTypeError, match="input must be a tensor; got NoneType"):
        a(None)


def test_a_wrong_number_of_channels_is_explained():
    with pytest.raises(InputError, match=r"expected \d+ channels, for running_mean holds one value each; got 4 in an"):
        ours.BatchNorm1d(3)(torch.zeros(2, 4))


def test_an_unknown_activation_is_refused_at_once():
    with pytest.raises(UnknownNameError, match=r"BatchNorm2d: activation 'swish' is unknown"):
        ours.BatchNorm2d(3, activation="swish")


# -- a module like any other -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", DIMS)
def test_state_dicts_go_both_ways(dim):
    our_class, torch_class = classes(dim)
    a, b = randomize(our_class(3), 1), randomize(torch_class(3), 2)
    assert list(a.state_dict()) == list(b.state_dict())
    kept = copy.deepcopy(a.state_dict())
    a.load_state_dict(b.state_dict())
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    b.load_state_dict(kept)
    assert all(torch.equal(v, kept[k]) for k, v in b.state_dict().items())


def test_state_of_before_batches_were_counted_loads():
    state = {k: v for k, v in nn.BatchNorm1d(3).state_dict().items() if k != "num_batches_tracked"}
    layer = ours.BatchNorm1d(3)
    layer.load_state_dict(state)
    assert layer.num_batches_tracked.item() == 0


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal(make_copy):
    layer = randomize(ours.BatchNorm2d(3, scale=False, activation="silu", momentum=None))
    layer.layer_name = "stem.bn"
    again = make_copy(layer)
    assert type(again) is type(layer)
    assert (again.activation, again.layer_name, again.weight) == ("silu", "stem.bn", None)
    assert torch.equal(again(data(2)), layer(data(2)))


def test_repr_says_what_differs_from_torch():
    assert repr(ours.BatchNorm2d(3)) == repr(nn.BatchNorm2d(3))
    text = repr(ours.BatchNorm2d(3, scale=False, activation="relu"))
    assert text.endswith("center=True, scale=False, activation='relu')")


@pytest.mark.parametrize("dim", DIMS)
def test_it_is_accepted_wherever_torchs_is(dim):
    our_class, torch_class = classes(dim)
    assert isinstance(our_class(3), torch_class)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(our_class(3)))
    assert isinstance(model[0], nn.SyncBatchNorm)


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_without_a_graph_break(training):
    layer = randomize(ours.BatchNorm2d(3, activation="relu")).train(training)
    twin, x = copy.deepcopy(layer), data(2)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, residual=x)
    torch.testing.assert_close(y, twin(x, residual=x), rtol=0, atol=8 * torch.finfo(torch.float32).eps)
    assert layer.num_batches_tracked.item() == twin.num_batches_tracked.item()


@pytest.mark.parametrize("masked", [False, True])
def test_it_exports(masked):
    layer, x = randomize(ours.BatchNorm2d(3, activation="relu")).eval(), data(2)
    kwargs = {"mask": torch.rand(4, 5, 2, generator=torch.Generator().manual_seed(0)) > 0.3} if masked else {}
    program = torch.export.export(layer, (x,), kwargs)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    expected = torch.ops.batchnorm.batch_norm.default if masked else torch.ops.aten.batch_norm.default
    assert targets == [expected] if masked else expected in targets
    torch.testing.assert_close(program.module()(x, **kwargs), layer(x, **kwargs))


def test_it_stays_a_node_in_a_traced_graph():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), ours.BatchNorm2d(3), nn.ReLU())
    before = copy.deepcopy(model.state_dict())
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(traced.eval()(data(2)), model.eval()(data(2)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.(script|trace):DeprecationWarning")
class TestScript:
    @pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}, {"scale": False}])
    @pytest.mark.parametrize("training", [True, False])
    def test_plain_layers_can_be_scripted(self, options, training):
        layer = randomize(ours.BatchNorm2d(3, **options)).train(training)
        scripted, x = torch.jit.script(copy.deepcopy(layer)), data(2)
        for _ in range(2):
            assert torch.equal(scripted(x), layer(x))
        assert all(torch.equal(v, layer.state_dict()[k]) for k, v in scripted.state_dict().items())

    def test_what_a_script_cannot_do_it_says(self):
        scripted = torch.jit.script(ours.BatchNorm2d(3, activation="relu"))
        with pytest.raises(torch.jit.Error, match="takes no residual, mask or activation"):
            scripted(data(2))

    def test_layers_can_be_traced(self):
        layer, x = randomize(ours.BatchNorm2d(3, activation="relu")).eval(), data(2)
        assert torch.equal(torch.jit.trace(layer, (x,))(x), layer(x))


def test_per_sample_gradients_in_evaluation():
    layer = randomize(ours.BatchNorm1d(3, dtype=torch.float64)).eval()
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    x = data(1, torch.float64)

    def loss(parameters, one):
        return torch.func.functional_call(layer, parameters, (one[None],)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(gradients[name].sum(0), p.grad)


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (8, 4, 64, 64)])
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_one_of_two_running_statistics_is_refused_in_training_at_every_size(missing, shape):
    layer = ours.BatchNorm2d(4)
    setattr(layer, missing, None)
    with pytest.raises(ShapeError, match=f"{missing} is None"):
        layer(torch.randn(shape))
    kept = layer.running_var if missing == "running_mean" else layer.running_mean
    assert kept.unique().numel() == 1
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (8, 4, 64, 64), (8, 4)])
@pytest.mark.parametrize("negated", ["running_mean", "running_var"])
def test_statistics_that_are_a_negated_view_move_as_their_values_do(negated, shape):
    """Their memory holds the values with the other sign."""
    make = ours.BatchNorm1d if len(shape) == 2 else ours.BatchNorm2d
    x = torch.randn(shape) + 1
    layer, plain = make(4), make(4)
    setattr(plain, negated, torch.full((4,), 2.0))
    setattr(layer, negated, torch._neg_view(torch.full((4,), -2.0)))
    y = layer(x)
    torch.testing.assert_close(y, plain(x))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(layer, name).resolve_neg(), getattr(plain, name))
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
