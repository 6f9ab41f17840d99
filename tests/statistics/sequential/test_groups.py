"""Small batches are joined where the model treats them alike, and nothing but the number of its calls changes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm.errors import BatchError, NonFiniteError
from batchnorm.statistics import recalibrate
from batchnorm.statistics.sequential import groups


def network() -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Tanh()]
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4)).double()


def images(number: int = 100, size: int = 2, tail: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [size] * number + [tail] * (tail > 0)
    return [
        torch.randn(n, 3, 7, 7, generator=generator, dtype=torch.float64) * (1 + i % 3) + i % 2
        for i, n in enumerate(sizes)
    ]


def measured(model: nn.Module, batches: Any, *, alone: bool = False, **options: Any) -> tuple[Any, nn.Module, int]:
    """The result, a measured copy of the model, and how often it was called."""
    twin, calls = copy.deepcopy(model), []
    forward = options.pop("forward", None) or (lambda m, batch: m(batch))

    def counted(m: nn.Module, batch: Any) -> Any:
        calls.append(1)
        return forward(m, batch)

    with pytest.MonkeyPatch.context() as patch:
        if alone:
            patch.setattr(groups, "FIRST_ALONE", 10**9)
        return recalibrate(twin, batches, forward=counted, **options), twin, len(calls)


def assert_alike(a: tuple[Any, nn.Module, int], b: tuple[Any, nn.Module, int], **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(dict(a[1].named_buffers()), dict(b[1].named_buffers()), **tolerance)
    for one, other in zip(a[0].layers, b[0].layers, strict=True):
        assert (one.name, one.batches, one.calls, one.values, one.single_calls) == (
            *(other.name, other.batches, other.calls, other.values),
            other.single_calls,
        )
        torch.testing.assert_close(one.uncertainty, other.uncertainty, **tolerance)


@pytest.mark.every(3)
@pytest.mark.parametrize("estimator", ["pooled", "within"])
@pytest.mark.parametrize(("size", "tail"), [(1, 0), (2, 1), (5, 3)])
def test_joined_batches_give_what_single_ones_give(size: int, tail: int, estimator: Any) -> None:
    batches = images(size=size, tail=tail)
    # a single value per channel has no variance within: the last norm then has nothing to measure
    model = network() if (size, estimator) != (1, "within") else nn.Sequential(*list(network())[:6])
    joined = measured(model, batches, estimator=estimator)
    alone = measured(model, batches, estimator=estimator, alone=True)
    assert_alike(joined, alone)
    assert joined[0].batches == len(batches)
    assert alone[2] == len(batches) + 1  # one is run again
    assert joined[2] < len(batches) / 2


def test_threads_do_not_grow_with_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    start, most = threading.Thread.start, [0]

    def starting(self: threading.Thread) -> None:
        start(self)
        most[0] = max(most[0], threading.active_count())

    monkeypatch.setattr(threading.Thread, "start", starting)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    before = threading.active_count()
    recalibrate(model, list(torch.randn(4000, 1, 2)))
    assert most[0] - before < 100


@pytest.mark.parametrize("options", [{"memory": 0}, {"memory": 200_000}, {"memory": 60_000, "cache": True}])
def test_joined_batches_that_do_not_fit_go_on_as_others_do(options: dict[str, Any], tmp_path: Any) -> None:
    if options.get("cache"):
        options = options | {"cache": tmp_path}
    batches = images()
    assert_alike(measured(network(), batches, **options), measured(network(), batches, alone=True))


# -- what batches may be -----------------------------------------------------------------------------------------------


def test_labels_are_not_joined_with_what_the_model_reads() -> None:
    batches = [(x, f"label {i}") for i, x in enumerate(images())]
    calls: list[int] = []
    model = network()
    model.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    recalibrate(model, batches)
    assert len(calls) < 50
    reference = measured(network(), images(), alone=True)
    torch.testing.assert_close(dict(model.named_buffers()), dict(reference[1].named_buffers()))


@pytest.mark.parametrize("scales", [[2.0], [1.0, 2.0, 3.0]])
def test_numbers_are_joined_only_if_they_are_equal(scales: list[float]) -> None:
    batches = [{"x": x, "scale": scales[i % len(scales)]} for i, x in enumerate(images())]

    def forward(model: nn.Module, batch: Any) -> Any:
        return model(batch["x"] * batch["scale"])

    joined = measured(network(), batches, forward=forward)
    assert_alike(joined, measured(network(), batches, forward=forward, alone=True))
    assert (joined[2] < 50) == (len(scales) == 1)


def test_tensors_of_another_length_are_not_joined() -> None:
    batches = [{"x": x, "shift": torch.full((3, 1, 1), float(i))} for i, x in enumerate(images(40))]

    def forward(model: nn.Module, batch: Any) -> Any:
        return model(batch["x"] + batch["shift"])

    joined = measured(network(), batches, forward=forward)
    assert_alike(joined, measured(network(), batches, forward=forward, alone=True))
    assert joined[2] == 41


# -- models that tell joined batches from single ones ------------------------------------------------------------------


class Before(nn.Module):
    """Does something of its own to a batch, then normalizes it."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change, self.inner = change, network()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self.change(x))
        return out


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x - x.mean(0),
    "tiny": lambda x: x - 1e-5 * x.sum(0),
    "statistics": lambda x: nn.functional.batch_norm(x, None, None, training=True),
    "first": lambda x: torch.cat([x[:1] * 2, x[1:]]),
    "last": lambda x: torch.cat([x[:-1], x[-1:] * 2]),
    "number": lambda x: x * len(x),
    "branch": lambda x: x * 2 if len(x) > 4 else x,
    "order": lambda x: x.cumsum(0),
    "halves": lambda x: torch.cat([x.flip(0), x]),
    "value": lambda x: x * 2 if float(x.sum()) > 0 else x,
    "whether": lambda x: torch.where(x.sum() > 0, x * 2, x),
    "chosen": lambda x: x[x.flatten(1).sum(1) > -1e9],
    "noise": lambda x: x + torch.randn_like(x),
    "fixed": lambda x: x.reshape(2, 3, 7, 7),
    "odd": lambda x: x[: len(x) - 1],
}


