"""Two processes of a real trainer measure what one would, and strategies that cannot are refused by name.

Skipped where Lightning is not installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from batchnorm.errors import StateError
from batchnorm.statistics import recalibrate

SKIP = "Lightning is not installed (pip install lightning)"
pl = pytest.importorskip("lightning.pytorch", reason=SKIP)
if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

X = torch.randn(51, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 2.0, 9.0]) + 4
X = X.double()  # so that nothing hides in the rounding
EPS = torch.finfo(torch.float64).eps


def run(package: str, strategy: str, folder: Path, *scenarios: str) -> dict[str, tuple[Any, Any, Any]]:
    """Return for each scenario what both processes wrote, and the main one."""
    script = Path(__file__).with_name("two_processes.py")
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, script, package, strategy, folder, *scenarios],
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    read = lambda name, who: torch.load(folder / f"{name}-{who}.pt", weights_only=True)  # noqa: E731
    return {name: (read(name, 0), read(name, 1), read(name, "main")) for name in scenarios}


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, tuple[Any, Any, Any]], Path]:
    folder = tmp_path_factory.mktemp("forked")
    scenarios = ["whole", "averaged", "failing", "one norm", "apart", "one norm apart", "part of the data"]
    scenarios += ["few batches", "a list", "a loader"]
    return run("lightning.pytorch", "ddp_fork", folder, *scenarios), folder


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def assert_exact(state: dict[str, Tensor], x: Tensor = X) -> None:
    """Compare the first norm with the moments of its input, and all with one process that has the whole data."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2)).double()
    net.load_state_dict({name.removeprefix("net."): value for name, value in state.items()})
    recalibrate(net, [x])
    met = [net.eval()[:1](x), net[:4](x)]
    rounding = 0.0
    for name, values, linear, entering in (("net.1", met[0], net[0], x), ("net.4", met[1], net[3], net[:3](x))):
        std = values.std(0)
        # so much larger than their spread are the terms that are added up; what came in wrong grows as they do
        size = float(entering.abs().max() * linear.weight.abs().sum(1).max() / std.min())
        rounding = size * (len(x) * EPS + rounding)
        mean_off = (state[f"{name}.running_mean"] - values.mean(0)).abs() / std
        variance_off = (state[f"{name}.running_var"] / values.var(0) - 1).abs()
        assert max(mean_off.max(), variance_off.max()) <= rounding < 1e-9, name


def assert_whole(ranks: tuple[Any, Any, Any], folder: Path) -> None:
    first, second, main = ranks
    assert same(first["after"], second["after"])
    assert same(first["after"], main)  # brought back from rank 0
    assert [first["processes"], second["processes"]] == [2, 2]
    assert "2 processes" in second["text"]
    # four batches each, the last of two and of one sample: each sample once
    assert first["batches"] == second["batches"] == 8
    assert main["net.1.num_batches_tracked"] == main["net.4.num_batches_tracked"] == 8
    assert_exact(main)
    assert first["samples"] == second["samples"] == 26  # training goes on as before
    saved = torch.load(folder / "whole.ckpt", weights_only=True)["state_dict"]
    assert same(saved, main)


def test_both_processes_have_the_statistics_of_the_whole_data(forked: Any) -> None:
    answers, folder = forked
    assert_whole(answers["whole"], folder)


