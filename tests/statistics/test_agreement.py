"""Processes that do not measure the same network in the same way are told so, all of them, before they work."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.statistics.processes import run
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from batchnorm.nn import freeze
from batchnorm.statistics import recalibrate, update_bn

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")


def network(*, norms: int = 2, width: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(4, width)]
    for _ in range(norms):
        layers += [nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)


class Functional(nn.Module):
    """A norm without a module, and buffers that no norm is given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))
        self.register_buffer("centre", torch.zeros(4))
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, training=self.training)  # type: ignore[arg-type]
        return y * self.scale + self.centre  # type: ignore[operator]


def stream(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(n, 4, generator=generator) for n in ([8, 3] if rank else [5, 8, 2])]


def bits(model: nn.Module) -> bytes:
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)]
    return b"".join(t.detach().numpy().tobytes() for t in tensors)


def stepped(model: nn.Module, rank: int) -> nn.Module:
    """Return the model after a step of training, as DistributedDataParallel leaves it: buffers of each process."""
    with torch.no_grad():
        model.train()(torch.randn(16, 4, generator=torch.Generator().manual_seed(100 + rank)) * 3 + 5)
    return model


@torch.no_grad()
def changed(model: nn.Module, name: str, change: Callable[[Tensor], Any]) -> nn.Module:
    change(model.get_parameter(name) if name in dict(model.named_parameters()) else model.get_buffer(name))
    return model


def half_frozen(rank: int) -> nn.Module:
    model = network().train()
    if rank == 1:
        model[1].eval()
    return model


def with_frozen(rank: int) -> nn.Module:
    model = network()
    if rank == 1:
        freeze(model, "1")
    return model


def with_eps(eps: float) -> nn.Module:
    model = network()
    model[1].eps = eps
    return model


def with_tanh() -> nn.Module:
    return nn.Sequential(*[nn.Tanh() if isinstance(m, nn.ReLU) else m for m in network()])


def renamed(rank: int) -> nn.Module:
    model = nn.Sequential()
    for name in ("a", "b") if rank == 0 else ("b", "a"):
        model.add_module(name, nn.BatchNorm1d(4))
    return model


# what each process brings: the model of a rank, its arguments, and what both are told
Case = tuple[Callable[[int], Any], Callable[[int], dict[str, Any]], str]
PLAIN: Callable[[int], nn.Module] = lambda rank: network()  # noqa: E731
NOTHING: Callable[[int], dict[str, Any]] = lambda rank: {}  # noqa: E731