LIKE_ANOTHER = {"tiny", "last", "whether", "halves", "mean", "branch", "order", "chosen"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.sweep) if name in LIKE_ANOTHER else name for name in MIXES]
)
def test_batches_that_do_not_mix_well_are_run_one_by_one(name: str) -> None:
    model, batches = Before(MIXES[name]), images(60)
    joined = measured(model, batches)
    assert_alike(joined, measured(model, batches, alone=True))
    assert joined[0].notes == ()


def test_a_recurrent_model_with_the_time_first() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.norm = nn.GRU(3, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.rnn(x)
            out: Tensor = self.norm(y.reshape(-1, 4))
            return out

    batches = list(torch.randn(60, 5, 2, 3, generator=torch.Generator().manual_seed(0)))
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    assert_alike(measured(Recurrent(), batches), measured(Recurrent(), batches, alone=True), **tolerance)


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_failure_names_the_batch_and_not_the_group() -> None:
    def forward(model: nn.Module, batch: Tensor) -> Any:
        if bool((batch == 7).any()):
            raise ValueError("seven")
        return model(batch)

    model, batches = network(), images(60)
    batches[40][0, 0, 0, 0] = 7
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BatchError, match=r"failed on batch 40 .*ValueError: seven"):
        recalibrate(model, batches, forward=forward)
    batches[40][0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"batch 40 .*The batch itself holds"):
        recalibrate(model, batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_interrupt_in_a_group_leaves_no_thread() -> None:
    model, calls, threads = network(), [], set(threading.enumerate())

    def interrupted(m: nn.Module, batch: Tensor) -> Any:
        calls.append(len(batch))
        if len(batch) > 2:
            raise KeyboardInterrupt
        return m(batch)

    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, images(60), forward=interrupted)
    assert max(calls) > 2
    assert set(threading.enumerate()) <= threads


def test_half_precision_in_autocast() -> None:
    torch.manual_seed(0)
    model = network().float()
    batches = [x.float() for x in images()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        joined = measured(model, batches)
        assert joined[2] < 50
        assert_alike(joined, measured(model, batches, alone=True), rtol=0.02, atol=0.02)


class Dims(nn.Module):
    """Turns a whole batch down where one of its values is very large; in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where((x.abs() > 50).any(), 0.1 * x, x)


PLACES = [
    pytest.param(size, at, marks=() if (size, at) in ((1, 41), (4, 203)) else pytest.mark.sweep)
    for size in (1, 2, 4)
    for at in (41, 166, 203, 299)
]


@pytest.mark.every(2)
@pytest.mark.parametrize(("size", "at"), PLACES)
def test_one_batch_that_changes_its_neighbours_alone_is_not_joined(size: int, at: int) -> None:
    model, batches = nn.Sequential(Dims(), network()[:6]), images(300, size)
    batches[at] = batches[at] * 100
    assert_alike(measured(model, batches), measured(model, batches, alone=True))
