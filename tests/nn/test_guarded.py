"""A norm notices who reads its eps or asks for its class."""

from __future__ import annotations

import pytest
import torch

from batchnorm.errors import StateError
from batchnorm.nn import BatchNorm1d, guarded


@pytest.fixture
def asked(monkeypatch):
    """What was asked of norms, and by which function."""
    questions: list[tuple[str, torch.nn.Module, str]] = []
    monkeypatch.setattr(
        guarded._answers, "eps", lambda norm, frame: questions.append(("eps", norm, frame.f_code.co_name))
    )
    monkeypatch.setattr(
        guarded._answers, "cls", lambda norm, frame: questions.append(("cls", norm, frame.f_code.co_name))
    )
    return questions


def test_the_reader_of_eps_is_the_frame_that_reads(asked):
    norm = BatchNorm1d(2, eps=0.25)

    def converter():
        return norm.eps

    asked.clear()
    assert converter() == 0.25
    assert asked == [("eps", norm, "converter")]


def test_a_forward_reads_eps_past_the_guard(asked):
    norm = BatchNorm1d(2)
    asked.clear()
    norm(torch.ones(3, 2))
    assert asked == []


def test_eps_can_be_set_and_is_no_entry_of_the_state(asked):
    norm = BatchNorm1d(2)
    norm.eps = 0.5
    assert norm.eps == 0.5
    assert "eps" not in norm.state_dict()


def test_who_asks_for_parametrizations_asks_for_the_class_and_gets_those_there_are(asked):
    norm = BatchNorm1d(2)
    asked.clear()
    assert not hasattr(norm, "parametrizations")
    assert [(what, who) for what, who, _ in asked] == [("cls", norm)]
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", torch.nn.Identity())
    assert isinstance(norm.parametrizations, torch.nn.ModuleDict)


def test_an_answer_may_refuse(monkeypatch):
    def refuse(norm, frame):
        raise StateError("no")

    monkeypatch.setattr(guarded._answers, "eps", refuse)
    norm = BatchNorm1d(2)
    with pytest.raises(StateError, match="no"):
        norm.eps  # noqa: B018  the reading is what raises
