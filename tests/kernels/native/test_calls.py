"""The kernels against the reference, within the bounds of ``kernels/accuracy.py``, on every instruction set."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.kernels import ACCURACY, ACTIVATIONS, REFERENCE, Transform
from batchnorm.kernels.accuracy import backward_bounds, moments_bounds, normalize_bound, train_forward_bound
from batchnorm.kernels.contract import normalizers
from batchnorm.kernels.native import available_isas, calls, isa, missing, use_isa
from batchnorm.moments import Moments

pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

EPS = 1e-5
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "leaky_relu(0.2)": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}
DTYPES = list(ACCURACY)
LAYOUTS = {
    "contiguous": lambda make, n, c, s: make(n, c, *s),
    "channels_last": lambda make, n, c, s: make(n, *s, c).movedim(-1, 1),
    "batch and channels swapped": lambda make, n, c, s: make(c, n, *s).transpose(0, 1),
    "space reversed": lambda make, n, c, s: make(n, c, *s[::-1]).permute(0, 1, *range(len(s) + 1, 1, -1)),
    "slice of the batch": lambda make, n, c, s: make(2 * n, c, *s)[1::2],
    "slice of the channels": lambda make, n, c, s: make(n, c + 3, *s)[:, 2 : c + 2],
    "every second channel": lambda make, n, c, s: make(n, 2 * c, *s)[:, ::2],
    "channels_last, slice of the channels": lambda make, n, c, s: make(n, *s, c + 3).movedim(-1, 1)[:, 2 : c + 2],
    "slice of the space": lambda make, n, c, s: make(n, c, *s[:-1], 2 * s[-1])[..., ::2] if s else make(n, c),
    "misaligned": lambda make, n, c, s: make(1 + n * c * prod(s)).reshape(-1)[1:].view(n, c, *s),
    "expanded batch": lambda make, n, c, s: make(1, c, *s).expand(n, c, *s),
    "expanded channels": lambda make, n, c, s: make(n, 1, *s).expand(n, c, *s),
    "sliding windows": lambda make, n, c, s: (
        make(n, c + prod(s)).unfold(1, prod(s), 1)[:, :c].reshape(n, c, *s)
        if len(s) != 1
        else make(n, c + s[0]).unfold(1, s[0], 1)[:, :c]
    ),
}


@contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    layout_dy: str = "contiguous"
    layout_residual: str | None = None
    activation: str | None = None
    weight: bool = True
    bias: bool = True
    half_parameters: bool = False
    offset: float = 0.5
    isa: str = "baseline"
    threads: int = 1
    seed: int = 0

    def tensor(self, layout, scale, offset, seed):
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)

        def make(*shape):
            return (scale * torch.randn(shape, generator=generator, dtype=torch.float64) + offset).to(self.dtype)

        n, c, *space = self.shape
        x = LAYOUTS[layout](make, n, c, space)
        assert x.shape == self.shape
        return x

    def parameter(self, wanted, seed):
        if not wanted:
            return None
        half = self.half_parameters and self.dtype in (torch.bfloat16, torch.float16)
        dtype = self.dtype if half or self.dtype == torch.float64 else torch.float32
        return torch.randn(self.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def double(tensor):
    return None if tensor is None else tensor.double()


def exact_or_better(got, exact, bound, dtype, what):
    """Both sides round where the data are float64 themselves: then the reference has the same errors once more."""
    room = 2 * bound if dtype == torch.float64 else bound
    error = (got.double() - exact).abs()
    assert (error <= room).all(), f"{what}: {(error / room).max().item():.3g} of the bound"


def away_from_kinks(dy, x, t):
    """Return dy with zeros where rounding may decide on which side of a kink an element is."""
    if t.activation not in KINKS:
        return dy
    linear = Transform(t.mean, t.rstd, t.weight, t.bias, t.residual)
    z = REFERENCE.normalize(x.double(), linear)
    bound = normalize_bound(x, linear, z)
    near = torch.stack([(z - kink).abs() <= bound for kink in KINKS[t.activation]]).any(0)
    if x.numel() > 50 and t.rstd.max() < 100:  # channels that are constant lie at one point, perhaps a kink
        assert near.float().mean() < 0.2  # or the test would look away
    return dy.masked_fill(near, 0.0)


def check(case):
    """Run all phases on one problem, in training and in evaluation, and compare."""
    with use_isa(case.isa):
        assert isa() == case.isa
        check_training(case)
        check_evaluation(case)


def on(case, kernel, *arguments, **options):
    """Run a kernel on as many threads as the case says; torch's own operators around it run on one."""
    with threads(case.threads):
        return kernel(*arguments, **options)


