"""A population beside the weights: what it says of the data, and a file that is read back or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchnorm.errors import InputError
from batchnorm.files.tensor_file import read_tensors, write_tensors
from batchnorm.moments import Moments
from batchnorm.statistics.population import LayerPopulation, Population

FORMAT = "batchnorm-population-1"


def layer(channels: int = 2, *, batches: int = 4, of_norm: bool | None = True) -> LayerPopulation:
    moments = Moments.of(torch.arange(8.0 * channels).view(8, channels))
    errors = torch.full((channels,), 0.5).double(), torch.full((channels,), 2.0).double()
    return LayerPopulation(moments, *errors, batches, of_norm)


def test_what_a_new_batch_may_be_off_by() -> None:
    mean, variance = layer().batch_spread()
    assert (mean.tolist(), variance.tolist()) == ([1.0, 1.0], [4.0, 4.0])  # √4 times the errors


def test_how_many_independent_values_would_be_as_uncertain() -> None:
    # v = 21 of 0, 2, …, 14 (divisor 8), se = ½
    assert layer().effective_values().tolist() == [21 / 0.25] * 2


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ({}, "<Population of 0 layers>"),
        ({"": layer()}, "<Population of 1 layer: the model; 8 values a channel, 4 batches>"),
        ({"a\x1b": layer(batches=1)}, "<Population of 1 layer: a\\x1b; 8 values a channel, 1 batch>"),
        (
            {"a": layer(), "b": layer(batches=5000), "c": layer(), "d": layer()},
            "<Population of 4 layers: a, b, c, ...; 8 values a channel, 5,000 batches>",
        ),
    ],
)
def test_it_is_one_line_however_much_it_holds(layers: dict[str, LayerPopulation], text: str) -> None:
    population = Population(layers)
    assert repr(population) == text
    assert population._repr_html_() == f"<code>{text.replace('<', '&lt;').replace('>', '&gt;')}</code>"


def test_a_layer_is_one_line_too() -> None:
    assert repr(layer(3)) == "LayerPopulation(3 channels, 8 values a channel, 4 batches)"
    empty = LayerPopulation(Moments.zero(0), torch.zeros(0), torch.zeros(0), 1)
    assert repr(empty) == "LayerPopulation(0 channels, 0 values a channel, 1 batch)"


@pytest.mark.parametrize("of_norm", [True, False, None])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, of_norm: bool | None) -> None:
    saved = Population({"": layer(1, of_norm=of_norm), "a.b/c@input": layer(3, batches=7, of_norm=of_norm)})
    path = saved.save(tmp_path / "p.safetensors")
    loaded = Population.load(path)
    assert list(loaded.layers) == list(saved.layers)
    for name, one in saved.layers.items():
        other = loaded.layers[name]
        assert other.moments == one.moments
        assert torch.equal(other.mean_error, one.mean_error)
        assert torch.equal(other.variance_error, one.variance_error)
        assert (other.batches, other.of_norm) == (one.batches, of_norm)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", None),
        ("m2", torch.zeros(3).double()),  # of another length
        ("mean", torch.zeros(2)),  # in single precision
        ("mean_error", torch.zeros(2, 1).double()),
        ("batches", None),
        ("batches", torch.tensor([4])),
        ("batches", torch.tensor(4.0)),
        ("of_norm", torch.tensor(1)),
        ("of_norm", torch.tensor([True])),
    ],
)
def test_a_file_of_another_content_is_refused_by_the_layer(
    tmp_path: Path, key: str, value: torch.Tensor | None
) -> None:
    path = Population({"bn": layer()}).save(tmp_path / "p.safetensors")
    tensors, _ = read_tensors(path, FORMAT, "it")
    tensors = {name: t.clone() for name, t in tensors.items() if name != f"bn/{key}"}
    if value is not None:
        tensors[f"bn/{key}"] = value
    write_tensors(path, FORMAT, tensors)
    with pytest.raises(InputError, match=r"that Population\.save wrote; of 'bn' it does not hold the six"):
        Population.load(path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "other.safetensors", "batchnorm-other-1", {"x": torch.zeros(1)})
    with pytest.raises(InputError, match=r"a population that Population\.save wrote"):
        Population.load(tmp_path / "other.safetensors")
