"""Files of pairs, and of populations, whose checksum is right and whose content is not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.json_places import MISSING, paths_in, put
from torch import nn
from torch.nn.utils import parametrizations

import batchnorm
from batchnorm.errors import BatchNormError, InputError, StateError
from batchnorm.files.tensor_file import read_tensors, write_tensors
from batchnorm.folding.writing.record import FoldRecord
from batchnorm.moments import Moments
from batchnorm.statistics.population import LayerPopulation, Population

FORMAT = "batchnorm-pairs-1"


def build() -> nn.Module:
    """A norm before a padded convolution, one behind a layer that computes its weight, and multiply-adds."""
    torch.manual_seed(0)
    computed = parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    front = [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(0.2)]
    model = nn.Sequential(*front, computed, nn.BatchNorm2d(4), nn.Tanh(), nn.BatchNorm2d(4), nn.ReLU()).eval()
    model[0].running_mean.fill_(1)
    return model


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    result = batchnorm.fold(build(), X, borders=True, fuse=True)
    path = tmp_path_factory.mktemp("pairs") / "pairs.safetensors"
    result.save_pairs(path)
    return result.model, path


FEW = [MISSING, "null", "true", "-1", "1e999", '""', "[]", "{}"]
MANY = ["1.5", "NaN", str(2**40), '".."', '"no.such"', '"0"', '"load"',
          r'"\ud800"', '["0"]', '{"0": "1"}']  # fmt: skip


def use_both(model: nn.Module, path: Path) -> int:
    """Give a file to both verbs, and return how many take it: then their model runs; else the given one is the same."""
    taken = 0
    for verb, given, more in ((batchnorm.unfold, model, {"like": build()}), (batchnorm.refold, build(), {})):
        before, shown = copy.deepcopy(given.state_dict()), repr(given)
        try:
            result = verb(given, path, inplace=True, **more)
        except BatchNormError:
            assert repr(given) == shown
            assert all(torch.equal(before[key], tensor) for key, tensor in given.state_dict().items())
        else:
            result(X)
            taken += 1
    return taken


# in make test each place holds one of the few, another in the next place; all of them in the sweeps
@pytest.mark.parametrize("others", ["one", *(pytest.param(x, marks=pytest.mark.sweep) for x in ("few", "many"))])
def test_every_part_that_is_something_else_is_an_error_of_ours_and_changes_nothing(
    folded: tuple[nn.Module, Path], tmp_path: Path, others: str
) -> None:
    """Each place of the text in turn is missing, or holds each of several other things."""
    model, path = folded
    tensors, text = read_tensors(path, FORMAT, "pairs")
    about = json.loads(text)
    tried = taken = 0
    for number, way in enumerate(paths_in(about)[1:]):
        for other in {"one": [FEW[number % len(FEW)]], "few": FEW, "many": MANY}[others]:
            write_tensors(tmp_path / "p", FORMAT, tensors, put(about, way, other))
            taken += use_both(copy.deepcopy(model), tmp_path / "p")
            tried += 2
    assert tried > 5 * taken


ODD = {
    "NaN": lambda t: torch.full_like(t, float("nan")),
    "infinite": lambda t: torch.full_like(t, float("inf")),
    "whole": lambda t: t.to(torch.int8),
    "truth": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "eight bits": lambda t: t.to(torch.float8_e4m3fn),
    "empty": lambda t: t[:0],
}


@pytest.mark.every(3)
@pytest.mark.parametrize("odd", ODD)
def test_tensors_of_other_values_and_types_are_told(folded: tuple[nn.Module, Path], tmp_path: Path, odd: str) -> None:
    model, path = folded
    tensors, text = read_tensors(path, FORMAT, "pairs")
    told = [key for key in tensors if "/parametrizations" not in key and tensors[key].is_floating_point()]
    assert len(told) > 15
    for key in told:
        write_tensors(tmp_path / "p", FORMAT, tensors | {key: ODD[odd](tensors[key])}, text)
        assert use_both(copy.deepcopy(model), tmp_path / "p") <= (key.startswith("parameters/") and odd == "empty")


def test_a_negative_variance_is_told(folded: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, path = folded
    tensors, text = read_tensors(path, FORMAT, "pairs")
    write_tensors(tmp_path / "p", FORMAT, tensors | {"norms/0/running_var": -torch.ones(3)}, text)
    with pytest.raises(InputError, match="a module in it cannot be built"):
        batchnorm.unfold(model, tmp_path / "p", like=build())


@pytest.mark.parametrize(("way", "size"), [(("norms", "0", "num_features"), 2**30),
                                           (("stays", "7", 0, "channels"), 2**30),
                                           (("stays", "4", 0, "out_channels"), 2**30),
                                           (("added", "1.bias"), [2**30])])  # fmt: skip
def test_a_size_that_no_tensor_has_takes_no_memory(
    folded: tuple[nn.Module, Path], tmp_path: Path, way: tuple[Any, ...], size: Any
) -> None:
    tensors, text = read_tensors(folded[1], FORMAT, "pairs")
    write_tensors(tmp_path / "p", FORMAT, tensors, put(json.loads(text), way, json.dumps(size)))
    with pytest.raises(BatchNormError, match=r"cannot be built|expected a (parameter of shape|bias of 4 numbers)"):
        batchnorm.refold(build(), tmp_path / "p")


def test_settings_of_other_number_types_are_kept(tmp_path: Path) -> None:
    """JSON knows none of NumPy's."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=np.float32(1e-3), momentum=np.float64(0.2))).eval()
    result = batchnorm.fold(model, X)
    back = batchnorm.unfold(result.model, result.save_pairs(tmp_path / "p"))
    assert back[1].eps == float(np.float32(1e-3))
    assert torch.equal(back(X), model(X))


