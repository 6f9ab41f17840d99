from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from batchnorm.functional import active_backend, backends, batch_norm, use_backend
from batchnorm.functional import moments as moments_of
from batchnorm.kernels import ACTIVATIONS, REFERENCE, Request, Transform
from batchnorm.kernels.accuracy import backward_bounds, moments_bounds, train_forward_bound
from batchnorm.kernels.native import NATIVE, available_isas, missing, use_isa
from batchnorm.kernels.native.backend import ALWAYS, SMALLEST
from batchnorm.kernels.reference import statistics
from batchnorm.moments import Moments

pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

EPS = 1e-5
LARGE = torch.zeros(ALWAYS // 256, 16, 16)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- which calls it serves ---------------------------------------------------------------------------------------------


FUSED = {"activation": "gelu"}
TRAINED = {"training": True}
THRESHOLDS = [
    ("planes", 16, TRAINED, 65_536),
    ("planes", 16, TRAINED | FUSED, SMALLEST),
    ("planes", 16, {}, 8_388_608),
    ("planes", 16, FUSED, 131_072),
    ("rows", 16, TRAINED, 1_179_648),
    ("rows", 16, TRAINED | FUSED, 131_072),
    ("rows", 16, {}, 262_144),
    ("rows", 16, FUSED, 131_072),
    ("rows", 8, TRAINED, SMALLEST),
    ("rows", 8, {}, 8_388_608),
    ("rows", 8, FUSED, 8_388_608),
]


@pytest.mark.parametrize(("layout", "channels", "options", "threshold"), THRESHOLDS)
def test_it_is_taken_from_the_threshold_on(layout, channels, options, threshold):
    assert backends() == ("native", "torch", "reference")
    samples = threshold // (16 * channels)
    for n, expected in ((samples, "native"), (samples - 1, "torch")):
        x = torch.empty(n, channels, 4, 4)
        if layout == "rows":
            x = x.to(memory_format=torch.channels_last)
        assert active_backend(x, **options) == expected
        with use_backend("torch"):
            assert active_backend(x, **options) == "torch"
        with use_backend("native"):
            assert active_backend(x, **options) == "native"
    assert "the call costs more than it saves" in NATIVE.prefers_not(Request(x, **options))


class Subclass(torch.Tensor):
    pass


REFUSED = {
    "mask": (LARGE, {"mask": torch.ones(len(LARGE), 16, dtype=torch.bool)}, "it takes no mask", "reference"),
    "meta": (LARGE.to("meta"), {}, "it runs on the CPU; the input is on meta", "torch"),
    "integers": (LARGE.int(), {}, r"it has no torch\.int32", "torch"),
    "complex": (LARGE.cfloat(), {}, r"it has no torch\.complex64", "torch"),
    "empty": (torch.zeros(0, 16), {}, "there is nothing to normalize", "torch"),
    "vector": (torch.zeros(ALWAYS), {}, "there is nothing to normalize", "torch"),
    "negated": (torch._neg_view(LARGE), {}, "it reads ordinary tensors only", "torch"),
    "subclass": (LARGE.as_subclass(Subclass), {}, "it reads ordinary tensors only", "torch"),
    "weight of a subclass": (LARGE, {"weight": torch.ones(16).as_subclass(Subclass)}, "ordinary tensors only", "torch"),
    "residual of a subclass": (LARGE, {"residual": LARGE.as_subclass(Subclass)}, "ordinary tensors only", "torch"),
    "negated bias": (LARGE, {"bias": torch._neg_view(torch.ones(16))}, "ordinary tensors only", "torch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_serve_it_refuses_with_a_reason(name):
    x, options, reason, other = REFUSED[name]
    request = Request(x, **options)
    assert active_backend(x, **options) == other
    with use_backend("native"), pytest.raises(Exception, match=rf"use_backend\('native'\) cannot serve .*{reason}"):
        active_backend(x, **options)
    assert NATIVE.refusal(request) is not None


@pytest.mark.parametrize("training", [True, False])
def test_negated_views_count_with_their_sign(training):
    x, residual, weight = (randn(*shape, dtype=torch.float64) for shape in ((40, 6), (40, 6), (6,)))
    state = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    for large in (False, True):
        a, r = (x.repeat(300, 1), residual.repeat(300, 1)) if large else (x, residual)
        got = batch_norm(a, *state, torch._neg_view(weight), training=training, residual=torch._neg_view(r))
        expected = batch_norm(a, *state, -weight, training=training, residual=-r)
        torch.testing.assert_close(got, expected)


def test_a_negated_gradient_counts_with_its_sign():
    x = randn(40, 6).requires_grad_()
    for name in ("native", "torch"):
        with use_backend(name):
            y = batch_norm(x, None, None, training=True)
        y.register_hook(torch._neg_view)
        (gradient,) = torch.autograd.grad(y, x, randn(40, 6, seed=1))
        if name == "native":
            first = gradient
    torch.testing.assert_close(first, gradient)


def test_tangents_of_forward_mode_are_not_lost():
    from torch.autograd import forward_ad

    x, tangent = randn(ALWAYS // 256, 16, 16), randn(ALWAYS // 256, 16, 16, seed=1)
    tangents = []
    for function in (batch_norm, F.batch_norm):
        with forward_ad.dual_level():
            y = function(forward_ad.make_dual(x, tangent), None, None, training=True)
            tangents.append(forward_ad.unpack_dual(y).tangent)
    assert torch.equal(*tangents)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_another_default_device_does_not_matter(device):
    x, weight = randn(40, 6, 3).requires_grad_(), torch.tensor([0.0, 1, 2, -1, 3, 1])
    residual = randn(40, 6, 3, seed=1)

    def run():
        results = []
        for options in ({}, {"activation": "relu", "residual": residual}, {"inplace": True}):
            h, w = x * 1, weight.clone().requires_grad_()
            mean, variance = torch.zeros(6, device="cpu"), torch.ones(6, device="cpu")
            with use_backend("native"):
                y = batch_norm(h, mean, variance, w, training=True, **options)
            results += [y, mean, variance, *torch.autograd.grad(y, (x, w), residual)]
        h = x * 1
        y = batch_norm(h, None, None, training=True, activation="relu", residual=residual)
        results += torch.autograd.grad(torch.autograd.grad(y.sum(), x, create_graph=True)[0].square().sum(), x)
        with use_backend("native"):
            m = moments_of(x)
        return [*results, m.count, m.mean]

    expected = run()
    torch.set_default_device(device)
    try:
        got = run()
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# -- the contract's phases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "activation",
    [None, *ACTIVATIONS],
)
def test_the_phases_are_those_of_the_reference(activation, dtype):
    x, dy, residual = (randn(12, 5, 7, seed=k, dtype=dtype) for k in range(3))
    weight, bias = (randn(5, seed=k, dtype=torch.float64 if dtype == torch.float64 else torch.float32) for k in (3, 4))
    mean, rstd = statistics(x, None, EPS)
    exact = Moments.of(x)
    t = Transform(mean, rstd, weight, bias, residual, activation)
    d = Transform(mean, rstd, weight.double(), bias.double(), residual.double(), activation)
    y_exact = REFERENCE.normalize(x.double(), d)
    y, found = NATIVE.train_forward(x, t, EPS)
    factor = 2 if dtype == torch.float64 else 1  # the reference rounds as well
    assert ((y.double() - y_exact).abs() <= factor * train_forward_bound(x, t, y_exact, exact)).all()
    of_mean, of_m2 = moments_bounds(x, exact)
    for m in (found, NATIVE.moments(x)):
        assert torch.equal(m.count, exact.count)
        assert ((m.mean - exact.mean).abs() <= factor * of_mean).all()
        assert ((m.m2 - exact.m2).abs() <= factor * of_m2).all()
    assert (
        (NATIVE.normalize(x, t).double() - y_exact).abs() <= factor * train_forward_bound(x, t, y_exact, exact)
    ).all()

    gradients, sums = REFERENCE.train_backward(dy.double(), x.double(), d)
    bounds = backward_bounds(dy, x, t, gradients.input)
    reduced = NATIVE.backward_reduce(dy, x, t)
    split = NATIVE.backward_input(dy, x, t, reduced)
    fused, also = NATIVE.train_backward(dy, x, t)
    for r in (reduced, also):
        assert torch.equal(r.count, sums.count)
        assert ((r.sum_dy - sums.sum_dy).abs() <= factor * bounds.sum_dy).all()
        assert ((r.sum_dy_xhat - sums.sum_dy_xhat).abs() <= factor * bounds.sum_dy_xhat).all()
    for g in (split, fused):
        assert ((g.input.double() - gradients.input).abs() <= factor * bounds.input).all()
        assert ((g.residual.double() - gradients.residual).abs() <= factor * bounds.residual).all()


def test_statistics_of_more_processes_than_this_one_divide_by_their_count():
    """What a synchronized norm does: sums over two halves, added, with the count of both."""
    x, dy = randn(20, 3, 5, dtype=torch.float64), randn(20, 3, 5, seed=1, dtype=torch.float64)
    t = Transform(*statistics(x, None, EPS), randn(3, seed=2, dtype=torch.float64))
    parts = [NATIVE.backward_reduce(dy[s], x[s], t) for s in (slice(8), slice(8, 20))]
    total = type(parts[0])(*(a + b for a, b in zip(vars(parts[0]).values(), vars(parts[1]).values(), strict=True)))
    halves = torch.cat([NATIVE.backward_input(dy[s], x[s], t, total).input for s in (slice(8), slice(8, 20))])
    whole = REFERENCE.train_backward(dy, x, t)[0].input
    assert ((halves - whole).abs() <= 2 * backward_bounds(dy, x, t, whole).input).all()


def test_phases_do_not_write_into_their_arguments():
    x, dy, residual = (randn(12, 5, 7, seed=k) for k in range(3))
    t = Transform(*statistics(x, None, EPS), torch.ones(5), torch.zeros(5), residual, "relu")
    tensors = (x, dy, *(v for v in vars(t).values() if isinstance(v, torch.Tensor)))
    before = [v.clone() for v in tensors]
    _, reduced = NATIVE.train_backward(dy, x, t)
    NATIVE.train_forward(x, t, EPS)
    NATIVE.normalize(x, t)
    NATIVE.backward_input(dy, x, t, reduced)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert all(v._version == 0 for v in tensors)


# -- hostile values ----------------------------------------------------------------------------------------------------

SHAPES = [(200, 20), (6, 20, 33), (9, 20, 3)]


@pytest.mark.parametrize("name", available_isas())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_channel_of_nonsense_leaves_the_others_bit_identical(dtype, bad, name):
    for shape in SHAPES:
        for activation in (None, "relu", "gelu"):
            x, dy = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
            broken = x.clone()
            broken[1, 7] = bad
            others = [c for c in range(20) if c != 7]
            results, state = [], torch.float64 if dtype == torch.float64 else torch.float32
            for v in (x, broken):
                with use_isa(name), use_backend("native"):
                    h, mean, variance = v.clone().requires_grad_(), *torch.ones(2, 20, dtype=state)
                    y = batch_norm(h, mean, variance, training=True, activation=activation)
                    (dx,) = torch.autograd.grad(y, h, dy)
                results.append((y, dx, mean[None], variance[None]))
            for good, got in zip(*results, strict=True):
                assert torch.equal(good[:, others], got[:, others])
            y, dx, mean, variance = results[1]
            if activation is None:
                assert y[:, 7].isnan().all()
                assert dx[:, 7].isnan().all()
            assert mean[0, 7] == variance[0, 7] == 1  # what is not finite does not enter


@pytest.mark.parametrize("name", available_isas())
@pytest.mark.parametrize("training", [True, False])
def test_a_nan_gradient_stays_in_its_channel(training, name):
    x, dy = randn(60, 20), randn(60, 20, seed=1)
    bad = dy.clone()
    bad[3, 4] = float("nan")
    t = Transform(*statistics(x, None, EPS), activation="relu")
    with use_isa(name):
        good = [
            NATIVE.train_backward(g, x, t)[0].input if training else NATIVE.backward_input(g, x, t, None).input
            for g in (dy, bad)
        ]
    others = [c for c in range(20) if c != 4]
    assert torch.equal(good[0][:, others], good[1][:, others])


def large_values(shape, scale, name, layout):
    x = (randn(*shape, dtype=torch.float64).clamp(-3, 3) * scale).float()
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else x
    exact = F.batch_norm(x.double(), None, None, training=True)
    with use_isa(name), use_backend("native"):
        y = batch_norm(x, None, None, training=True)
        m = moments_of(x)
    of_mean, of_m2 = moments_bounds(x, Moments.of(x))
    assert ((m.mean - Moments.of(x).mean).abs() <= of_mean).all()
    assert ((m.m2 - Moments.of(x).m2).abs() <= of_m2).all()
    t = Transform(*statistics(x, None, EPS))
    bound = train_forward_bound(x, t, exact, Moments.of(x))
    # 1/standard deviation is a subnormal float: spacing 2^-149
    assert ((y.double() - exact).abs() <= bound + x.double().abs() * 2**-149).all()


# up to 3e38/3: the sum of a block and squares of deviations are beyond float32, deviations are not
@pytest.mark.parametrize("name", available_isas())
@pytest.mark.parametrize("scale", [1e18, 1e20, 4e37])
def test_planes_of_values_whose_squares_overflow(scale, name):
    for shape in [(6, 20, 33), (1, 2, 9000), (30, 2, 3)]:
        large_values(shape, scale, name, "planes")


@pytest.mark.parametrize("name", available_isas())
@pytest.mark.parametrize(
    "scale",
    [1e18, 1e20, 4e37],
)
def test_rows_of_values_whose_squares_overflow(scale, name):
    for shape in [(200, 20), (6, 20, 33)]:
        large_values(shape, scale, name, "rows")


@pytest.mark.parametrize("name", available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_subnormal_values_and_results(dtype, name):
    tiny = torch.finfo(dtype).smallest_normal
    for shape in SHAPES:
        x = (randn(*shape, dtype=torch.float64) * tiny / 4).to(dtype)
        weight = torch.ones(20, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for eps in (1e-5, 1e-30):
            t = Transform(*statistics(x, None, eps), weight)
            exact = REFERENCE.normalize(x.double(), t)
            with use_isa(name):
                y, _ = NATIVE.train_forward(x, t, eps)
            bound = train_forward_bound(x, t, exact, Moments.of(x))
            assert ((y.double() - exact).abs() <= 2 * bound).all()


@pytest.mark.parametrize("name", available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_constant_channel_is_the_bias_exactly(dtype, name):
    for shape in SHAPES:
        x = torch.full(shape, 1.7, dtype=dtype)  # many times this is not exactly a sum
        bias = torch.linspace(-1, 1, 20, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        with use_isa(name), use_backend("native"):
            y = batch_norm(x, None, None, None, bias, training=True)
        t = Transform(*statistics(x, None, EPS), None, bias)
        exact = bias.double().reshape(1, -1, *(1,) * (len(shape) - 2)).expand(shape)
        assert ((y.double() - exact).abs() <= train_forward_bound(x, t, exact, Moments.of(x))).all()


def test_eps_of_zero_in_evaluation():
    x, variance = randn(50, 3), torch.tensor([1.0, 4.0, 0.0])
    with use_backend("native"):
        y = batch_norm(x, torch.zeros(3), variance, eps=0.0)
    with use_backend("reference"):
        expected = batch_norm(x, torch.zeros(3), variance, eps=0.0)
    torch.testing.assert_close(y[:, :2], expected[:, :2])
    assert not y[:, 2].isfinite().any()  # as 1/0 is in the reference
    assert not expected[:, 2].isfinite().any()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 0), (4, 3, 0), (0, 0, 2, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_to_normalize_goes_to_torch(shape, training):
    x = torch.zeros(shape)
    c = shape[1]
    assert active_backend(x, training=training) == "torch"

    def outcome(function):
        try:
            return function(x, torch.zeros(c), torch.ones(c), training=training).shape
        except (RuntimeError, ValueError) as error:
            return ValueError if isinstance(error, ValueError) else RuntimeError

    assert outcome(batch_norm) == outcome(F.batch_norm)
