"""In the sequential order every norm holds the moments of what it meets in eval mode, whatever the model does."""

from __future__ import annotations

import copy
import gc
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.statistics.sequential.networks import OnStored
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.errors import BatchError, NonFiniteError, StateError
from batchnorm.moments import Moments
from batchnorm.statistics import recalibrate
from batchnorm.statistics.estimators import Pooled
from batchnorm.statistics.sites import Sites


def gap(model: nn.Module, batches: list[Any], forward: Callable[..., Any] | None = None) -> float:
    """How far the stored statistics are from what the norms meet in eval mode, relative to σ + |mean|, and to σ²."""
    model.eval()
    collector = OnStored(Sites(model, None), Pooled)
    for index, batch in enumerate(batches):
        collector.run(index, lambda batch=batch: forward(model, batch) if forward else model(batch))
    worst = 0.0
    for site, tally in collector.tallies.items():
        mean, variance = tally.estimator.statistics()
        scale = variance + tally.eps
        worst = max(
            worst,
            float(((site.running_mean.double() - mean).abs() / (scale.sqrt() + mean.abs())).max()),
            float(((site.running_var.double() - variance).abs() / scale).max()),
        )
    return worst


def shuffle_affine(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out))
        out += x
        return out.relu_()


def deep(blocks: int = 9) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *(Block(6) for _ in range(blocks))]
    return shuffle_affine(
        nn.Sequential(*layers, nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6))
    )


def images(*sizes: int, side: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, side, side, generator=generator) * (1 + i % 3) + i % 2 for i, n in enumerate(sizes)]


# float32 data: the stored values are rounded once, mean and variance each by half a unit
ROUNDING = 4 * torch.finfo(torch.float32).eps


def test_twenty_norms_hold_what_they_meet_in_eval_mode() -> None:
    model, batches = deep(), images(8, 8, 8, 8, 5, 1, 8)
    result = recalibrate(model.train(), batches)
    assert len(result.layers) == 20
    assert model.training
    assert gap(model, batches) < ROUNDING
    twin = copy.deepcopy(model)
    recalibrate(twin, batches, order="parallel")
    assert gap(twin, batches) > 0.01


@given(cut=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_the_cut_into_batches_changes_nothing(cut: list[int]) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(sum(cut) + 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    one = shuffle_affine(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.BatchNorm2d(4))).double()
    other = copy.deepcopy(one)
    recalibrate(one, [x])
    recalibrate(other, x.split([*cut, 2]))
    for a, b in zip(one.buffers(), other.buffers(), strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_it_is_one_giant_batch_with_the_pooled_moments() -> None:
    model, batches = deep(2), images(4, 4, 4)
    recalibrate(model, batches)
    x = torch.cat(batches)
    met: dict[str, Tensor] = {}
    for name, module in model.eval().named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(lambda m, args, name=name: met.__setitem__(name, args[0]))
    with torch.no_grad():
        model(x)
    for name, values in met.items():
        exact, norm = Moments.of(values), model.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, exact.mean.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, exact.variance(correction=1).float(), rtol=1e-5, atol=1e-6)


def test_within_is_measured_in_this_order_too() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.BatchNorm1d(1, affine=False)).double()
    batches = [torch.tensor([[0.0], [2.0]]).double(), torch.tensor([[10.0], [14.0]]).double()]
    recalibrate(model, batches, estimator="within")
    assert model[0].running_var.item() == pytest.approx((2 + 8) / 2)
    assert model[1].running_var.item() == pytest.approx(5 / (5 + 1e-5))


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"memory": 0}, {"memory": 60_000}, {"memory": 60_000, "cache": True}])
def test_a_memory_bound_changes_nothing_but_the_way(options: dict[str, Any], tmp_path: Any) -> None:
    model, batches = deep(2), images(8, 3, 8, 5)
    free, bound = copy.deepcopy(model), copy.deepcopy(model)
    recalibrate(free, batches)
    if options.get("cache"):
        options = options | {"cache": tmp_path}
    recalibrate(bound, batches, **options)
    assert all(torch.equal(a, b) for a, b in zip(free.buffers(), bound.buffers(), strict=True))
    assert list(tmp_path.iterdir()) == []


def test_what_waits_stays_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchnorm.statistics.sequential.parked_runs import Waiting

    seen: list[float] = []
    keep = Waiting.keep

    def kept(self: Waiting, run: Any) -> bool:
        answer = keep(self, run)
        seen.append(sum(r.storages.nbytes() for r in self._nbytes))
        return answer

    monkeypatch.setattr(Waiting, "keep", kept)
    recalibrate(deep(2), images(8, 8, 8, 8), memory=100_000)
    assert 0 < max(seen) <= 100_000


