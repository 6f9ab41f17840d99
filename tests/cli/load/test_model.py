from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchnorm.cli.errors import CommandError
from batchnorm.cli.load import load_model


def test_a_factory_a_class_and_an_instance_all_give_the_model(here: Path) -> None:
    for spec in ("net:build", "net:Net", "net:module"):
        assert type(load_model(spec)).__name__ == "Net"


def test_the_seed_fixes_the_weights(here: Path) -> None:
    first, again, other = (load_model("net:build", seed=seed).conv.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_weights_are_loaded(here: Path, weights: Path) -> None:
    state = torch.load(weights, weights_only=True)
    for name, value in load_model("net:build", weights).state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("net:number", "the call returned an object of type int; expected a torch.nn.Module"),
        ("net:text", "expected a torch.nn.Module or a function; got an object of type str"),
    ],
)
def test_what_is_no_model_is_refused(here: Path, spec: str, said: str) -> None:
    with pytest.raises(CommandError) as raised:
        load_model(spec)
    assert said in str(raised.value)
