import math

import pytest
import torch
from torch import Tensor

from batchnorm.monitor.drift import MIN_SAMPLES, REFERENCE_SAMPLES, LayerDrift, judge
from batchnorm.monitor.stream import LayerStream, ReferenceStatistics

CHANNELS = 32


def run(x: Tensor, mean: Tensor | float = 0.0, variance: Tensor | float = 1.0, **options: float) -> LayerDrift:
    channels = x.shape[1]
    stored = (torch.as_tensor(v, dtype=torch.float64).expand(channels) for v in (mean, variance))
    stream = LayerStream("norm", ReferenceStatistics.of(*stored, 1e-5))
    stream.add(x)
    return judge(stream, **{"tolerance": 0.1, "level": 0.05, **options})


def independent(g: torch.Generator, n: int) -> Tensor:
    return torch.randn(n, CHANNELS, 8, generator=g)


def smooth_maps(g: torch.Generator, n: int) -> Tensor:
    """Feature maps with strong correlation between neighbours and between channels, variance 1."""
    mix = torch.randn(CHANNELS, 4, generator=torch.Generator().manual_seed(0))
    mix /= mix.norm(dim=1, keepdim=True)
    noise = torch.randn(n, 4, 10, 10, generator=g)
    blurred = torch.nn.functional.avg_pool2d(noise, 5, stride=1) * 5
    return torch.einsum("cr,nrhw->nchw", mix, blurred)


def one_value_per_sample(g: torch.Generator, n: int) -> Tensor:
    return torch.randn(n, CHANNELS, 1, generator=g).expand(n, CHANNELS, 9)


def skewed(g: torch.Generator, n: int) -> Tensor:
    return torch.empty(n, CHANNELS).exponential_(generator=g) - 1


KINDS = [independent, smooth_maps, one_value_per_sample, skewed]


@pytest.mark.every(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [16, 64])
def test_false_alarms_keep_the_level_even_at_the_edge_of_the_tolerance(kind, n: int) -> None:
    # The hypothesis tested is "the distance is at most the tolerance"; its hardest case is a true distance of exactly
    # that. 60 streams at level 0.05: 9 or more alarms have probability below 1e-3.
    edge = torch.where(torch.arange(CHANNELS) % 2 == 0, 0.1, -0.1)
    runs = [(kind(torch.Generator().manual_seed(seed), n), mean) for seed in range(60) for mean in (0.0, edge)]
    alarms = [run(x, mean).flagged for x, mean in runs]
    assert sum(alarms[0::2]) <= 1  # nothing has changed at all
    assert sum(alarms[1::2]) < 9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [lambda x: x + 0.5, lambda x: 1.6 * x, lambda x: 0.5 * x, lambda x: -x + 0.4, lambda x: x + 0.5 * x.abs()],
    ids=["shift", "scale up", "scale down", "inversion about 0.2", "stretch one side"],
)
def test_power(kind, change) -> None:
    assert all(run(change(kind(torch.Generator().manual_seed(seed), 128))).flagged for seed in range(5))


def test_distance_is_the_one_between_the_two_normal_distributions() -> None:
    g = torch.Generator().manual_seed(0)
    x = 2.0 * torch.randn(4096, CHANNELS, generator=g, dtype=torch.float64) + 4.0
    mean, variance = torch.full((CHANNELS,), 1.0), torch.full((CHANNELS,), 9.0)
    layer = run(x, mean, variance)
    expected = math.sqrt((4 - 1) ** 2 / 9 + (2 / 3 - 1) ** 2)
    # the standard error of one channel's shift is (2/3)/√4096 = 0.01
    assert layer.distance == pytest.approx(expected, abs=0.01)
    torch.testing.assert_close(layer.shift, torch.full((CHANNELS,), 1.0, dtype=torch.float64), rtol=0, atol=0.05)
    torch.testing.assert_close(layer.variance_ratio, torch.full((CHANNELS,), 4 / 9).double(), rtol=0.15, atol=0)
    assert 0 < layer.bound < layer.distance


def test_noise_does_not_inflate_the_distance_of_small_streams() -> None:
    for kind in KINDS:
        distances = [run(kind(torch.Generator().manual_seed(seed), 16)).distance for seed in range(30)]
        raw = math.sqrt(1 / 16)  # what the mean square shift alone would come to for one value per sample
        assert sorted(distances)[15] < raw / 2