@pytest.mark.sweep
def test_under_the_other_name_in_processes_that_were_spawned(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning", reason=SKIP)
    assert_whole(run("pytorch_lightning", "ddp_spawn", tmp_path, "whole")["whole"], tmp_path)


def test_validation_sees_them_in_both(forked: Any) -> None:
    first, second, _ = forked[0]["whole"]
    assert len(first["validated"]) == 2
    for one, other in zip(first["validated"], second["validated"], strict=True):
        assert same(one, other)
        assert_exact(one)


def test_behind_an_average_in_both(forked: Any) -> None:
    first, second, main = forked[0]["averaged"]
    assert same(first["after"], second["after"])
    assert_exact(main)
    for each in (first, second):
        # the weights in the copy are the averaged ones, and so are the module's when training ends
        assert same(each["average"], main)
    saved = torch.load(forked[1] / "averaged.ckpt", weights_only=True)["state_dict"]
    assert same(saved, main)


def test_if_one_fails_both_raise_and_none_is_changed(forked: Any) -> None:
    first, second, _ = forked[0]["failing"]
    assert "another process failed (rank 1: BatchError: recalibrate: " in first["error"]
    assert "one process has no memory left" in second["error"]
    assert not same(first["before"], second["before"])  # each has what its last batch left
    for each in (first, second):
        assert same(each["before"], each["after"])


def test_norms_that_are_not_measured_become_those_of_rank_0(forked: Any) -> None:
    first, second, _ = forked[0]["one norm"]
    assert not torch.equal(first["before"]["net.1.running_var"], second["before"]["net.1.running_var"])
    assert same(first["after"], second["after"])
    assert torch.equal(second["after"]["net.1.running_var"], first["before"]["net.1.running_var"])
    assert not torch.equal(first["after"]["net.4.running_var"], first["before"]["net.4.running_var"])


def test_where_ddp_keeps_buffers_apart_all_norms_must_be_measured(forked: Any) -> None:
    for each in forked[0]["one norm apart"][:2]:
        assert (
            "StateError: RecalibrateCallback: net.1 is not among names=, and under broadcast_buffers" in each["refused"]
        )
    first, second, main = forked[0]["apart"]
    assert not same(first["before"], second["before"])
    assert same(first["after"], second["after"])
    assert_exact(main)


def test_a_sampler_of_the_users_own_is_divided_without_repetition(forked: Any) -> None:
    first, second, main = forked[0]["part of the data"]
    assert first["sampler"] == "DistributedSamplerWrapper"
    assert first["samples"] == second["samples"] == 9
    assert_exact(main, X[::3])  # 17 samples: nine and eight


def test_the_number_of_batches_is_that_of_each_process(forked: Any) -> None:
    assert [each["batches"] for each in forked[0]["few batches"][:2]] == [4, 4]


@pytest.mark.every(2)
@pytest.mark.parametrize(("name", "batches"), [("a list", 5), ("a loader", 11)])
def test_other_batches_are_divided_too(forked: Any, name: str, batches: int) -> None:
    first, second, main = forked[0][name]
    assert same(first["after"], second["after"])
    assert first["batches"] == batches
    assert_exact(main)


# -- which processes measure together --------------------------------------------------------------------------------


def trainer_of(strategy: Any, processes: int) -> Any:
    return SimpleNamespace(strategy=strategy, world_size=processes, callbacks=[])


def refuse(strategy: Any, processes: int, words: str) -> None:
    callback = import_module("batchnorm.integrations.lightning").RecalibrateCallback()
    with pytest.raises(StateError, match=words):
        callback.setup(trainer_of(strategy, processes), nn.Identity(), "fit")
    callback.setup(trainer_of(strategy, processes), nn.Identity(), "test")  # where nothing is measured


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("processes", [1, 4])
def test_strategies_that_divide_the_model_are_refused(package: str, name: str, processes: int) -> None:
    found = getattr(pytest.importorskip(f"{package}.strategies", reason=SKIP), name)
    own = type("MyStrategy", (found,), {})
    for kind in (found, own):  # without __init__: DeepSpeed's needs DeepSpeed
        refuse(object.__new__(kind), processes, f"strategy is {kind.__name__}, which divides the model itself among")


def test_processes_that_cannot_reach_each_other_are_refused() -> None:
    refuse(object.__new__(pl.strategies.XLAStrategy), 8, r"runs 8 processes under XLAStrategy; expected DDPStrategy")
    refuse(SimpleNamespace(), 2, r"runs 2 processes under SimpleNamespace; expected DDPStrategy")


def test_weights_that_differ_between_averagings_are_refused(tmp_path: Path) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        state = PostLocalSGDState(process_group=None, subgroup=None, start_localSGD_iter=8)
        refuse(pl.strategies.DDPStrategy(ddp_comm_state=state), 2, "under PostLocalSGD the weights")
    finally:
        distributed.destroy_process_group()


# -- each sample once --------------------------------------------------------------------------------------------------


def samples(processes: int, size: int, **options: Any) -> list[list[int]]:
    """Return what each process meets while it measures."""
    from batchnorm.integrations.lightning.processes import each_sample_once

    met = []
    for rank in range(processes):
        sampler = DistributedSampler(range(size), processes, rank, **options)  # type: ignore[arg-type]
        loader = DataLoader(TensorDataset(torch.arange(size)), batch_size=4, sampler=sampler)
        before = list(sampler)
        with each_sample_once(loader):
            met.append([int(value) for (batch,) in loader for value in batch])
        assert list(sampler) == before
    return met


@pytest.mark.parametrize(("processes", "size"), [(2, 10), (2, 11), (4, 13), (4, 2), (3, 1)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_what_a_sampler_repeats_is_left_out(processes: int, size: int, shuffle: bool) -> None:
    met = samples(processes, size, shuffle=shuffle)
    assert sorted(value for each in met for value in each) == list(range(size))


def test_what_a_sampler_drops_stays_dropped() -> None:
    assert [len(each) for each in samples(2, 11, drop_last=True)] == [5, 5]


def test_a_sampler_of_another_author_is_left_alone() -> None:
    from batchnorm.integrations.lightning.processes import each_sample_once

    class Own(DistributedSampler[Any]):
        def __iter__(self) -> Any:
            assert self.total_size == 4  # it relies on that
            return super().__iter__()

    loader = DataLoader(TensorDataset(X[:3]), sampler=Own(range(3), 2, 1))  # type: ignore[arg-type]
    with each_sample_once(loader):
        assert len(list(loader)) == 2


def test_the_sampler_is_as_before_after_an_exception() -> None:
    from batchnorm.integrations.lightning.processes import each_sample_once

    sampler = DistributedSampler(range(3), 2, 1)  # type: ignore[arg-type]
    loader = DataLoader(TensorDataset(X[:3]), sampler=sampler)
    with pytest.raises(TypeError, match="not iterable"), each_sample_once(loader):
        iter(sampler.num_samples)  # type: ignore[call-overload]
    assert (sampler.num_samples, sampler.total_size) == (2, 4)
