"""Models are compared with a population where their stored statistics are not those of their data, or are gone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import ArgumentTypeError, NonFiniteError, ShapeError, StateError
from batchnorm.monitor import measure, watch
from batchnorm.statistics import Population


def images(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
    ).eval()
    batchnorm.recalibrate(net, images(512, 1).split(32), progress=False)
    return net


def verdict(model: nn.Module, x: torch.Tensor, reference: Population | None) -> str:
    with torch.no_grad(), watch(model, reference=reference) as w:
        model(x)
    return w.result().verdict


def test_a_model_fine_tuned_with_frozen_norms_is_watched_beside_the_population_of_its_data(
    model: nn.Module, tmp_path: Path
) -> None:
    batchnorm.freeze(model)
    new = images(512, 2, 1.5)  # what it works on since
    with torch.no_grad(), watch(model) as w:
        model(new)
    assert w.result().drifted
    assert "2 of 2 norms are frozen" in w.result().notes[0]
    reference = measure(model, new.split(32))
    kept = Population.load(reference.save(tmp_path / "population.safetensors"))
    for population in (reference, kept):
        assert verdict(model, images(128, 3, 1.5), population) == "as stored"
        assert verdict(model, images(128, 3), population) == "drifted"


def test_what_recalibrate_measured_is_a_reference(model: nn.Module) -> None:
    population = batchnorm.recalibrate(model, images(512, 5).split(32), progress=False).population
    model[4].running_mean += 3  # the stored statistics are not looked at
    assert verdict(model, images(128, 3), population) == "as stored"
    assert verdict(model, images(128, 3, 0.6), population) == "drifted"


def test_a_folded_model_is_watched_where_its_norms_were(model: nn.Module) -> None:
    population = batchnorm.recalibrate(model, images(512, 5).split(32), progress=False).population
    folded = batchnorm.fold(model, images(2, 0)).model
    with pytest.raises(StateError, match=r"watch\(model, reference=batchnorm.monitor.measure\(model, batches\)\)"):
        watch(folded)
    with pytest.raises(StateError, match=r"1 is no norm in this model \(Identity\).*measure what does"):
        watch(folded, reference=population)  # what the norm was given passes there no more
    reference = measure(folded, images(512, 5).split(32))
    assert set(reference.layers) == {"1@input", "4@input"}
    flagged = [verdict(folded, images(64, seed), reference) for seed in range(10, 20)]
    assert flagged == ["as stored"] * 10
    assert verdict(folded, images(64, 3, 0.6), reference) == "drifted"


def test_other_populations_are_refused_in_words(model: nn.Module) -> None:
    population = batchnorm.recalibrate(model, images(64, 5).split(32), progress=False).population
    with pytest.raises(StateError, match="the model has no module 4"):
        watch(nn.Sequential(nn.Linear(2, 2)), reference=Population({"4": population.layers["4"]}))
    with pytest.raises(ShapeError, match="1: expected statistics of 8 channels, those of the norm; got 6"):
        watch(model, reference=Population({"1": population.layers["4"]}))
    with pytest.raises(ArgumentTypeError, match="expected a Population"):
        watch(model, reference="population.safetensors")
    with (
        torch.no_grad(),
        watch(model, reference=Population({"1": population.layers["1"], "x": population.layers["4"]})) as w,
    ):
        model(images(64, 6))
    assert [layer.name for layer in w.result().layers] == ["1"]
    assert "the model has no module x" in w.result().notes[0]


def kinds(model: nn.Module) -> tuple[nn.Module, Population, nn.Module, Population]:
    folded = batchnorm.fold(model, images(2, 0)).model
    data = images(256, 5).split(32)
    return model, measure(model, data), folded, measure(folded, data)


def test_a_reference_is_for_the_form_of_the_model_that_it_was_measured_on(model: nn.Module, tmp_path: Path) -> None:
    model, of_model, folded, of_folded = kinds(model)
    files = [p.save(tmp_path / f"{i}.safetensors") for i, p in enumerate((of_model, of_folded))]
    for normed, bare in ((of_model, of_folded), tuple(Population.load(path) for path in files)):
        with pytest.raises(StateError, match=r"1 is no norm in this model \(Identity\).*as it is deployed"):
            watch(folded, reference=normed)
        with pytest.raises(StateError, match=r"1 is a norm in this model \(BatchNorm2d\).*as it is deployed"):
            watch(model, reference=bare)
        assert verdict(model, images(128, 6), normed) == "as stored"
        assert verdict(folded, images(128, 6), bare) == "as stored"


def test_files_that_do_not_tell_what_stood_there_are_read(model: nn.Module, tmp_path: Path) -> None:
    _, _, folded, of_folded = kinds(model)
    old = Population({name: replace(layer, of_norm=None) for name, layer in of_folded.layers.items()})
    kept = Population.load(old.save(tmp_path / "old.safetensors"))
    assert [layer.of_norm for layer in kept.layers.values()] == [None, None]
    assert verdict(folded, images(128, 6), kept) == "as stored"
    assert verdict(folded, images(128, 6, 0.6), kept) == "drifted"


def test_names_leave_the_rest_of_a_reference_out(model: nn.Module) -> None:
    reference = measure(model, images(256, 5).split(32))
    for population in (reference, Population({k.removesuffix("@input"): v for k, v in reference.layers.items()})):
        with torch.no_grad(), watch(model, names="4", reference=population) as w:
            model(images(64, 6))
        assert [layer.name for layer in w.result().layers] == ["4"]
        assert w.result().notes == ()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["mean", "m2"])
def test_a_reference_that_is_not_finite_is_refused(model: nn.Module, tmp_path: Path, bad: float, part: str) -> None:
    population = measure(model, images(256, 5).split(32))
    layer = population.layers["4@input"]
    getattr(layer.moments, part)[2] = bad
    for kept in (population, Population.load(population.save(tmp_path / "p.safetensors"))):
        with pytest.raises(NonFiniteError, match=r"4 holds NaN or infinity in 1 of its 6 channels \(first 2\)"):
            watch(model, reference=kept)


def test_a_reference_of_single_values_is_refused() -> None:
    norm = nn.BatchNorm1d(3)
    population = measure(norm, [torch.zeros(1, 3), torch.ones(1, 3)])
    layer = population.layers["@input"]
    single = replace(layer, moments=replace(layer.moments, count=torch.ones(3, dtype=torch.float64)))
    with pytest.raises(ShapeError, match="the model: expected two values or more per channel; channel 0 met 1"):
        watch(norm, reference=Population({"@input": single}))


def test_texts_say_what_was_compared_with(model: nn.Module) -> None:
    folded = batchnorm.fold(model, images(2, 0)).model
    reference = measure(folded, images(512, 5).split(32))
    for shift in (0.0, 0.6):
        with torch.no_grad(), watch(folded, reference=reference) as w:
            folded(images(64, 3, shift))
        result = w.result()
        said = f"{result}{result.text(verbose=True)}{result.document()}"
        assert "stored" not in said.replace("as stored", "")
        assert "standard deviations of the reference" in said
        assert result.to_dict()["by_reference"]
    assert "2 of 2 layers met data that the reference does not describe" in result.summary
    with torch.no_grad(), watch(model) as w:
        model(images(64, 3))
    assert "every norm met what it has stored" in w.result().summary


def test_results_fit_a_screen_and_a_line(model: nn.Module) -> None:
    norms = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(60))).eval()
    norms[0].num_batches_tracked += 1
    with torch.no_grad(), watch(norms) as w:
        norms(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)))
    result = w.result()
    assert "\n" not in repr(result)
    assert len(repr(result)) < 120
    assert len(str(result).splitlines()) <= 24
    rows = result.text(verbose=True, width=120).splitlines()
    assert all(any(row.startswith(f"{index} ") for row in rows) for index in range(60))
    with torch.no_grad(), watch(norms) as w:
        norms(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) + 1)
    assert len(str(w.result()).splitlines()) <= 40
    assert "… and 50 more" in " ".join(str(w.result()).split())