class Loader:
    """Gives the same batches each time; made anew, so that nobody else holds them."""

    def __init__(self, shuffled: bool = False) -> None:
        self.walks, self.shuffled = 0, shuffled

    def __iter__(self) -> Any:
        self.walks += 1
        batches = images(8, 8, 8)
        if self.shuffled:
            random.Random(self.walks).shuffle(batches)
        return iter(batches)


def test_batches_that_do_not_fit_are_taken_from_the_stream_again() -> None:
    model, loader = deep(1), Loader()
    expected = copy.deepcopy(model)
    recalibrate(expected, images(8, 8, 8))
    recalibrate(model, loader, memory=10_000)
    assert loader.walks > 3
    assert all(torch.equal(a, b) for a, b in zip(expected.buffers(), model.buffers(), strict=True))


def test_a_stream_that_changes_is_refused() -> None:
    model = deep(1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match=r"does not fit into memory.*was another one this time.*shuffle=False"):
        recalibrate(model, Loader(shuffled=True), memory=10_000)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_generator_that_does_not_fit_is_refused() -> None:
    with pytest.raises(StateError, match=r"a generator can be walked through only once.*order='parallel'"):
        recalibrate(deep(1), (b for b in images(8, 8, 8)), memory=10_000)


def test_a_generator_that_fits_is_walked_once() -> None:
    model, batches = deep(1), images(8, 8)
    recalibrate(model, (b for b in batches))
    assert gap(model, batches) < ROUNDING


def test_a_system_that_allows_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    start, before = threading.Thread.start, set(threading.enumerate())  # what runs already is no matter of this test

    def starting(self: threading.Thread) -> None:
        if len(set(threading.enumerate()) - before) > 2:
            raise RuntimeError("can't start new thread")
        start(self)

    model, batches = deep(1), images(*[4] * 9)
    monkeypatch.setattr(threading.Thread, "start", starting)
    recalibrate(model, batches)
    monkeypatch.undo()
    assert gap(model, batches) < ROUNDING


def test_no_thread_and_no_tensor_is_left() -> None:
    model = deep(1)
    recalibrate(model, images(4, 4))
    gc.collect()
    threads = set(threading.enumerate())
    tensors = sum(isinstance(o, Tensor) for o in gc.get_objects())
    recalibrate(model, images(4, 4))
    with pytest.raises(BatchError):
        recalibrate(model, [*images(4, 4), torch.zeros(2, 5, 8, 8)])
    gc.collect()
    assert set(threading.enumerate()) <= threads
    assert sum(isinstance(o, Tensor) for o in gc.get_objects()) <= tensors


def test_a_disk_that_is_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A file system of its own would need root; a writer that fails after some bytes does what it does."""
    import pathlib

    opened = pathlib.Path.open

    def full(self: pathlib.Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = opened(self, mode, *args, **kwargs)
        if "w" in mode and self.suffix == ".bin":

            class Full:
                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *exception: object) -> None:
                    file.close()

                def write(self, data: Any) -> int:
                    raise OSError(28, "No space left on device")

            return Full()
        return file

    monkeypatch.setattr(pathlib.Path, "open", full)
    model = deep(1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BatchError, match=r"No space left on device.*larger memory="):
        recalibrate(model, images(8, 8), memory=10_000, cache=tmp_path)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_a_model_keeps_between_batches_come_back_from_disk(tmp_path: Any) -> None:
    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2, self.grid = nn.BatchNorm2d(3), nn.BatchNorm2d(3), None

        def forward(self, x: Tensor) -> Tensor:
            if self.grid is None:
                self.grid = torch.linspace(0, 1, 64).reshape(8, 8) * 1
            y = self.norm1(x + self.grid)
            return self.norm2(y * self.grid)

    model, batches = Grid(), images(8, 8, 8, 8)
    recalibrate(model, batches, memory=1000, cache=tmp_path)
    assert gap(model, batches) < ROUNDING


# -- models that are not a chain ---------------------------------------------------------------------------------------


class Forks(nn.Module):
    """Which norms a batch meets, and in which order, depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.a, self.c = (nn.BatchNorm2d(3) for _ in range(3))
        shuffle_affine(self)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 4:
            x = self.a(x).relu()
        if len(x) != 6:
            x = self.b(x).sigmoid()
        return self.c(x)


