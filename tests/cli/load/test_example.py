from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm.cli.errors import CommandError
from batchnorm.cli.load import load_example, load_examples

MODEL = nn.Linear(3, 3)


def test_each_shape_is_one_argument() -> None:
    example = load_example(MODEL, ["2,3,4", "5x6:int64", " 7 , 8:bool"])
    assert isinstance(example, tuple)
    assert [tuple(x.shape) for x in example] == [(2, 3, 4), (5, 6), (7, 8)]
    assert [x.dtype for x in example] == [torch.float32, torch.int64, torch.bool]
    assert set(example[1].unique().tolist()) == {0, 1}


def test_the_example_is_standard_normal_in_the_dtype_of_the_model_and_seeded() -> None:
    (x,) = load_example(nn.Linear(3, 3).double(), ["10000"], seed=1)
    assert x.dtype == torch.float64
    # standard error of the mean 1/√n, of the standard deviation 1/√(2n); five of each
    assert abs(x.mean()) < 5 / 100
    assert abs(x.std() - 1) < 5 / 2**0.5 / 100
    assert torch.equal(x, load_example(nn.Linear(3, 3).double(), ["10000"], seed=1)[0])
    assert not torch.equal(x, load_example(nn.Linear(3, 3).double(), ["10000"], seed=2)[0])


def test_the_first_batch_of_the_data_is_the_example(here: Path) -> None:
    (x,) = load_example(MODEL, None, "images.npz", batch_size=8)
    assert x.shape == (8, 3, 32, 32)
    (labelled,) = load_example(MODEL, None, "net:labelled")
    assert labelled.shape == (16, 3, 32, 32)
    mapped = load_example(MODEL, None, "net:mapped")
    assert isinstance(mapped, dict)
    assert mapped["x"].shape == (16, 3, 32, 32)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ("", "expected sizes between commas"),
        ("3,a", "expected sizes between commas"),
        ("3,,4", "expected sizes between commas"),
        ("-1,3", "expected sizes between commas"),
        ("1.5,3", "expected sizes between commas"),
        ("3,0", "every size must be 1 or more"),
        ("3:int63", "no dtype 'int63'; did you mean 'int64'?"),
        ("3:", "no dtype ''"),
        ("999999999,999999999", "a tensor of this size cannot be made"),
        ("99999999999999999999", "a tensor of this size cannot be made"),
    ],
)
def test_a_shape_that_is_none_is_told(shape: str, said: str) -> None:
    with pytest.raises(CommandError) as raised:
        load_example(MODEL, [shape])
    assert str(raised.value).startswith(f"--input {shape}:")
    assert said in str(raised.value)


def test_neither_and_both_are_told(here: Path) -> None:
    with pytest.raises(CommandError, match="--input or --data is needed"):
        load_example(MODEL, None)
    with pytest.raises(CommandError, match="give one of them"):
        load_example(MODEL, ["2,3"], "images.npz")


@pytest.mark.parametrize(
    ("data", "said"),
    [("net:empty", "no batch in it"), ("net:strings", "the first is of type str")],
)
def test_data_without_a_usable_first_batch_is_told(here: Path, data: str, said: str) -> None:
    with pytest.raises(CommandError) as raised:
        load_example(MODEL, None, data)
    assert said in str(raised.value)


def test_a_loader_that_raises_at_once_is_told(here: Path) -> None:
    (here / "loaders.py").write_text("def bad():\n    raise OSError('disk on fire')\n    yield\n")
    with pytest.raises(CommandError, match="the loader raised OSError: disk on fire before its first batch"):
        load_example(MODEL, None, "loaders:bad")


def test_further_examples_are_shapes_or_first_batches(here: Path) -> None:
    sources = ["2,3;4,5:int64", "2,3", "images.npz", "net:mapped"]
    pair, one, images, mapped = load_examples(MODEL, sources, batch_size=8)
    assert [tuple(t.shape) for t in pair] == [(2, 3), (4, 5)]
    assert not torch.equal(pair[0], one[0])
    assert images[0].shape == (8, 3, 32, 32)
    assert isinstance(mapped, dict)
    assert load_examples(MODEL, None) == []
