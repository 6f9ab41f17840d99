"""Norms that notice who reads their ``eps``, or asks for their class; :mod:`batchnorm.nn.other_tools` answers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import TypeAlias

import torch
from torch.nn import Module

__all__ = ["Guarded", "answer", "asked_for_class"]

Answer: TypeAlias = Callable[[Module, FrameType], None]


class _Answers:
    """What is done when a norm is asked; nothing before :func:`answer` was called."""

    eps: Answer = staticmethod(lambda norm, reader: None)
    cls: Answer = staticmethod(lambda norm, reader: None)


_answers = _Answers()


def answer(*, eps: Answer, cls: Answer) -> None:
    """Say what is done before ``eps`` is read, and when somebody asks for a norm's class; both may raise.

    Args:
        eps: is given the norm, and the frame of the code that reads.
        cls: likewise.
    """
    _answers.eps, _answers.cls = eps, cls


def asked_for_class(norm: Module, reader: FrameType) -> None:
    """Answer code that may be about to ask for the norm's class."""
    _answers.cls(norm, reader)


class Guarded(Module):
    """Goes before a norm's class, and says no to a tool that would take part of the norm for the whole."""

    __jit_unused_properties__: tuple[str, ...] = ("eps", "parametrizations")

    @property
    def eps(self) -> float:
        """What is added to the variance.

        Raises:
            StateError: a converter reads it that would drop part of what this layer does.
        """
        if not torch.compiler.is_compiling():  # a compiler cannot look at frames, and is no converter
            _answers.eps(self, sys._getframe(1))
        value: float = self.__dict__["eps"]
        return value

    @eps.setter
    def eps(self, value: float) -> None:
        self.__dict__["eps"] = value

    @property
    def parametrizations(self) -> Module:
        """Parametrizations of the parameters, if there are; ``torch.ao`` asks for them before it asks for the class."""
        if not torch.compiler.is_compiling():
            asked_for_class(self, sys._getframe(1))
        raise AttributeError("parametrizations")  # so that Module.__getattr__ looks among the submodules