@pytest.mark.parametrize("options", [{}, {"memory": 0}])
def test_batches_may_take_different_ways(options: dict[str, Any]) -> None:
    model, batches = Forks(), images(3, 6, 3, 2, 8, 3, 6)
    result = recalibrate(model, batches, **options)
    assert gap(model, batches) < ROUNDING
    assert {layer.name: layer.batches for layer in result.layers} == {"a": 3, "b": 5, "c": 7}


class Crossing(nn.Module):
    """Some batches meet one norm first, some the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        shuffle_affine(self)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.a, self.b) if len(x) > 4 else (self.b, self.a)
        return self.last(second(first(x).sigmoid()).relu())


@pytest.mark.parametrize("options", [{}, {"memory": 0}])
def test_norms_that_come_in_both_orders_come_to_rest(options: dict[str, Any]) -> None:
    model, batches = Crossing(), images(3, 6, 3, 8)
    recalibrate(model, batches, **options)
    assert gap(model, batches) < 1e-5


def test_a_norm_called_several_times_comes_to_rest() -> None:
    torch.manual_seed(0)
    norm, inner = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.ReLU(), inner, nn.Conv2d(3, 3, 1), norm, nn.ReLU(), norm, nn.BatchNorm2d(3))
    shuffle_affine(model)
    batches = images(6, 5, 8)
    result = recalibrate(model, batches)
    assert gap(model, batches) < 1e-5
    shared = next(layer for layer in result.layers if layer.name == "0")
    assert (shared.batches, shared.calls) == (3, 9)
    assert norm.num_batches_tracked == 3


def test_a_norm_that_goes_round_in_circles_comes_to_rest() -> None:
    """What is large makes the next statistics small, and the other way round, for ever."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x) ** 7)

    torch.manual_seed(0)
    model, batches = Growing(), [torch.randn(8, 1), torch.randn(8, 1)]
    assert recalibrate(model, batches).notes == ()
    assert gap(model, batches) < 1e-4


def test_a_batch_that_never_meets_a_norm() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) if len(x) > 4 else x

    model, batches = Sometimes(), images(3, 8, 2, 6)
    assert recalibrate(model, batches).layers[0].batches == 2
    assert gap(model, [b for b in batches if len(b) > 4]) < ROUNDING


