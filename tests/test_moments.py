from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.errors import ArgumentTypeError, InputError, ShapeError
from batchnorm.moments import Moments, expand_mask

EPS = torch.finfo(torch.float64).eps
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def assert_same(a: Moments, b: Moments, magnitude: torch.Tensor, units: float = 1.0) -> None:
    """Compare within the rounding of float64 sums: n roundings, each of eps times the magnitude of the values.

    An error e in the means of two merged sets changes their δ² by 2·δ·e, where n·δ² is at most n·M2.
    """
    n = b.count.clamp(min=1)
    assert torch.equal(a.count, b.count)
    of_mean = units * n * EPS * magnitude
    assert ((a.mean - b.mean).abs() <= of_mean).all()
    assert (
        (a.m2 - b.m2).abs() <= units * n * EPS * b.m2 + 2 * (n * b.m2).sqrt() * of_mean + n * of_mean.square()
    ).all()


def naive(x: torch.Tensor) -> Moments:
    """Return the moments of (N, C) rows by numpy's longest float."""
    values = x.numpy().astype(np.longdouble)
    mean = values.mean(0) if len(values) else np.zeros(values.shape[1])
    m2 = ((values - mean) ** 2).sum(0)
    return Moments(
        torch.full((x.shape[1],), float(len(values)), dtype=torch.float64),
        torch.from_numpy(np.asarray(mean, dtype=np.float64)),
        torch.from_numpy(np.asarray(m2, dtype=np.float64)),
    )


