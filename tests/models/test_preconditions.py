from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import ArgumentTypeError, StateError
from batchnorm.models.preconditions import require_module, require_readable

X = torch.zeros(2, 3, 6, 6)
VERBS = {
    "convert": batchnorm.convert,
    "revert": batchnorm.revert,
    "freeze": batchnorm.freeze,
    "unfreeze": batchnorm.unfreeze,
    "recalibrate": lambda model: batchnorm.recalibrate(model, [X]),
    "fold": lambda model: batchnorm.fold(model, X),
    "check": lambda model: batchnorm.check(model, X),
    "place": lambda model: batchnorm.place(model, X),
    "watch": batchnorm.watch,
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("thing", ["net.pt", None, nn.Linear])
def test_every_verb_says_that_it_wants_a_module(verb: str, thing: object) -> None:
    with pytest.raises(ArgumentTypeError, match=rf"{verb}: expected a torch\.nn\.Module; got {type(thing).__name__}"):
        VERBS[verb](thing)  # type: ignore[operator]


@pytest.mark.parametrize("verb", ["fold", "check", "place"])
def test_a_lazy_model_stays_lazy(verb: str) -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).eval()
    with pytest.raises(StateError, match=rf"{verb}: 0\.weight has no value yet"):
        VERBS[verb](model)  # type: ignore[operator]
    assert type(model[0]) is nn.LazyConv2d
    assert type(model[1]) is nn.LazyBatchNorm2d


@pytest.mark.parametrize("verb", ["fold", "check", "place"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_model_is_refused_with_a_sentence(verb: str) -> None:
    model = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval())
    with pytest.raises(StateError, match=f"{verb}: the model is scripted"):
        VERBS[verb](model)  # type: ignore[operator]


def test_what_is_fine_passes() -> None:
    require_module("fold", nn.Linear(2, 2))
    require_readable("fold", nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