def test_parallel_branches_and_functional_norms() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("running_var", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.left(x) + self.right(x.square())
            return F.batch_norm(x.relu(), self.running_mean, self.running_var, training=self.training)

    model, batches = Branches(), images(4, 6)
    assert len(recalibrate(model, batches).layers) == 3
    assert gap(model, batches) < ROUNDING


# -- models that remember ----------------------------------------------------------------------------------------------


class Remembers(nn.Module):
    """Keeps something of the batch on itself, between two of its lines."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.skip = nn.BatchNorm2d(3), nn.BatchNorm2d(3), None

    def forward(self, x: Tensor) -> Tensor:
        self.skip = x.square()
        y = self.norm1(x)
        return self.norm2(y + self.skip[: len(y)].mean())


def test_batches_that_disturb_each_other_are_kept_apart() -> None:
    model, batches = Remembers(), images(4, 6, 8)
    result = recalibrate(model, batches)
    assert gap(model, batches) < ROUNDING
    assert "cannot wait side by side" in result.notes[0]
    assert "cannot wait" in str(result)


def test_batches_whose_disturbance_is_an_error_are_kept_apart() -> None:
    class Adds(Remembers):
        def forward(self, x: Tensor) -> Tensor:
            self.skip = x.square()
            return self.norm2(self.norm1(x) + self.skip)  # another size, and an error, after another batch

    model, batches = Adds(), images(4, 6, 8)
    recalibrate(model, batches)
    assert gap(model, batches) < ROUNDING


def test_an_error_of_the_model_itself_names_the_batch() -> None:
    with pytest.raises(BatchError, match=r"Sequential failed on batch 2 \(counting from 0\): RuntimeError"):
        recalibrate(deep(1), [*images(4, 4), torch.zeros(2, 5, 8, 8), *images(4)])


def test_a_failure_deep_in_the_model_is_not_looked_for_by_running_everything_again() -> None:
    class FailsOnFive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 5:
                raise ValueError("five")
            return x

    model, calls = deep(3), []
    model.insert(5, FailsOnFive())

    def counted(m: nn.Module, batch: Tensor) -> None:
        calls.append(len(batch))
        m(batch)

    with pytest.raises(BatchError, match=r"failed on batch 2 .*ValueError: five"):
        recalibrate(model, images(4, 4, 5, 4), forward=counted)
    assert calls == [4, 4, 5, 4, 5]


def test_a_model_that_writes_into_its_input_is_told_what_to_do() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    with pytest.raises(StateError, match=r"writes into its input in place.*batch\.clone"):
        recalibrate(model, images(4, 4))
    batches = images(4, 4)
    recalibrate(model, batches, forward=lambda m, batch: m(batch.clone()))
    assert gap(model, [b.clone() for b in batches]) < ROUNDING


def test_what_is_not_finite_names_batch_and_norm() -> None:
    bad = images(4)[0]
    bad[0, 0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"batch 1 .*: 1 met NaN or infinity.*The batch itself holds"):
        recalibrate(deep(1), [*images(4), bad])


def test_a_model_that_draws_random_numbers_draws_the_same_again() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for norm in self.norms:
                x = norm(x + torch.randn_like(x))
            return x

    model, batches = Noisy(), images(4, 6, 8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    recalibrate(model, batches)
    assert torch.equal(torch.get_rng_state(), state)
    apart = copy.deepcopy(model)
    recalibrate(apart, batches, memory=0)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), apart.buffers(), strict=True))


def test_a_model_that_never_does_the_same_twice_is_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls = nn.BatchNorm2d(3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.norm(x + self.calls)

    with pytest.raises(StateError, match="gives another result when the same batch is run again"):
        recalibrate(Counts(), images(4, 4))


def test_a_model_that_catches_everything() -> None:
    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                y = self.norm1(x)
            except BaseException:
                y = x
            return self.norm2(y)

    model, batches = Catches(), images(4, 6, 8)
    recalibrate(model, batches, memory=0)
    assert gap(model, batches) < ROUNDING


# -- surroundings ------------------------------------------------------------------------------------------------------


def test_autocast_the_default_device_and_context_variables_reach_the_model() -> None:
    from contextvars import ContextVar

    scale: ContextVar[float] = ContextVar("scale", default=1.0)
    seen: list[Any] = []

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            seen.append((y.dtype, torch.empty(0).device.type, scale.get()))
            return self.norm(y)

    model = Asks()
    scale.set(2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        recalibrate(model, [torch.randn(8, 3, device="cpu"), torch.randn(8, 3, device="cpu")])
    assert set(seen) == {(torch.bfloat16, "meta", 2.0)}


def test_compiled_scripted_and_wrapped_models() -> None:
    for wrap in (torch.compile, torch.jit.script, nn.DataParallel):
        model, batches = deep(1), images(4, 6)
        wrapped: Any = wrap(model)
        recalibrate(wrapped, batches)
        assert gap(model, batches) < 1e-5


def test_channels_last_and_half_precision() -> None:
    model, batches = deep(2), [b.contiguous(memory_format=torch.channels_last) for b in images(8, 6)]
    recalibrate(model, batches)
    assert gap(model, batches) < ROUNDING
    half = deep(1).bfloat16()
    low = [b.bfloat16() for b in images(8, 6)]
    recalibrate(half, low)
    assert gap(half, low) < 2**-8  # the buffers are bfloat16: half a unit of 2⁻⁷


def test_an_interrupt_leaves_the_model_and_no_thread() -> None:
    model = deep(1).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    threads = set(threading.enumerate())
    calls = []

    def interrupting(m: nn.Module, batch: Tensor) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        m(batch)

    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, images(4, 4, 4, 4), forward=interrupting)
    assert set(threading.enumerate()) <= threads
    assert all(m.training for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# -- knowing when to stop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_a_tolerance_ends_the_stream_early(order: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(150)]
    model = deep(1)
    result = recalibrate(model, batches, order=order, tolerance=0.06)
    assert 8 <= result.batches < 150
    assert max(layer.overall_uncertainty for layer in result.layers) <= 0.06
    assert result.needed is not None
    assert result.needed <= result.batches
    assert "Tolerance 0.06 reached" in str(result)
    strict = recalibrate(model, batches[:10], order=order, tolerance=1e-4)
    assert strict.batches == 10
    assert strict.needed is not None
    assert strict.needed > 10
    assert "not reached, for the stream ended" in " ".join(str(strict).split())


def test_a_single_batch_knows_nothing_of_its_errors() -> None:
    result = recalibrate(deep(1), images(8))
    assert result.layers[0].overall_uncertainty == torch.inf
    assert result.to_dict()["layers"][0]["uncertainty"] is None
    assert "cannot be told from a single batch" in str(result)
