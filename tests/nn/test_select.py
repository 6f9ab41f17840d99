from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.errors import ArgumentTypeError, StateError, UnknownNameError
from batchnorm.nn import BatchNorm2d
from batchnorm.nn.select import named_norms, select_norms


class Subclass(nn.BatchNorm2d):
    pass


@pytest.fixture
def model():
    shared = nn.BatchNorm2d(2)
    return nn.ModuleDict(
        {
            "stem": nn.Sequential(nn.Conv2d(2, 2, 1), BatchNorm2d(2)),
            "layer1": nn.ModuleDict({"bn1": shared, "bn2": Subclass(2), "inner": nn.Sequential(nn.BatchNorm1d(2))}),
            "layer10": nn.ModuleDict({"bn1": nn.SyncBatchNorm(2), "bn2": nn.LazyBatchNorm2d()}),
            "again": shared,
            "instance": nn.InstanceNorm2d(2),
            "layer_norm": nn.LayerNorm(2),
        }
    )


ALL = ["stem.1", "layer1.bn1", "layer1.bn2", "layer1.inner.0", "layer10.bn1", "layer10.bn2"]


def test_every_kind_of_batch_norm_is_found_in_order_and_a_shared_one_once(model):
    assert list(named_norms(model)) == list(select_norms(model, None)) == ALL


def test_the_model_itself_may_be_the_norm():
    norm = nn.BatchNorm1d(2)
    assert named_norms(norm) == {"": norm}
    assert select_norms(norm, "") == {"": norm}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("stem.1", ["stem.1"]),
        ("stem", ["stem.1"]),
        ("layer1", ["layer1.bn1", "layer1.bn2", "layer1.inner.0"]),  # and not layer10
        ("*.bn2", ["layer1.bn2", "layer10.bn2"]),
        (["layer10", "stem.1"], ["stem.1", "layer10.bn1", "layer10.bn2"]),  # in registration order
        ("again", ["layer1.bn1"]),  # the second name of a shared norm
        (("layer1.bn1", "again"), ["layer1.bn1"]),
    ],
)
def test_names_modules_and_patterns(model, names, expected):
    chosen = select_norms(model, names)
    assert list(chosen) == expected
    modules = dict(model.named_modules())
    assert all(chosen[name] is modules[name] for name in expected)


@pytest.mark.parametrize("names", ["layer2", "instance", "*.bn9", ["stem.1", "layer1.bn3"]])
def test_a_name_that_means_no_norm_is_refused(model, names):
    with pytest.raises(UnknownNameError, match="no norm of that name in ModuleDict, which has 6 norms"):
        select_norms(model, names)


def test_a_near_miss_gets_a_hint(model):
    with pytest.raises(UnknownNameError, match=r"did you mean 'layer1\.bn1'"):
        select_norms(model, "layer1.bm1")


def test_a_model_without_norms_has_none():
    assert named_norms(torch.nn.Linear(2, 2)) == {}
    with pytest.raises(UnknownNameError, match="which has 0 norms"):
        select_norms(torch.nn.Linear(2, 2), "bn")


def test_a_hint_ends_its_sentence_itself(model):
    with pytest.raises(UnknownNameError) as caught:
        select_norms(model, "layer1.bm1")
    assert str(caught.value).endswith("did you mean 'layer1.bn1'?")


@pytest.mark.parametrize("names", [3, [3], [nn.BatchNorm2d(2)], nn.BatchNorm2d(2)])
def test_what_is_no_name_is_refused(model, names):
    with pytest.raises(ArgumentTypeError, match="expected the names of norms"):
        select_norms(model, names)


@pytest.mark.parametrize("names", ["target", "target.1", "targ*", ["target"]])
def test_a_second_name_of_a_module_means_the_norms_in_it(names):
    encoder = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    siamese = nn.ModuleDict({"online": encoder, "target": encoder, "head": nn.BatchNorm1d(2)})
    assert list(select_norms(siamese, names)) == ["online.1"]


def test_no_name_at_all_is_a_mistake() -> None:
    with pytest.raises(StateError, match="names is empty"):
        select_norms(nn.BatchNorm1d(2), [])