DISAGREEMENTS: dict[str, Case] = {
    "order": (
        PLAIN,
        lambda r: {"order": ["sequential", "parallel"][r % 2]},
        "order='sequential' in rank 0 and order='parallel' in rank 1",
    ),
    "estimator": (
        PLAIN,
        lambda r: {"estimator": ["pooled", "within"][r % 2]},
        "estimator='pooled' in rank 0 and estimator='within' in rank 1",
    ),
    "tolerance": (
        PLAIN,
        lambda r: {"tolerance": [None, 0.1][r % 2]},
        "tolerance=None in rank 0 and tolerance=0.1 in rank 1",
    ),
    "memory": (
        PLAIN,
        lambda r: {"memory": ["1GB", "2GB"][r % 2]},
        "memory=1000000000.0 in rank 0 and memory=2000000000.0 in rank 1",
    ),
    "cache": (PLAIN, lambda r: {"cache": [None, "."][r % 2]}, "cache=None in rank 0 and cache='a folder' in rank 1"),
    "names": (
        PLAIN,
        lambda r: {"names": [["1", "4"], "4"][r % 2]},
        "1 is measured, with eps=1e-05 in rank 0 and left as it is (not among names=)",
    ),
    "frozen by hand": (half_frozen, NOTHING, r"1 is measured, .* and left as it is \(frozen by hand: in eval mode"),
    "frozen": (with_frozen, NOTHING, "1 is BatchNorm1d in rank 0 and FrozenBatchNorm1d in rank 1"),
    "weights": (
        lambda r: changed(network(), "0.weight", lambda t: t.mul_(1 + r % 2)),
        NOTHING,
        "the values of 0.weight differ between rank 0 and rank 1",
    ),
    "a sign of zero": (
        lambda r: changed(network(), "1.bias", lambda t: t.mul_(1 - 2 * (r % 2))),
        NOTHING,
        "the values of 1.bias differ",
    ),
    "unmeasured buffers": (
        lambda r: stepped(network(), r),
        lambda r: {"names": "4"},
        "the values of 1.running_mean, which is not measured, differ",
    ),
    "a class": (lambda r: network() if r % 2 == 0 else with_tanh(), NOTHING, "2 is ReLU in rank 0 and Tanh in rank 1"),
    "the model's class": (
        lambda r: network() if r % 2 == 0 else nn.ModuleList(network()),
        NOTHING,
        "the model is Sequential in rank 0 and ModuleList in rank 1",
    ),
    "a wrapper": (
        lambda r: network() if r % 2 == 0 else nn.Sequential(network()),
        NOTHING,
        "0 is Linear in rank 0 and Sequential in rank 1",
    ),
    "dtype": (
        lambda r: network().to([torch.float32, torch.float64][r % 2]),
        lambda r: {"forward": lambda m, b: m(b.to(m[0].weight.dtype))},
        "0.weight is float32 of shape (3, 4) in rank 0 and float64 of shape (3, 4) in rank 1",
    ),
    "shape": (
        lambda r: network(width=3 + r % 2),
        NOTHING,
        "0.weight is float32 of shape (3, 4) in rank 0 and float32 of shape (4, 4) in rank 1",
    ),
    "number of norms": (
        lambda r: network(norms=2 + r % 2),
        NOTHING,
        r"rank 0 has nothing where rank 1 has 7 \(BatchNorm1d\)",
    ),
    "no norms": (
        lambda r: network(norms=2 * (r % 2)),
        NOTHING,
        r"rank 0 has nothing where rank 1 has 1 \(BatchNorm1d\)",
    ),
    "order of norms": (renamed, NOTHING, r"rank 0 has a \(BatchNorm1d\) where rank 1 has b \(BatchNorm1d\)"),
    "eps": (
        lambda r: with_eps([1e-5, 1e-3][r % 2]),
        NOTHING,
        "1 is measured, with eps=1e-05 in rank 0 and measured, with eps=0.001 in rank 1",
    ),
    "buffers near a functional norm": (
        lambda r: changed(Functional(), "scale", lambda t: t.mul_(1 + r % 2)),
        NOTHING,
        "the values of scale, which is not measured, differ",
    ),
}


def hostile(rank: int) -> Any:
    raise OSError("no such disk")


class NoLength:
    def __iter__(self) -> Any:
        raise OSError("no such file")


# an error in rank 1 alone, at every stage there is, and what the others hear of it
ERRORS: dict[str, tuple[Callable[[int], Any], Callable[[int], dict[str, Any]], str]] = {
    "model": (
        lambda r: network() if r != 1 else "network",
        NOTHING,
        "ArgumentTypeError: recalibrate: expected a torch.nn.Module",
    ),
    "order": (
        PLAIN,
        lambda r: {"order": "sequential" if r != 1 else "paralel"},
        "UnknownNameError: recalibrate: order='paralel'",
    ),
    "tolerance": (PLAIN, lambda r: {"tolerance": 0.1 if r != 1 else -1}, "ShapeError: recalibrate: tolerance=-1"),
    "stream": (
        PLAIN,
        lambda r: {"batches": torch.zeros(3, 4)} if r == 1 else {},
        "ArgumentTypeError: recalibrate: expected batches",
    ),
    "memory": (
        PLAIN,
        lambda r: {"memory": "1GB" if r != 1 else "much"},
        "ArgumentTypeError: recalibrate: memory='much'",
    ),
    "names": (PLAIN, lambda r: {"names": "1" if r != 1 else "nowhere"}, "UnknownNameError: 'nowhere'"),
    "lazy": (
        lambda r: network() if r != 1 else nn.Sequential(nn.LazyBatchNorm1d()),
        NOTHING,
        "StateError: recalibrate: 0.weight has no size yet",
    ),
    "loader": (
        PLAIN,
        lambda r: {"batches": NoLength()} if r == 1 else {},
        "BatchError: recalibrate: the loader failed to give batch 0",
    ),
    "forward": (
        PLAIN,
        lambda r: {"forward": hostile} if r == 1 else {},
        "BatchError: recalibrate: Sequential failed on batch 0",
    ),
    "too few values": (
        PLAIN,
        lambda r: {"batches": [torch.full((2, 4), torch.inf)]} if r == 1 else {},
        "NonFiniteError: recalibrate: batch 0",
    ),
    "cache": (PLAIN, lambda r: {"cache": "." if r != 1 else "/proc/no such folder"}, "cache"),
}