def test_effective_number_of_values() -> None:
    g = torch.Generator().manual_seed(0)
    alike = run(one_value_per_sample(g, 400))
    free = run(torch.randn(400, CHANNELS, 8, generator=g))
    between = run(smooth_maps(g, 400))
    assert alike.effective == pytest.approx(400, rel=1e-6)
    assert free.effective == pytest.approx(3200, rel=0.15)
    assert free.effective <= 3200
    assert 2 * 400 < between.effective < 36 * 400 / 2  # 36 positions, neighbours within 5 share values


def test_standard_errors_scatter_as_a_standard_normal_does() -> None:
    z = torch.cat([run(kind(torch.Generator().manual_seed(7), 300)).standard_errors for kind in KINDS[:3]])
    # the stored statistics are exact here, but taken to be those of 608 samples
    scale = math.sqrt(1 + 300 / REFERENCE_SAMPLES)
    assert 0.75 < (z * scale).std() < 1.25


def test_few_samples_get_no_verdict() -> None:
    for n in range(MIN_SAMPLES):
        layer = run(torch.full((n, 3), 1e6))
        assert layer.status == ("too few samples" if n else "not called")
        assert (layer.distance, layer.bound, layer.flagged) == (None, None, False)
    assert run(torch.full((MIN_SAMPLES, 3), 1e6)).flagged


def test_a_layer_that_was_not_called() -> None:
    stream = LayerStream("norm", ReferenceStatistics.of(torch.zeros(3), torch.ones(3), 1e-5))
    layer = judge(stream, tolerance=0.1, level=0.01)
    assert layer.status == "not called"
    assert layer.worst() == []


def test_verdict_and_numbers_do_not_depend_on_the_cut_into_batches() -> None:
    x = smooth_maps(torch.Generator().manual_seed(0), 96) + 0.3
    layers = []
    for size in (1, 7, 32, 96):
        stream = LayerStream("norm", ReferenceStatistics.of(torch.zeros(CHANNELS), torch.ones(CHANNELS), 1e-5))
        for part in x.split(size):
            stream.add(part)
        layers.append(judge(stream, tolerance=0.1, level=0.01))
    for layer in layers[1:]:
        assert layer.status == layers[0].status == "drifted"
        assert layer.distance == pytest.approx(layers[0].distance, rel=1e-9)
        assert layer.bound == pytest.approx(layers[0].bound, rel=1e-9)
        torch.testing.assert_close(layer.standard_errors, layers[0].standard_errors)


def test_one_guilty_channel_is_named() -> None:
    x = torch.randn(256, CHANNELS, generator=torch.Generator().manual_seed(0))
    x[:, 5] += 3
    layer = run(x)
    assert layer.flagged
    worst = layer.worst(2)
    assert worst[0].channel == 5
    assert worst[0].shift == pytest.approx(3, abs=4 / 16)
    assert abs(worst[0].standard_errors) > 10 * abs(worst[1].standard_errors)


def test_rare_features_that_do_not_occur_are_no_drift() -> None:
    rare = 0.005
    x = torch.zeros(64, CHANNELS)
    x[::9, 0] = 1.0
    mean = torch.full((CHANNELS,), rare)
    mean[0] = 1 / 9
    assert not run(x, mean, mean * (1 - mean)).flagged


def test_a_constant_input_is_drift_even_at_the_stored_mean() -> None:
    assert run(torch.zeros(64, CHANNELS)).flagged


def test_eps_keeps_channels_that_never_vary_from_raising_alarms() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, CHANNELS, generator=g)
    x[:, 0] = 1e-6 * x[:, 0]  # rounding noise where the store says: constant
    variance = torch.ones(CHANNELS)
    variance[0] = 0.0
    assert not run(x, 0.0, variance).flagged


def test_values_that_are_not_finite_are_flagged_and_poison_nothing() -> None:
    x = torch.randn(64, CHANNELS, generator=torch.Generator().manual_seed(0))
    x[3] = torch.nan
    x[9, 2] = torch.inf
    layer = run(x)
    assert (layer.status, layer.flagged, layer.nonfinite) == ("non-finite values", True, 2)
    assert layer.distance < 0.1
    assert layer.shift.isfinite().all()


def test_nothing_but_nan() -> None:
    layer = run(torch.full((32, 3), torch.nan))
    assert (layer.status, layer.distance, layer.nonfinite) == ("non-finite values", None, 32)
    assert layer.worst() == []


def test_overflow_of_the_distance_is_reported_not_swallowed() -> None:
    assert run(torch.full((32, 3), 1e200, dtype=torch.float64)).flagged
