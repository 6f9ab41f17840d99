"""Samples weigh as much as they have positions, as they do in what recalibrate and measure store."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import batchnorm
from batchnorm.moments import Moments
from batchnorm.monitor import measure, watch
from batchnorm.monitor.drift import REFERENCE_SAMPLES, judge
from batchnorm.monitor.samples import sample_statistics
from batchnorm.monitor.stream import GROUPS, LayerStream, ReferenceStatistics
from batchnorm.monitor.student import critical_t
from batchnorm.monitor.weights import Met

CHANNELS = 8


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference(channels: int = CHANNELS) -> ReferenceStatistics:
    return ReferenceStatistics.of(torch.linspace(-0.1, 0.1, channels), torch.linspace(0.8, 1.3, channels), 1e-5)


# -- equal sizes: as if nothing had a weight ------------------------------------------------------------------------


def unweighted(x: torch.Tensor, r: ReferenceStatistics, level: float) -> tuple[float, float, np.ndarray]:
    """Return distance, bound and standard errors by the formulas in which every sample counts the same."""
    values = x.double().numpy().reshape(*x.shape[:2], -1)
    unit = r.std.numpy()
    a, b = (values.mean(2) - r.mean.numpy()) / unit, values.var(2) / unit**2

    def squared(keep: np.ndarray) -> float:
        ratio = b[keep].mean(0) + a[keep].var(0, ddof=1) + r.eps / unit**2
        return float((a[keep].mean(0) ** 2 + (np.sqrt(ratio) - 1) ** 2).mean())

    n, group = len(x), np.arange(len(x)) % GROUPS
    whole = squared(np.ones(n, bool))
    without = np.array([squared(group != g) for g in range(GROUPS)])
    bias = max((GROUPS - 1) * (without.mean() - whole), 0.0)
    error = math.sqrt((GROUPS - 1) * without.var())
    left = whole - bias * (1 + n / REFERENCE_SAMPLES)
    margin = critical_t(level, GROUPS - 1) * error
    errors = a.mean(0) / np.sqrt(a.var(0, ddof=1) * (1 / n + 1 / REFERENCE_SAMPLES))
    return math.sqrt(max(left, 0.0)), math.sqrt(max(left - margin, 0.0)), errors


@pytest.mark.parametrize("shape", [(70, CHANNELS), (64, CHANNELS, 7), (50, CHANNELS, 5, 7), (33, CHANNELS, 2, 3, 4)])
def test_samples_of_one_size_count_the_same(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=generator(0), dtype=torch.float64) * 1.2 + 0.3
    r = reference()
    stream, forced = LayerStream("n", r), LayerStream("n", r)
    for part in x.split(9):
        stream.add(part)
        forced.add(part)
    met = stream.moments
    assert met.squares is met.means  # no weights are kept
    mean, variance = sample_statistics(x)
    a, b = (mean - r.mean) / r.std, variance / r.std.square()
    _ = forced.moments
    forced._panes.clear()
    forced._put(0, a, b, torch.arange(len(x)), torch.full_like(a, 0.37))  # the same by the sums with weights
    distance, bound, errors = unweighted(x, r, 0.05)
    layers = [judge(each, tolerance=0.1, level=0.05) for each in (stream, forced)]
    for layer in layers:
        assert layer.distance == pytest.approx(distance, rel=1e-9)
        assert layer.bound == pytest.approx(bound, rel=1e-9)
        np.testing.assert_allclose(layer.standard_errors.numpy(), errors, rtol=1e-9)
    assert layers[0].effective == pytest.approx(layers[1].effective, rel=1e-9)


# -- the algebra ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 10**6))
def test_several_calls_are_pooled_into_one_sample(sizes: list[int], seed: int) -> None:
    x = torch.randn(4, 3, sum(sizes), generator=generator(seed), dtype=torch.float64) + 5
    calls = [Met(0, *sample_statistics(part), float(part.shape[2]), True) for part in x.split(sizes, 2)]
    both = calls[0]
    for call in calls[1:]:
        assert both.continues(call)
        both = both.pooled(call)
    mean, variance = sample_statistics(x)
    torch.testing.assert_close(both.mean, mean)
    torch.testing.assert_close(both.variance, variance)
    assert both.positions == sum(sizes)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 12)), min_size=2, max_size=8), st.integers(0, 10**6))
def test_the_moments_over_a_stream_are_those_of_all_its_values(shapes: list[tuple[int, int]], seed: int) -> None:
    g = generator(seed)
    batches = [torch.randn(n, 3, length, generator=g, dtype=torch.float64) + length for n, length in shapes]
    stream, r = LayerStream("n", reference(3)), reference(3)
    for x in batches:
        stream.add(x)
        if len(x) % 2:
            _ = stream.moments  # summed up at different times
    whole = Moments.of(torch.cat([x.transpose(0, 1).flatten(1) for x in batches], 1), channel_dim=0)
    met, within = (_together(m) for m in (stream.moments.means, stream.moments.variances))
    torch.testing.assert_close(met.mean * r.std + r.mean, whole.mean)
    torch.testing.assert_close((within.mean + met.m2 / met.count) * r.std.square(), whole.variance())


def _together(moments: Moments) -> Moments:
    channels = moments.num_features // GROUPS
    whole = Moments.zero(channels)
    for row in range(GROUPS):
        cut = slice(row * channels, (row + 1) * channels)
        whole = whole.merge(Moments(moments.count[cut], moments.mean[cut], moments.m2[cut]))
    return whole


def test_masked_sequences_weigh_as_much_as_they_are_long() -> None:
    g = generator(0)
    x = torch.randn(40, CHANNELS, 12, generator=g)
    length = torch.randint(1, 13, (40,), generator=g)
    masked, cut = LayerStream("n", reference()), LayerStream("n", reference())
    masked.add(x, torch.arange(12) < length[:, None])
    for row, count in zip(x, length.tolist(), strict=True):
        cut.add(row[None, :, :count])
    a, b = (judge(stream, tolerance=0.1, level=0.05) for stream in (masked, cut))
    assert a.distance == pytest.approx(b.distance, rel=1e-5, abs=1e-9)
    torch.testing.assert_close(a.shift, b.shift, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(a.standard_errors, b.standard_errors, rtol=1e-4, atol=1e-5)


# -- verdicts -------------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """One norm on two levels of different size and mean."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, fine: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
        return self.norm(fine).mean() + self.norm(coarse).mean()