def attempt(rank: int, make: Callable[[int], Any], arguments: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    model = make(rank)
    before = bits(model) if isinstance(model, nn.Module) else b""
    options = {"batches": stream(rank), **arguments(rank)}
    try:
        recalibrate(model, options.pop("batches"), process_group=distributed.group.WORLD, **options)
        error = None
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {"error": error, "untouched": not isinstance(model, nn.Module) or bits(model) == before}


def attempts(rank: int, cases: str) -> dict[str, dict[str, Any]]:
    """Go through the cases with one group: it is as good as new after each."""
    chosen = {"disagreements": DISAGREEMENTS, "errors": ERRORS}[cases]
    found = {name: attempt(rank, make, arguments) for name, (make, arguments, _) in chosen.items()}
    found["measured after all that"] = attempt(rank, PLAIN, NOTHING)
    return found


@pytest.fixture(scope="module")
def disagreeing(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run(tmp_path_factory.mktemp("disagreeing"), 3, attempts, "disagreements")


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run(tmp_path_factory.mktemp("failing"), 3, attempts, "errors")


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_what_differs_is_named_in_every_process(disagreeing: list[Any], case: str) -> None:
    answers = [answer[case] for answer in disagreeing]
    words = DISAGREEMENTS[case][2]
    for answer in answers:
        assert answer["error"] is not None
        assert answer["error"].startswith("StateError: recalibrate: the processes "), answer
        assert words in answer["error"] or re.search(words, answer["error"]), answer
        assert answer["error"] == answers[0]["error"]
        assert answer["untouched"]


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_in_one_process_reaches_all(failing: list[Any], case: str) -> None:
    answers, words = [answer[case] for answer in failing], ERRORS[case][2]
    assert words in answers[1]["error"], answers
    for rank in (0, 2):
        assert answers[rank]["error"].startswith("BatchError: recalibrate: another process failed (rank 1: "), answers
        assert words.split(":")[0] in answers[rank]["error"], answers
    assert all(answer["untouched"] for answer in answers), answers


def test_the_group_is_as_good_as_new_afterwards(disagreeing: list[Any], failing: list[Any]) -> None:
    for answer in (*disagreeing, *failing):
        assert answer["measured after all that"]["error"] is None


# -- buffers that differ, where it is known which count ----------------------------------------------------------------


def agreeing(rank: int) -> dict[str, Any]:
    group = distributed.group.WORLD
    answers: dict[str, Any] = {}

    # DistributedDataParallel: its buffers are those of rank 0
    wrapped = DistributedDataParallel(network())
    stepped(wrapped.module, rank)
    before = bits(wrapped)
    result = recalibrate(wrapped, stream(rank), names="module.4", process_group=group)
    answers["wrapped"] = {"before": before, "after": bits(wrapped), "text": str(result), "notes": result.notes}
    answers["state"] = {name: value.clone() for name, value in wrapped.module.state_dict().items()}
    result.undo()
    answers["wrapped"]["undone"] = bits(wrapped)
    try:
        recalibrate(wrapped, [*stream(rank), torch.zeros(2, 9)], names="module.4", process_group=group)
    except Exception as error:
        answers["wrapped"]["failed"] = type(error).__name__
    answers["wrapped"]["failed bits"] = bits(wrapped)

    # buffers that are measured may differ, those of functional norms too, and those that nobody shares
    model = stepped(network(), rank)
    recalibrate(model, stream(rank), process_group=group, order="parallel")
    answers["measured"] = bits(model)
    functional = stepped(Functional(), rank)
    recalibrate(functional, stream(rank), process_group=group)
    answers["functional"] = bits(functional)
    single = stepped(network(), rank)  # the first batch is normalized by what is stored: rank 0's
    recalibrate(single, [x[:1] for x in stream(rank)], process_group=group, order="parallel")
    answers["single"] = bits(single)

    own = network()
    own.register_buffer("seed", torch.tensor(rank))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(own, ["seed"])
    recalibrate(own, stream(rank), process_group=group)
    answers["own"] = (int(own.seed), bits(own[1]))

    # what differs in memory only
    channels = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    torch.manual_seed(0)
    for parameter in channels.parameters():
        nn.init.normal_(parameter)
    if rank == 1:
        channels.to(memory_format=torch.channels_last)
    images = [x[:, :, None, None].expand(-1, -1, 5, 5) for x in stream(rank)]
    recalibrate(channels, images, process_group=group)
    answers["layout"] = bits(channels[1])
    return answers


@pytest.fixture(scope="module")
def agreed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    answers = run(tmp_path_factory.mktemp("agreed"), 2, agreeing)
    assert all("traceback" not in answer for answer in answers), answers[0].get("traceback", answers[1])
    return answers


def test_under_ddp_norms_that_are_not_measured_become_those_of_rank_0(agreed: list[Any]) -> None:
    first, second = (answer["wrapped"] for answer in agreed)
    assert first["before"] != second["before"]
    assert first["after"] == second["after"]
    for answer in (first, second):
        assert len(answer["notes"]) == 1
        assert "module.1.running_mean, module.1.running_var" in answer["notes"][0]
        assert answer["notes"][0].split(" (")[0] in " ".join(answer["text"].split())
        assert answer["undone"] == answer["failed bits"] == answer["before"]
        assert answer["failed"] in ("BatchError", "StateError")


def test_it_is_what_one_process_measures_with_the_buffers_of_rank_0(agreed: list[Any]) -> None:
    alone = stepped(network(), 0)
    recalibrate(alone, [*stream(0), *stream(1)], names="4")
    for name, value in alone.state_dict().items():
        # the same sums in float64 in another order, rounded once
        torch.testing.assert_close(agreed[1]["state"][name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["measured", "functional", "single", "layout"])
def test_what_is_measured_may_differ_before(agreed: list[Any], case: str) -> None:
    assert agreed[0][case] == agreed[1][case]


def test_what_ddp_ignores_is_each_processs_own(agreed: list[Any]) -> None:
    assert [answer["own"][0] for answer in agreed] == [0, 1]
    assert agreed[0]["own"][1] == agreed[1]["own"][1]


# -- the other verbs ---------------------------------------------------------------------------------------------------


def averaging(rank: int) -> dict[str, Any]:
    group = distributed.group.WORLD
    answers: dict[str, Any] = {"unlike": None}
    try:
        update_bn(stream(rank), network(norms=rank), process_group=group)
    except Exception as error:
        answers["unlike"] = f"{type(error).__name__}: {error}"
    answers["none"] = len(update_bn(stream(rank), network(norms=0), process_group=group).layers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recalibrate(network(), stream(rank))
        update_bn(stream(rank), network())
        answers["alone"] = [str(each.message) for each in caught]
        recalibrate(network(), stream(rank), process_group=group)
        answers["together"] = len(caught) - len(answers["alone"])
    return answers


def test_update_bn_and_processes_that_measure_alone(tmp_path: Path) -> None:
    for answer in run(tmp_path, 2, averaging):
        assert "rank 0 has nothing where rank 1 has 1 (BatchNorm1d)" in answer["unlike"], answer
        assert answer["none"] == 0
        assert len(answer["alone"]) == 2
        assert all("pass process_group=torch.distributed.group.WORLD" in text for text in answer["alone"])
        assert answer["together"] == 0
