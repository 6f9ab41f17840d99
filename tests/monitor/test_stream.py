import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.monitor.stream import GROUPS, LayerStream, ReferenceStatistics, SampleMoments

SHAPES = [(7, 3), (5, 3, 4), (5, 3, 4, 2), (4, 3, 2, 3, 2)]


def reference(channels: int = 3, eps: float = 1e-5) -> ReferenceStatistics:
    return ReferenceStatistics.of(torch.arange(channels) * 0.5, torch.linspace(0.5, 2.0, channels), eps)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 10**6))
def test_the_cut_into_batches_does_not_matter(sizes: list[int], seed: int) -> None:
    x = torch.randn(sum(sizes), 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cut, whole = LayerStream("n", reference()), LayerStream("n", reference())
    for part in x.split(sizes):
        cut.add(part)
        _ = cut.moments  # summed up after each batch, not all at the end
    whole.add(x)
    assert cut.samples == whole.samples == len(x)
    for a, b in zip(cut.moments.by_group(), whole.moments.by_group(), strict=True):
        for one, other in zip(a, b, strict=True):
            assert torch.equal(one.count, other.count)
            torch.testing.assert_close(one.mean, other.mean)
            torch.testing.assert_close(one.m2, other.m2)


def test_groups_are_every_sixteenth_sample_in_stored_units() -> None:
    x = torch.randn(40, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    r = reference()
    stream = LayerStream("n", r)
    stream.add(x)
    for g, (a, b) in enumerate(stream.moments.by_group()):
        part = x[g::GROUPS]
        torch.testing.assert_close(a.mean, ((part.mean(2) - r.mean) / r.std).mean(0))
        torch.testing.assert_close(b.mean, (part.var(2, correction=0) / r.std**2).mean(0))
        assert a.count.tolist() == [len(part)] * 3


def test_a_sample_that_is_not_finite_counts_in_no_moment_of_its_channel() -> None:
    x = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(1))
    x[3, 1, 2], x[5, 1, 0], x[5, 2, 0] = torch.nan, torch.inf, torch.nan
    stream = LayerStream("n", reference())
    stream.add(x)
    assert stream.nonfinite == 2
    counts = torch.stack([a.count for a, _ in stream.moments.by_group()]).sum(0)
    assert counts.tolist() == [20, 18, 19]
    assert all(bool(a.isfinite().all() and b.isfinite().all()) for a, b in stream.moments.by_group())


def test_a_second_call_in_one_forward_brings_no_new_samples() -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    stream = LayerStream("n", reference())
    first = stream.add(x)
    stream.add(x + 1, first=first)
    stream.add(x)
    assert (stream.samples, stream.calls) == (40, 3)
    counts = [a.count[0].item() for a, _ in stream.moments.by_group()]
    # samples 0 to 19 with two positions each, which weigh 1; 20 to 39 with one
    assert counts == [2 + 0.5] * 4 + [1 + 2 * 0.5] * 4 + [1 + 0.5] * 8


def test_reference_is_a_copy() -> None:
    mean, variance = torch.zeros(2), torch.ones(2)
    r = ReferenceStatistics.of(mean, variance, 1.0)
    mean += 1
    variance += 1
    assert r.mean.tolist() == [0, 0]
    assert r.std.tolist() == pytest.approx([2**0.5] * 2, rel=1e-15)  # a root may be rounded otherwise elsewhere


def test_moments_merge_like_sets() -> None:
    a, b = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    number = torch.arange(9)
    both = SampleMoments.of(torch.cat([a, b]), torch.cat([b, a]), torch.cat([number, number]))
    sum_ = SampleMoments.of(a, b, number) + SampleMoments.of(b, a, number)
    torch.testing.assert_close(both.means.m2, sum_.means.m2)
    torch.testing.assert_close(both.variances.mean, sum_.variances.mean)
