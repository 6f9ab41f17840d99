"""Several processes measure what one would, end with the same bits, and fail together."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.statistics.processes import run
from torch import Tensor, distributed, nn

from batchnorm.errors import ArgumentTypeError, EmptyStreamError, StateError
from batchnorm.statistics import recalibrate

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.BatchNorm1d(3)
    )


def stream() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 4, generator=generator) + i % 2 for i, n in enumerate([8, 3, 8, 5, 1, 8, 8])]


# which batches each rank feeds: even, uneven, one rank without any
CUTS = {"uneven": [[0, 1, 2, 3, 4], [5], [6]], "empty": [[], [0, 1, 2, 3, 4, 5, 6], []]}


def bits(model: nn.Module) -> bytes:
    return b"".join(b.numpy().tobytes() for b in model.buffers())


def measure(rank: int, order: str, cut: str, options: dict[str, Any]) -> dict[str, Any]:
    model = network()
    mine = [stream()[i] for i in CUTS[cut][rank]]
    result = recalibrate(model, mine, order=order, process_group=distributed.group.WORLD, **options)
    return {
        "bits": bits(model),
        "batches": result.batches,
        "uncertainty": result.layers[-1].uncertainty.tolist(),
        "tracked": int(model[1].num_batches_tracked),
        "text": str(result),
    }


def fail(rank: int, order: str, how: str) -> dict[str, Any]:
    model = network().train()
    before = bits(model)
    batches: Any = stream()[rank:]
    if rank == 1:
        if how == "model":
            batches = [*batches[:2], torch.zeros(2, 9)]
        elif how == "nan":
            batches = [*batches[:2], torch.full((2, 4), torch.nan)]
        else:
            batches = killing(batches)
    try:
        recalibrate(model, batches, order=order, process_group=distributed.group.WORLD)
    except Exception as error:
        return {"error": repr(error), "untouched": bits(model) == before and all(m.training for m in model.modules())}
    return {"error": None, "untouched": False}


def killing(batches: list[Tensor]) -> Any:
    yield batches[0]
    time.sleep(0.5)  # the others wait for this one by now
    os.kill(os.getpid(), signal.SIGKILL)


def wrapped(rank: int) -> dict[str, Any]:
    model = nn.parallel.DistributedDataParallel(network())  # sends its buffers before each pass
    mine = [stream()[i] for i in CUTS["uneven"][rank]]
    recalibrate(model, mine, process_group=distributed.group.WORLD)
    return {"bits": bits(model), "synchronizes": model.require_forward_param_sync}


def alone_with_all_empty(rank: int) -> str:
    try:
        recalibrate(network(), [], process_group=distributed.group.WORLD)
    except EmptyStreamError as error:
        return str(error)
    return "no error"


def not_a_member(rank: int) -> str:
    group = distributed.new_group([0])
    if rank == 0:
        recalibrate(network(), stream(), process_group=group)
        return "measured"
    try:
        recalibrate(network(), stream(), process_group=group)
    except StateError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("cut", CUTS)
def test_all_ranks_end_with_the_same_bits_those_of_one_process(order: Any, cut: str, tmp_path: Path) -> None:
    answers = run(tmp_path, 3, measure, order, cut, {})
    assert {a["bits"] for a in answers} == {answers[0]["bits"]}
    alone = network()
    result = recalibrate(alone, stream(), order=order)
    theirs = torch.frombuffer(bytearray(answers[0]["bits"]), dtype=torch.uint8)
    assert {a["batches"] for a in answers} == {7}
    assert {a["tracked"] for a in answers} == {7}
    assert "3 processes" in answers[0]["text"]
    assert len(theirs) == len(bits(alone))
    model = network()
    start = 0
    for buffer in model.buffers():
        size = buffer.numel() * buffer.element_size()
        buffer.copy_(theirs[start : start + size].view(buffer.dtype).view_as(buffer))
        start += size
    for a, b in zip(model.buffers(), alone.buffers(), strict=True):
        # float64 sums in another order, rounded to float32 once
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(torch.float32).eps, atol=1e-7)
    # each batch is a group of its own on either side
    for answer in answers:
        torch.testing.assert_close(
            torch.tensor(answer["uncertainty"], dtype=torch.float64), result.layers[-1].uncertainty, rtol=1e-5, atol=0
        )


def test_a_wrapped_model_may_be_fed_streams_of_different_lengths(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = run(tmp_path / "plain", 3, measure, "sequential", "uneven", {})
    answers = run(tmp_path, 3, wrapped)
    assert {a["bits"] for a in answers} == {plain[0]["bits"]}
    assert all(a["synchronizes"] for a in answers)


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_a_tolerance_is_agreed_on(order: Any, tmp_path: Path) -> None:
    answers = run(tmp_path, 3, measure, order, "uneven", {"tolerance": 1e-3})
    assert {a["batches"] for a in answers} == {7}
    assert {a["bits"] for a in answers} == {answers[0]["bits"]}


@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("how", ["model", "nan", "killed"])
def test_if_one_fails_all_raise_and_none_is_changed(order: Any, how: str, tmp_path: Path) -> None:
    answers = run(tmp_path, 3, fail, order, how)
    if how == "killed":
        assert answers[1] is None
        answers = [answers[0], answers[2]]
        assert all("cannot be reached any more" in a["error"] for a in answers), answers
    else:
        assert ("failed on batch 2" if how == "model" else "batch 2 (counting from 0): 1 met NaN") in answers[1][
            "error"
        ]
        assert all("another process failed (rank 1: " in answers[r]["error"] for r in (0, 2)), answers
    assert all(a["untouched"] for a in answers), answers


def test_no_batch_anywhere(tmp_path: Path) -> None:
    assert all("expected at least one batch" in a for a in run(tmp_path, 2, alone_with_all_empty))


def test_a_process_outside_the_group(tmp_path: Path) -> None:
    answers = run(tmp_path, 2, not_a_member)
    assert answers[0] == "measured"
    assert "not a member" in answers[1]


def test_a_group_without_distributed_is_refused() -> None:
    with pytest.raises(StateError, match="not initialized"):
        recalibrate(network(), stream(), process_group=object())  # type: ignore[arg-type]


def test_what_is_no_group_is_refused(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ArgumentTypeError, match="got str"):
            recalibrate(network(), stream(), process_group="WORLD")  # type: ignore[arg-type]
        assert recalibrate(network(), stream(), process_group=distributed.group.WORLD).processes == 1
    finally:
        distributed.destroy_process_group()