def problem(case):
    x = case.tensor(case.layout, 1.0, case.offset, seed=1)
    dy = case.tensor(case.layout_dy, 1.0, 0.1, seed=2)
    residual = None if case.layout_residual is None else case.tensor(case.layout_residual, 1.0, 0.2, seed=3)
    return x, dy, residual, case.parameter(case.weight, 4), case.parameter(case.bias, 5)


def check_training(case):
    x, dy, residual, weight, bias = problem(case)
    running = [torch.linspace(0.5, 2, case.shape[1], dtype=calls.compute_dtype(case.dtype)) for _ in range(2)]
    before = [r.double().clone() for r in running]
    moved = calls.Running(*running, 0.25)
    got, saved = on(
        case, calls.train_forward, x, weight, bias, residual, EPS, case.activation, running=moved, backward=True
    )
    exact = Moments.of(x)
    mean, rstd = normalizers(exact, EPS)
    statistics = saved.statistics
    of_mean, of_m2 = moments_bounds(x, exact)
    exact_or_better(statistics[0], exact.mean, of_mean, case.dtype, "mean")
    exact_or_better(statistics[1], exact.m2, of_m2, case.dtype, "M2")
    assert torch.equal(on(case, calls.moments, x, EPS), statistics)

    # 1/√(var + eps) by a few roundings of float64; the running statistics by one of their own and a few of those
    few = 8 * torch.finfo(torch.float64).eps
    own = normalizers(Moments(exact.count, statistics[0], statistics[1]), EPS)[1]
    assert ((statistics[2] - own).abs() <= few * own).all()
    new = statistics[0], statistics[1] / (exact.count - 1)
    for r, old, batch in zip(running, before, new, strict=True):
        stepped = 0.75 * old + 0.25 * batch
        size = 0.75 * old.abs() + 0.25 * batch.abs()
        assert ((r.double() - stepped).abs() <= torch.finfo(r.dtype).eps * stepped.abs() + few * size).all()

    t = Transform(mean, rstd, weight, bias, residual, case.activation)
    y = REFERENCE.normalize(
        x.double(), Transform(mean, rstd, double(weight), double(bias), double(residual), case.activation)
    )
    assert got.dtype == case.dtype
    assert got.shape == x.shape
    exact_or_better(got, y, train_forward_bound(x, t, y, exact), case.dtype, "y")
    check_backward(
        case,
        dy,
        x,
        saved,
        Transform(statistics[0], statistics[2], weight, bias, residual, case.activation),
        True,
    )


def check_evaluation(case):
    x, dy, residual, weight, bias = problem(case)
    mean, variance = torch.full((case.shape[1],), case.offset - 0.25), torch.linspace(0.5, 2, case.shape[1])
    stored = torch.stack((mean.double(), torch.zeros_like(mean).double(), (variance.double() + EPS).rsqrt()))
    t = Transform(stored[0], (variance.double() + EPS).rsqrt(), weight, bias, residual, case.activation)
    got, saved = on(case, calls.normalize, x, weight, bias, residual, stored, case.activation, backward=True)
    y = REFERENCE.normalize(
        x.double(), Transform(t.mean, t.rstd, double(weight), double(bias), double(residual), case.activation)
    )
    exact_or_better(got, y, normalize_bound(x, t, y), case.dtype, "y")
    check_backward(case, dy, x, saved, t, False)


def check_backward(case, dy, x, saved, t, training):
    dy = away_from_kinks(dy, x, t)
    d = Transform(t.mean, t.rstd, double(t.weight), double(t.bias), double(t.residual), t.activation)
    sums = REFERENCE.backward_reduce(dy.double(), x.double(), d)
    gradients = REFERENCE.backward_input(dy.double(), x.double(), d, sums if training else None)
    bounds = backward_bounds(dy, x, t, gradients.input)
    own = on(case, calls.backward_sums, dy, saved)
    wanted = t.residual is not None
    if training:
        dx, dresidual, of_both = on(case, calls.train_backward, dy, saved, residual=wanted)
        split, _ = on(case, calls.backward_input, dy, saved, own, float(sums.count[0]), residual=False)
    else:
        dx, dresidual = on(case, calls.backward_input, dy, saved, None, 1.0, residual=wanted)
        of_both, split = own, dx
    for got in (own, of_both):
        exact_or_better(got[0], sums.sum_dy, bounds.sum_dy, case.dtype, "Σg")
        exact_or_better(got[1], sums.sum_dy_xhat, bounds.sum_dy_xhat, case.dtype, "Σg·x̂")
    for got in (dx, split):
        assert got.dtype == case.dtype
        exact_or_better(got, gradients.input, bounds.input, case.dtype, "dx")
    assert (dresidual is None) is (not wanted or t.activation is None)
    if dresidual is not None:
        exact_or_better(dresidual, gradients.residual, bounds.residual, case.dtype, "dresidual")


# -- corners -----------------------------------------------------------------------------------------------------------

