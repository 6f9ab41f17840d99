"""Files of pairs, and of populations, whose checksum is right and whose content is not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import BatchNormError, InputError, StateError
from batchnorm.files.tensor_file import read_tensors, write_tensors
from batchnorm.folding.writing.record import Pairs
from batchnorm.moments import Moments
from batchnorm.statistics.population import LayerPopulation, Population

FORMAT = "batchnorm-pairs-1"


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    ).eval()


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    result = batchnorm.fold(build(), torch.randn(2, 3, 9, 9))
    path = tmp_path_factory.mktemp("pairs") / "pairs.safetensors"
    result.save_pairs(path)
    return result.model, path


def paths_in(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(found for key, item in items for found in paths_in(item, (*way, key)))]


def put(value: Any, way: tuple[Any, ...], new: Any) -> None:
    for key in way[:-1]:
        value = value[key]
    if new is None.__class__:
        del value[way[-1]]
    else:
        value[way[-1]] = new


def test_every_part_that_is_something_else_is_an_error_of_ours_and_changes_nothing(
    folded: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    """Each place of the text in turn is missing, or holds each of a dozen other things."""
    model, path = folded
    tensors, text = read_tensors(path, FORMAT, "pairs")
    about = json.loads(text)
    states = [copy.deepcopy(m.state_dict()) for m in (model, build())]
    others = [None.__class__, None, 0, -1, 2**40, 1.5, "", "no.such", "0", [], ["0"], {}, {"0": "1"}, True]
    told = accepted = 0
    for way in paths_in(about)[1:]:
        for other in others:
            changed = copy.deepcopy(about)
            put(changed, way, other)
            write_tensors(tmp_path / "p", FORMAT, tensors, json.dumps(changed))
            for use in (lambda p: batchnorm.unfold(model, p), lambda p: batchnorm.refold(build(), p)):
                try:
                    use(tmp_path / "p")
                    accepted += 1
                except BatchNormError:
                    told += 1
    assert told > 3 * accepted
    for before, module in zip(states, (model, build()), strict=True):
        assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("part", ["added", "norms", "stays", "same", "digests", "bordered", "ties", "moved"])
def test_a_missing_part_is_told(folded: tuple[nn.Module, Path], tmp_path: Path, part: str) -> None:
    tensors, text = read_tensors(folded[1], FORMAT, "pairs")
    about = json.loads(text)
    del about[part]
    write_tensors(tmp_path / "p", FORMAT, tensors, json.dumps(about))
    with pytest.raises(InputError, match=f"expected the pairs of a fold, .*; its part '{part}' is missing"):
        Pairs.load(tmp_path / "p")


@pytest.mark.parametrize("shape", [(1,), (4, 3, 3), (4, 3, 3, 1), (0,)])
def test_a_weight_of_another_shape_is_told(
    folded: tuple[nn.Module, Path], tmp_path: Path, shape: tuple[int, ...]
) -> None:
    model, path = folded
    tensors, text = read_tensors(path, FORMAT, "pairs")
    write_tensors(tmp_path / "p", FORMAT, tensors | {"parameters/0.weight": torch.zeros(shape)}, text)
    with pytest.raises(StateError, match=r"unfold: expected 0\.weight of shape \(4, 3, 3, 3\)"):
        batchnorm.unfold(model, tmp_path / "p")


@pytest.mark.parametrize("key", ["norms/1/weight", "norms/1/running_var"])
@pytest.mark.parametrize("tensor", [torch.zeros(1), torch.zeros(4, 2), None])
def test_a_norm_whose_tensors_do_not_fit_is_told(
    folded: tuple[nn.Module, Path], tmp_path: Path, key: str, tensor: torch.Tensor | None
) -> None:
    model, path = folded
    tensors, text = read_tensors(path, FORMAT, "pairs")
    del tensors[key]
    write_tensors(tmp_path / "p", FORMAT, tensors if tensor is None else tensors | {key: tensor}, text)
    with pytest.raises(InputError, match="a module in it cannot be built"):
        batchnorm.unfold(model, tmp_path / "p")


def test_the_file_is_the_same_each_time(folded: tuple[nn.Module, Path], tmp_path: Path) -> None:
    pairs = Pairs.load(folded[1])
    for name in "abcd":
        assert pairs.save(tmp_path / name).read_bytes() == folded[1].read_bytes()


def population() -> Population:
    ones = torch.ones(3, dtype=torch.float64)
    return Population({"bn": LayerPopulation(Moments(ones, ones, ones), ones, ones, 2)})


@pytest.mark.parametrize("part", ["count", "mean", "m2", "mean_error", "variance_error", "batches"])
@pytest.mark.parametrize("tensor", [None, torch.zeros(2, dtype=torch.float64), torch.zeros(3), torch.zeros(3, 1)])
def test_a_population_that_is_not_whole_is_told(tmp_path: Path, part: str, tensor: torch.Tensor | None) -> None:
    path = population().save(tmp_path / "p")
    assert Population.load(path).layers["bn"].batches == 2
    tensors, _ = read_tensors(path, "batchnorm-population-1", "one")
    del tensors[f"bn/{part}"]
    write_tensors(path, "batchnorm-population-1", tensors if tensor is None else tensors | {f"bn/{part}": tensor})
    with pytest.raises(InputError, match=r"expected a population that Population\.save wrote; of 'bn'"):
        Population.load(path)
