from __future__ import annotations

import pytest
import torch

from batchnorm.errors import StateError
from batchnorm.folding.planning.replacement import _ACTIVATIONS, Replacement
from batchnorm.folding.writing.replacement_data import from_data, to_data

ODD = {"alpha": 0.3, "approximate": "tanh", "min_val": -0.2, "max_val": 0.7, "negative_slope": 0.4}


@pytest.mark.parametrize("kind", _ACTIVATIONS)
def test_every_activation_that_may_stay_comes_back_with_its_settings(kind: str) -> None:
    activation = _ACTIVATIONS[kind](ODD)
    (back,) = from_data(to_data(Replacement((activation,)))).parts
    assert repr(back) == repr(activation)
    x = torch.linspace(-3, 3, 31)
    assert torch.equal(back(x), activation(x))


def test_names_of_submodules_stay_names_and_nothing_is_nothing() -> None:
    assert from_data(to_data(Replacement(("drop", "act")))).parts == ("drop", "act")
    assert from_data(to_data(Replacement())).parts == ()


def test_an_activation_that_is_not_known_is_refused() -> None:
    with pytest.raises(StateError, match="have a Bilinear in the place of a module"):
        from_data([{"class": "Bilinear"}])