# one channel; fewer than threads; more than lanes; runs shorter than a register, and as long; tails; blocks and their
# tails; one channel whose samples are shared among threads; blocks of rows and their tails
CORNERS = [
    *[(2, 1), (3, 2), (5, 17), (64, 16), (259, 33), (700, 3), (3, 2000), (5000, 1)],
    *[(2, 1, 1), (3, 5, 2), (2, 16, 16), (4, 2, 15), (3, 3, 1031), (130, 2, 8), (2, 1, 20_000), (1, 2, 17_000)],
    *[(2, 3, 4, 4), (1, 2, 1, 9), (4, 20, 7, 7), (2, 3, 1, 1), (2, 2, 3, 2, 5), (1, 7, 2, 3, 4), (40, 33, 3, 1, 1)],
]
WAYS = [None, *ACTIVATIONS, "leaky_relu(0.2)"]


@pytest.mark.every(17)
@pytest.mark.parametrize("name", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CORNERS, ids=str)
def test_corners(shape, dtype, name):
    """Each shape as planes and as rows, on 1 and 3 threads, with and without a residual; activations take turns."""
    turn = CORNERS.index(shape)
    for number in (1, 3):
        for k, layout in enumerate(("contiguous", "channels_last")):
            residual = None if (number + k + turn) % 2 else "contiguous"
            activation = WAYS[(turn + 2 * number + k) % len(WAYS)]
            check(Case(shape, dtype, layout, layout, residual, activation, isa=name, threads=number))


@pytest.mark.every(6)
@pytest.mark.parametrize("name", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", WAYS)
def test_every_activation_with_and_without_residual(activation, dtype, name):
    for residual in (None, "contiguous"):
        for shape in [(33, 19), (3, 5, 39)]:
            for half in (False, True):
                check(
                    Case(
                        shape,
                        dtype,
                        "contiguous",
                        "channels_last",
                        residual,
                        activation,
                        half_parameters=half,
                        isa=name,
                    )
                )


@pytest.mark.every(6)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_input_gradient_and_residual(layout, dtype):
    best = available_isas()[-1]
    for shape in [(6, 5), (4, 3, 10), (3, 9, 4), (4, 5, 3, 2), (2, 3, 2, 3, 4)]:
        for other in ("contiguous", "channels_last"):
            check(Case(shape, dtype, layout, other, other, "relu", isa=best))
            check(Case(shape, dtype, other, layout, layout, "gelu", isa=best))


@pytest.mark.parametrize("name", available_isas())
@pytest.mark.parametrize("offset", [1e5, *(pytest.param(offset, marks=pytest.mark.sweep) for offset in (-1e5, 3e3))])
def test_a_mean_far_beyond_the_standard_deviation(offset, name):
    for dtype in (torch.float32, torch.float64):
        for shape in [(300, 9), (9, 3, 700), (1, 2, 20_000)]:
            for layout in ("contiguous", "channels_last"):
                for activation in (None, "silu"):
                    check(Case(shape, dtype, layout, layout, None, activation, offset=offset, isa=name, threads=2))


# -- everything together -----------------------------------------------------------------------------------------------


@st.composite
def cases(draw):
    space = draw(st.lists(st.integers(1, 9), max_size=3))
    if space and draw(st.booleans()):
        space[-1] = draw(st.sampled_from([15, 16, 17, 31, 33, 64, 513, 1025]))
    channels = draw(st.one_of(st.integers(1, 5), st.integers(1, 70)))
    n = draw(st.one_of(st.integers(1, 6), st.sampled_from([16, 33, 130, 300])))
    size = n * channels * prod(space)
    if size > 60_000:
        n = max(1, 60_000 // (channels * prod(space)))
    if n * prod(space) < 2:
        n = 2
    dtype = draw(st.sampled_from(DTYPES))
    layout = st.sampled_from(list(LAYOUTS))
    return Case(
        (n, channels, *space),
        dtype,
        draw(layout),
        draw(layout),
        draw(st.none() | layout),
        draw(st.sampled_from(WAYS)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        # half precision holds three digits;
        draw(st.sampled_from([0.0, 0.5, -3.0, 10.0] if ACCURACY[dtype].eps > 1e-6 else [0.0, 0.5, -3.0, 1e4, 1e5])),
        draw(st.sampled_from(available_isas() or ("baseline",))),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 9)),
    )


@pytest.mark.parametrize("name", available_isas())
def test_short_runs_of_coarse_values(name):
    """Squares of equal deviations round the same way again and again: only short sums keep that small."""
    for shape in [(500, 2, 2), (130, 2, 3)]:
        check(Case(shape, torch.bfloat16, offset=100.0, isa=name))


@settings(max_examples=5 * settings.default.max_examples)
@given(cases())
def test_any_call_is_within_the_bounds(case):
    check(case)