def pictures(seed: int, shift: float = 0.0) -> list[torch.Tensor]:
    g = generator(seed)
    return [torch.randn(16, 3, s, s, generator=g) + (1 + shift if s == 8 else 0) for s in (32, 8) * 16]


def levels(seed: int, shift: float = 0.0) -> list[dict[str, torch.Tensor]]:
    g = generator(seed)
    return [
        {"fine": torch.randn(16, 4, 16, 16, generator=g), "coarse": torch.randn(16, 4, 4, 4, generator=g) + 2 + shift}
        for _ in range(16)
    ]


def sequences(seed: int, shift: float = 0.0) -> list[torch.Tensor]:
    g = generator(seed)
    lengths = torch.randperm(79, generator=g)[:60] + 1
    return [torch.randn(5, 4, n, generator=g) + n / 80 + (shift if n > 40 else 0) for n in lengths.tolist()]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., list]]] = {
    "pictures of two sizes": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)), pictures),
    "levels of a pyramid": (Pyramid, levels),
    "sequences of many lengths": (lambda: nn.Sequential(nn.BatchNorm1d(4)), sequences),
}


def seen(model: nn.Module, batches: list, population=None, **options):
    with torch.no_grad(), watch(model, reference=population, **options) as w:
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    return w.result()


@pytest.mark.every(4)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("seed", range(6))
def test_data_of_several_sizes_is_as_stored_and_drift_at_one_size_is_seen(case, seed: int) -> None:
    build, data = case
    torch.manual_seed(seed)
    model = build().eval()
    batches = data(seed)
    batchnorm.recalibrate(model, batches, progress=False)
    for population in (None, measure(model, batches)):
        same = seen(model, batches, population)
        assert same.verdict == "as stored"
        assert same.layers[0].distance < 0.01
        assert same.layers[0].shift.abs().max() < 1e-4
        assert seen(model, data(seed + 100), population).verdict == "as stored"
        assert seen(model, data(seed + 100, 4.0), population).verdict == "drifted"
    assert seen(model, batches, window=96).verdict == "as stored"


# -- standard errors ------------------------------------------------------------------------------------------------


def random_sizes(seed: int) -> Iterator[list[torch.Tensor]]:
    """Yield what each sample of a stream brings: one map, of a size by chance on which its mean depends."""
    g = generator(seed)
    for size in torch.randint(2, 13, (150,), generator=g).tolist():
        own = torch.randn(1, 24, 1, generator=g)  # what the positions of a sample have in common
        yield [own + torch.randn(1, 24, size * size, generator=g) + 0.1 * (size - 7)]


def several_calls(seed: int) -> Iterator[list[torch.Tensor]]:
    """Yield likewise two maps, of two levels that are alike in each sample and differ from each other."""
    g = generator(seed)
    for _ in range(150):
        own = torch.randn(1, 24, 1, generator=g)
        yield [own + torch.randn(1, 24, n, generator=g) + at for n, at in ((64, 0.0), (16, 2.0))]


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", [random_sizes, several_calls])
def test_shifts_in_standard_errors_scatter_as_a_standard_normal_does(kind) -> None:
    truth = Moments.zero(24)
    for seed in range(1000, 1040):
        for calls in kind(seed):
            for x in calls:
                truth = truth.merge(Moments.of(x))
    r = ReferenceStatistics.of(truth.mean, truth.variance(), 1e-5)
    found = []
    for seed in range(12):
        stream = LayerStream("n", r)
        for calls in kind(seed):
            first = None
            for x in calls:
                first = stream.add(x, first=first)
        layer = judge(stream, tolerance=0.1, level=0.01)
        assert not layer.flagged
        assert layer.effective < 600  # the positions of a sample say little beyond the first
        found.append(layer.standard_errors)
    # the reference is of 40 times as many samples, but taken to be that of 608
    z = torch.cat(found) * (1 + 150 / REFERENCE_SAMPLES) ** 0.5
    assert 0.85 < z.std() < 1.15
