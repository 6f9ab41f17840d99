"""What models hold, by name: each tensor once, statistics as pairs, and a sentence where two do not fit together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from batchnorm.errors import BatchNormError, InputError, NonFiniteError, StateError, UnknownNameError
from batchnorm.statistics.merge_sources import (
    Source,
    StatisticsPair,
    counts_of_averages,
    entries_of,
    source_of,
    statistics_of,
)


class Net(nn.Module):
    """Two tied layers, a norm, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.bn = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)
        self.two.weight = self.one.weight
        self.register_buffer("cache", torch.ones(3), persistent=False)


def test_a_tensor_is_one_entry_however_many_names_it_has() -> None:
    entries = {entry.name: entry for entry in entries_of(Net())}
    assert list(entries) == [
        *("one.weight", "bn.weight", "bn.bias"),
        *("cache", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"),
    ]
    tied = entries["one.weight"]
    assert (tied.names, tied.is_buffer, tied.persistent) == (("one.weight", "two.weight"), False, True)
    assert (entries["cache"].is_buffer, entries["cache"].persistent) == (True, False)
    assert (entries["bn.running_var"].floating, entries["bn.num_batches_tracked"].floating) == (True, False)


def test_tensors_without_values_are_refused_by_name() -> None:
    with pytest.raises(StateError, match=r"merge: weight has no value yet. Run the model once"):
        entries_of(nn.LazyLinear(2))
    with pytest.raises(StateError, match=r"merge: 0.weight is on the meta device.*Load the weights first"):
        entries_of(nn.Sequential(nn.Linear(2, 2, device="meta")))


class Buffers(nn.Module):
    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def test_running_statistics_are_pairs_of_buffers() -> None:
    assert statistics_of(Net()) == [
        StatisticsPair("bn", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked", 1e-5)
    ]
    assert statistics_of(nn.BatchNorm1d(2, eps=0.5))[0] == StatisticsPair(
        "", "running_mean", "running_var", "num_batches_tracked", 0.5
    )
    mine = Buffers(stem_running_mean=torch.zeros(2), stem_running_var=torch.ones(2))
    assert statistics_of(nn.Sequential(mine)) == [
        StatisticsPair("0.stem", "0.stem_running_mean", "0.stem_running_var", None, 0.0)
    ]


@pytest.mark.parametrize(
    "buffers",
    [
        {"running_mean": torch.zeros(2)},
        {"running_mean": torch.zeros(2), "running_var": torch.ones(3)},
        {"running_mean": torch.zeros(2).long(), "running_var": torch.ones(2).long()},
        {"mean": torch.zeros(2), "var": torch.ones(2)},
    ],
)
def test_a_name_alone_makes_no_statistics(buffers: dict[str, Tensor]) -> None:
    assert statistics_of(Buffers(**buffers)) == []


def test_a_norm_that_two_places_share_is_one_pair() -> None:
    norm = nn.BatchNorm1d(2)
    assert [pair.name for pair in statistics_of(nn.Sequential(norm, nn.ReLU(), norm))] == ["0"]


def test_counts_of_averaged_models() -> None:
    assert counts_of_averages(AveragedModel(nn.Linear(2, 2))) == {"n_averaged"}
    assert counts_of_averages(nn.Sequential(AveragedModel(nn.Linear(2, 2)))) == {"0.n_averaged"}
    assert counts_of_averages(nn.Linear(2, 2)) == set()


def taken(given: Any, base: nn.Module | None = None) -> Source:
    base = base or Net()
    return source_of("models[1]", given, base, entries_of(base))


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: net.state_dict(), nn.DataParallel])
def test_values_of_models_and_state_dicts_by_first_names(wrap: Callable[[nn.Module], Any]) -> None:
    net = Net()
    with torch.no_grad():
        net.one.weight.fill_(7)
        net.cache.fill_(5)
    values = taken(wrap(net)).values
    assert values["one.weight"].tolist() == [[7, 7], [7, 7]]
    assert "two.weight" not in values
    is_whole = isinstance(wrap(net), nn.Module)
    assert values["cache"].tolist() == [5 if is_whole else 1] * 3  # no state dict holds it


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    state = {key: value.clone() for key, value in Net().state_dict().items()}
    change(state)
    return state


def other_eps() -> nn.Module:
    net = Net()
    net.bn.eps = 0.1
    return net


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (changed(lambda s: s.pop("bn.weight")), UnknownNameError, r"models\[1\] has no 'bn.weight'; did you mean"),
        (changed(lambda s: s.update(x=torch.zeros(1))), UnknownNameError, "holds 'x', which the merged model does not"),
        (
            changed(lambda s: s.update({"bn.wieght": torch.zeros(1), "y": torch.zeros(1)})),
            UnknownNameError,
            r"'bn.wieght' \(and 1 more\), .*did you mean 'bn.weight'",
        ),
        (changed(lambda s: s.update({"bn.bias": torch.zeros(3)})), InputError, r"bn.bias has shape \(3,\) in models"),
        (
            changed(lambda s: s.update({"bn.bias": torch.zeros(2).double()})),
            InputError,
            r"bn.bias is torch.float64 in models\[1\] and torch.float32 in the merged model. Cast one of them",
        ),
        (changed(lambda s: s.update({"bn.bias": torch.zeros(2, device="meta")})), StateError, "on the meta device"),
        (
            changed(lambda s: s["two.weight"].add_(1)),
            StateError,
            "one.weight and two.weight are one tensor in the merged model and have two values",
        ),
        (other_eps(), StateError, r"bn: eps is 0.1 in models\[1\] and 1e-05 in the merged model"),
    ],
)
def test_what_does_not_fit_is_told(given: Any, error: type[BatchNormError], said: str) -> None:
    with pytest.raises(error, match=said):
        taken(given)


def test_tied_tensors_need_one_of_their_names_only() -> None:
    assert "one.weight" in taken(changed(lambda state: state.pop("one.weight"))).values
    assert "one.weight" in taken(changed(lambda state: state.update(note="text"))).values  # no tensor: nothing to merge


def test_values_that_can_be_no_variance_are_told() -> None:
    values = {"ok": torch.tensor([0.0, 2.0]), "negative": torch.tensor([1.0, -0.5]),
              "nan": torch.tensor([torch.nan, 1.0, torch.inf]), "empty": torch.zeros(0)}  # fmt: skip
    source = Source("models[0]", values)
    source.require_variance("ok")
    source.require_variance("empty")
    with pytest.raises(StateError, match=r"models\[0\]: negative reaches -0.5, and no variance is negative"):
        source.require_variance("negative")
    for require in (source.require_variance, source.require_finite):
        with pytest.raises(NonFiniteError, match=r"nan holds NaN or infinity in 2 of its 3 values"):
            require("nan")
