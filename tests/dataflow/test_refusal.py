from __future__ import annotations

import pytest
import torch

from batchnorm.dataflow.refusal import Refusal, listed
from batchnorm.dataflow.trace import trace


def calls():
    return trace(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sigmoid()), torch.ones(1)).calls


def test_a_refusal_in_the_body_names_the_operators_around_it() -> None:
    relu, sigmoid = calls()
    with pytest.raises(Refusal, match="why") as caught, Refusal.at(relu, sigmoid):
        raise Refusal("why")
    assert caught.value.calls == (relu, sigmoid)


def test_what_it_says_itself_stays() -> None:
    relu, sigmoid = calls()
    with pytest.raises(Refusal) as caught, Refusal.at(relu), Refusal.at(sigmoid):
        raise Refusal("why", module="0", calls=[sigmoid])
    assert caught.value.calls == (sigmoid,)
    assert caught.value.module == "0"


@pytest.mark.parametrize(("phrases", "most", "text"), [
    (["a"], None, "a"),
    (["a", "b", "c"], None, "a, b and c"),
    (["a", "b", "c"], 3, "a, b and c"),
    (["a", "b", "c", "d"], 2, "a, b and 2 more"),
])  # fmt: skip
def test_phrases_in_a_row(phrases: list[str], most: int | None, text: str) -> None:
    assert listed(phrases, most) == text