@st.composite
def cut_streams(draw: st.DrawFn) -> list[torch.Tensor]:
    """Draw batches of 0 to 9 rows of 3 channels, with an offset much larger than the spread in some."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    offset = draw(st.sampled_from([0.0, 1.0, -1e4, 1e8]))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return [offset + scale * torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in sizes]


@given(cut_streams())
def test_merged_batches_equal_the_moments_of_their_concatenation(batches):
    merged = Moments.zero(3)
    for batch in batches:
        merged = merged.merge(Moments.of(batch))
    whole = torch.cat(batches)
    magnitude = whole.abs().amax(0) if len(whole) else torch.zeros(3, dtype=torch.float64)
    assert_same(merged, naive(whole), magnitude, units=4)


@given(cut_streams(), cut_streams(), cut_streams())
def test_merge_is_commutative_and_associative(one, two, three):
    a, b, c = (Moments.of(torch.cat(batches)) for batches in (one, two, three))
    whole = torch.cat([*one, *two, *three])
    magnitude = whole.abs().amax(0) if len(whole) else torch.zeros(3, dtype=torch.float64)
    assert_same(a + b, b + a, magnitude, units=4)
    assert_same((a + b) + c, a + (b + c), magnitude, units=4)


def test_zero_is_neutral():
    a = Moments.of(torch.randn(7, 3))
    for merged in (a + Moments.zero(3), Moments.zero(3) + a):
        assert torch.equal(merged.count, a.count)
        assert torch.equal(merged.mean, a.mean)
        assert torch.equal(merged.m2, a.m2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_layout_gives_the_moments_of_its_values(layout, masked):
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.randn(4, 3, 5, 6) + 2)
    mask = torch.rand(4, 5, 6) > 0.3 if masked else None
    rows = x.permute(0, 2, 3, 1)[mask] if masked else x.permute(0, 2, 3, 1).reshape(-1, 3)
    assert_same(Moments.of(x, mask=mask), naive(rows.double()), rows.double().abs().amax(0), units=2)


@pytest.mark.parametrize("channel_dim", [0, 1, 2, 3, -1])
def test_channels_may_stand_anywhere(channel_dim):
    torch.manual_seed(0)
    x = torch.randn(3, 3, 3, 3)
    rows = x.movedim(channel_dim, -1).reshape(-1, 3).double()
    assert_same(Moments.of(x, channel_dim=channel_dim), naive(rows), rows.abs().amax(0), units=2)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (4, 0), (0, 0, 2)])
def test_empty_tensors_have_no_values(shape):
    m = Moments.of(torch.zeros(shape))
    assert m.num_features == shape[1]
    assert torch.equal(m.count, torch.full((shape[1],), 0.0 if 0 in (shape[0], *shape[2:]) else 4.0).double())
    assert m.mean.eq(0).all()
    assert m.m2.eq(0).all()


def test_a_single_vector_is_one_value_per_channel():
    m = Moments.of(torch.tensor([1.0, 2.0]), channel_dim=0)
    assert m.count.tolist() == [1.0, 1.0]
    assert m.mean.tolist() == [1.0, 2.0]


def test_a_large_mean_keeps_four_digits_of_the_variance():
    torch.manual_seed(0)
    x = (1e4 + 0.1 * torch.randn(64, 2, 32, 32)).float()
    exact = torch.from_numpy(x.numpy().astype(np.longdouble).var(axis=(0, 2, 3)).astype(np.float64))
    in_halves = Moments.of(x[:5]) + Moments.of(x[5:])
    for m in (Moments.of(x), in_halves):
        assert ((m.variance() - exact).abs() <= 1e-4 * exact).all()
    # what it is protected against: the same in float32 by E[x²] − E[x]² has no digit left
    naive_variance = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    assert ((naive_variance.double() - exact).abs() > exact).all()


def test_masked_positions_have_no_influence():
    torch.manual_seed(0)
    x = torch.randn(6, 3, 5)
    mask = torch.rand(6, 5) > 0.4
    dirty = torch.where(mask[:, None], x, torch.tensor([float("nan"), float("inf"), 1e30])[:, None])
    clean, polluted = Moments.of(x, mask=mask), Moments.of(dirty, mask=mask)
    assert torch.equal(clean.mean, polluted.mean)
    assert torch.equal(clean.m2, polluted.m2)


def test_a_mask_may_broadcast_over_the_batch_or_differ_between_channels():
    torch.manual_seed(0)
    x = torch.randn(6, 3, 5)
    of_length = torch.tensor([True, True, False, True, False])
    m = Moments.of(x, mask=of_length)
    assert_same(m, Moments.of(x[:, :, of_length]), x.double().abs().amax((0, 2)), units=2)
    per_channel = torch.rand(6, 3, 5) > 0.5
    m = Moments.of(x, mask=per_channel)
    for c in range(3):
        one = naive(x[:, c][per_channel[:, c]].double()[:, None])
        assert m.count[c] == one.count[0]
        assert abs(m.mean[c] - one.mean[0]) <= one.count[0] * EPS * x.abs().max()


def test_an_all_false_mask_leaves_nothing():
    m = Moments.of(torch.full((2, 3), torch.nan), mask=torch.zeros(2, dtype=torch.bool))
    assert m.count.tolist() == [0.0] * 3
    assert m.mean.tolist() == [0.0] * 3
    assert m.variance().isnan().all()


def test_variance_names_its_divisor():
    m = Moments.of(torch.tensor([[1.0], [2.0], [6.0]]))
    assert m.variance().tolist() == [14 / 3]
    assert m.variance(correction=1).tolist() == [7.0]
    assert m.variance(correction=3).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_dtype_is_read_exactly(dtype):
    torch.manual_seed(0)
    x = torch.randn(9, 3).to(dtype)
    m = Moments.of(x)
    assert m.mean.dtype == torch.float64
    assert_same(m, naive(x.double()), x.double().abs().amax(0), units=2)


def test_values_need_no_gradient_and_get_none():
    m = Moments.of(torch.randn(4, 2, requires_grad=True))
    assert not m.mean.requires_grad
    assert not m.m2.requires_grad


def test_non_finite_values_show():
    x = torch.zeros(4, 3)
    x[0, 1], x[1, 2] = torch.nan, torch.inf
    assert Moments.of(x).isfinite().tolist() == [True, False, False]


def test_state_dict_round_trip_through_a_file():
    m = Moments.of(torch.randn(5, 3))
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    again = Moments.from_state_dict(torch.load(file, weights_only=True))
    for name in ("count", "mean", "m2"):
        assert torch.equal(getattr(again, name), getattr(m, name))
    state = m.state_dict()
    state["mean"].zero_()
    assert not m.mean.eq(0).all()  # the state holds copies


def test_to_moves_all_three():
    m = Moments.of(torch.randn(5, 3)).to("meta")
    assert {m.count.device.type, m.mean.device.type, m.m2.device.type} == {"meta"}


def test_repr_is_short():
    assert repr(Moments.zero(2)) == "Moments(count=[0.0, 0.0], mean=[0.0, 0.0], m2=[0.0, 0.0])"
    assert repr(Moments.zero(9)).count("...") == 3


def test_bad_arguments_are_refused():
    x = torch.zeros(4, 3, 5)
    with pytest.raises(InputError, match=r"floating-point tensor; got torch.int64"):
        Moments.of(x.long())
    with pytest.raises(ShapeError, match="channel_dim=3, but x has shape"):
        Moments.of(x, channel_dim=3)
    with pytest.raises(InputError, match=r"boolean tensor.*got torch.float32"):
        Moments.of(x, mask=torch.ones(4, 5))
    with pytest.raises(ShapeError, match=r"expected shape \(4, 5\).*got \(4, 6\)"):
        Moments.of(x, mask=torch.ones(4, 6, dtype=torch.bool))
    with pytest.raises(ShapeError, match="cannot merge 2 channels with 3"):
        Moments.zero(2).merge(Moments.zero(3))
    with pytest.raises(ShapeError, match=r"Moments.mean: expected a float64 tensor"):
        Moments(torch.zeros(2).double(), torch.zeros(2), torch.zeros(2).double())
    with pytest.raises(InputError, match="got mean"):
        Moments.from_state_dict({"mean": torch.zeros(2)})


def test_expand_mask_does_not_copy():
    mask = torch.ones(4, 5, dtype=torch.bool)
    full = expand_mask(mask, torch.zeros(4, 3, 5), 1)
    assert full.shape == (4, 3, 5)
    assert full.stride(1) == 0
    assert full.data_ptr() == mask.data_ptr()


def test_equality_is_of_the_numbers():
    x = torch.randn(4, 3)
    assert Moments.of(x) == Moments.of(x.clone())
    assert Moments.of(x) != Moments.of(x + 1)
    assert Moments.zero(2) != Moments.zero(3)
    assert Moments.zero(2) != 0


def test_what_is_no_tensor_is_refused():
    with pytest.raises(ArgumentTypeError, match="expected a tensor; got list"):
        Moments.of([1.0, 2.0])