@pytest.mark.parametrize("part", ["added", "norms", "stays", "same", "digests", "bordered", "ties", "moved"])
def test_a_missing_part_is_told(folded: tuple[nn.Module, Path], tmp_path: Path, part: str) -> None:
    tensors, text = read_tensors(folded[1], FORMAT, "pairs")
    about = json.loads(text)
    del about[part]
    write_tensors(tmp_path / "p", FORMAT, tensors, json.dumps(about))
    with pytest.raises(InputError, match=f"expected the pairs of a fold, .*; its part '{part}' is missing"):
        FoldRecord.load(tmp_path / "p")


@pytest.mark.parametrize("shape", [(1,), (4, 3, 3), (4, 3, 3, 1), (0,)])
def test_a_weight_of_another_shape_is_told(
    folded: tuple[nn.Module, Path], tmp_path: Path, shape: tuple[int, ...]
) -> None:
    model, path = folded
    tensors, text = read_tensors(path, FORMAT, "pairs")
    write_tensors(tmp_path / "p", FORMAT, tensors | {"parameters/1.weight": torch.zeros(shape)}, text)
    with pytest.raises(StateError, match=r"unfold: expected 1\.weight of shape \(4, 3, 3, 3\)"):
        batchnorm.unfold(model, tmp_path / "p", like=build())


@pytest.mark.parametrize("key", ["norms/2/weight", "norms/2/running_var"])
@pytest.mark.parametrize("tensor", [torch.zeros(1), torch.zeros(4, 2), None])
def test_a_norm_whose_tensors_do_not_fit_is_told(
    folded: tuple[nn.Module, Path], tmp_path: Path, key: str, tensor: torch.Tensor | None
) -> None:
    model, path = folded
    tensors, text = read_tensors(path, FORMAT, "pairs")
    del tensors[key]
    write_tensors(tmp_path / "p", FORMAT, tensors if tensor is None else tensors | {key: tensor}, text)
    with pytest.raises(InputError, match="a module in it cannot be built"):
        batchnorm.unfold(model, tmp_path / "p", like=build())


def test_the_file_is_the_same_each_time(folded: tuple[nn.Module, Path], tmp_path: Path) -> None:
    pairs = FoldRecord.load(folded[1], build())
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


@pytest.mark.parametrize(("part", "value"), [
    ("count", float("nan")), ("count", float("inf")), ("count", -1.0), ("m2", -1.0), ("mean_error", -1.0),
    ("variance_error", -1.0), ("batches", -1), ("batches", 1j), ("batches", 1.0), ("of_norm", 1),
])  # fmt: skip
def test_a_population_of_impossible_numbers_is_told(tmp_path: Path, part: str, value: complex) -> None:
    path = population().save(tmp_path / "p")
    tensors, _ = read_tensors(path, "batchnorm-population-1", "one")
    old = tensors.get(f"bn/{part}", torch.tensor(True))
    new = torch.full_like(old, value) if old.is_floating_point() else torch.tensor(value)
    write_tensors(path, "batchnorm-population-1", tensors | {f"bn/{part}": new})
    with pytest.raises(InputError, match=r"expected a population that Population\.save wrote; of 'bn'"):
        Population.load(path)
