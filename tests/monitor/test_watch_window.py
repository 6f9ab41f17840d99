"""A watch that never ends: windows, every so many-th call, a new start; bounded memory and false alarms."""

import pytest
import torch
from torch import nn

from batchnorm.errors import ShapeError
from batchnorm.monitor import Watch, watch
from batchnorm.monitor.stream import LayerStream, ReferenceStatistics, SampleMoments


@pytest.fixture
def model() -> nn.Module:
    net = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6)).eval()
    net[0].num_batches_tracked += 1
    positive = torch.randn(100_000, 6, generator=torch.Generator().manual_seed(1)).relu()
    net[2].running_mean.copy_(positive.mean(0))
    net[2].running_var.copy_(positive.var(0))
    return net


def data(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def show(model: nn.Module, w: Watch, x: torch.Tensor, batch: int = 20) -> list[str]:
    """Return the verdict after each batch."""
    verdicts = []
    for part in x.split(batch):
        with w:
            model(part)
        verdicts.append(w.result().verdict)
    return verdicts


@pytest.mark.parametrize("window", [64, 100, 256, 500])
def test_what_is_new_is_not_lost_in_what_was_good(model: nn.Module, window: int) -> None:
    w, whole = watch(model, window=window), watch(model)
    x = torch.cat([data(1500), data(100, 1) - 1.5])
    with torch.no_grad(), w, whole:
        for part in x.split(20):
            model(part)
    assert w.result().drifted
    assert window * 3 / 4 <= w.result().samples <= window
    assert not whole.result().drifted


def test_one_bad_batch_in_ten_is_found_by_whoever_asks_after_each(model: nn.Module) -> None:
    w = watch(model, window=64)
    x = data(3200)
    bad = [index for index in range(100) if index % 10 == 7]
    for index in bad:
        x[32 * index : 32 * index + 32] -= 1.5
    verdicts = show(model, w, x, 32)
    assert all(verdicts[index] == "drifted" for index in bad)
    assert verdicts[:7] == ["as stored"] * 7


def test_windows_of_data_as_it_was_raise_no_alarm_however_often_one_looks(model: nn.Module) -> None:
    verdicts = [v for seed in range(4) for v in show(model, watch(model, window=64), data(1600, seed), 16)]
    assert verdicts == ["as stored"] * 400


def test_false_alarms_at_the_edge_of_the_tolerance_keep_the_level_for_a_whole_window() -> None:
    # The hypothesis is "the distance is at most the tolerance", and this its hardest case. 40 streams are looked at
    # after each batch for the length of a window, at level 0.05: 7 or more alarms have probability below 0.005.
    norm = nn.BatchNorm1d(16).eval()
    norm.running_mean.copy_(torch.where(torch.arange(16) % 2 == 0, 0.1, -0.1))
    alarms = 0
    for seed in range(40):
        x = torch.randn(128, 16, generator=torch.Generator().manual_seed(seed))
        alarms += "drifted" in show(norm, watch(norm, window=64, level=0.05), x, 8)[8:]
    assert alarms < 7


def test_a_window_holds_what_its_last_samples_are() -> None:
    x = data(333)
    reference = ReferenceStatistics.of(torch.zeros(6), torch.ones(6), 1e-5)
    windowed = LayerStream("n", reference, 64)
    for part in x.split([5, 300, 1, 27]):
        windowed.add(part)
        _ = windowed.moments
    start = (333 - 1) // 16 * 16 - 48
    assert windowed.samples == 333 - start
    a = x[start:].double() / reference.std
    expected = SampleMoments.of(a, torch.zeros_like(a), torch.arange(start, 333))
    torch.testing.assert_close(windowed.moments.means.mean, expected.means.mean)
    torch.testing.assert_close(windowed.moments.means.m2, expected.means.m2)
    assert len(windowed._panes) <= 4


def test_nan_leaves_a_window_again(model: nn.Module) -> None:
    w = watch(model, window=64)
    assert show(model, w, data(16) * torch.nan) == ["drifted"]
    assert show(model, w, data(160))[-1] == "as stored"


def test_dead_units_are_those_of_the_window() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()).eval()
    model[0].num_batches_tracked += 1
    w = watch(model, window=64)
    show(model, w, data(64))
    assert w.result().saturation[0].dead == ()
    show(model, w, data(128) - torch.tensor([9.0, 0, 0, 0, 0, 0]))
    assert w.result().saturation[0].dead == (0,)


def test_reset_forgets_what_was_seen(model: nn.Module) -> None:
    w = watch(model)
    assert show(model, w, data(64) + 2)[-1] == "drifted"
    w.reset()
    assert w.result().verdict == "not judged"
    assert {layer.status for layer in w.result().layers} == {"not called"}
    assert show(model, w, data(64))[-1] == "as stored"
    with torch.no_grad(), w:
        model(data(8) + 2)
        w.reset()  # in the block too
        model(data(32))
    assert w.result().samples == 32
    assert not w.result().drifted


def test_every_looks_at_the_first_of_so_many_calls(model: nn.Module) -> None:
    looked = []
    w = watch(model, every=4)
    with torch.no_grad(), w:
        for index in range(10):
            before = w.result().samples
            model(data(8, index))
            looked.append(w.result().samples > before)
        with pytest.raises(RuntimeError):
            model(torch.zeros(3, 5))
        for index in range(5):
            model(data(8, index))
    assert looked == [True, False, False, False] * 2 + [True, False]
    assert w.result().samples == 4 * 8
    w.reset()
    with torch.no_grad(), w:
        model(data(8))
    assert w.result().samples == 8


def test_calls_that_are_passed_over_run_no_other_operators_than_without_a_watch(model: nn.Module) -> None:
    seen: list[int] = []

    class Probe(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch._C._len_torch_dispatch_stack())
            return x

    whole = nn.Sequential(model, Probe()).eval()
    with torch.no_grad(), watch(whole, every=3):
        for index in range(6):
            whole(data(4, index))
    assert seen == [1, 0, 0, 1, 0, 0]


def test_parts_of_a_model_that_are_called_by_themselves_are_counted_by_themselves() -> None:
    net = nn.ModuleDict({"a": nn.BatchNorm1d(6), "b": nn.BatchNorm1d(6)}).eval()
    for norm in net.values():
        norm.num_batches_tracked += 1
    with torch.no_grad(), watch(net, every=2) as w:
        for index in range(4):
            net["b"](net["a"](data(16, index)))
    assert [layer.samples for layer in w.result().layers] == [32, 32]


@pytest.mark.parametrize(
    ("argument", "value"),
    [("every", 0), ("every", 1.5), ("every", True), ("window", 31), ("window", 64.0), ("window", 0)],
)
def test_numbers_out_of_range_are_refused_in_words(model: nn.Module, argument: str, value: object) -> None:
    with pytest.raises(ShapeError, match=f"watch: {argument}={value}: expected a whole number"):
        watch(model, **{argument: value})
