"""What a rule is: one class in one file, whose docstring is its page."""

from __future__ import annotations

import inspect
import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.nn import Module

from batchnorm.dataflow.graph import Call, Graph
from batchnorm.placement.insertion import KeyChanges

__all__ = ["SECTIONS", "Finding", "Fix", "Proof", "Rule"]

SECTIONS = ("What it does", "Why it matters", "Flagged", "Use instead", "Fix safety")
"""The sections that every rule's docstring has, in this order."""


class Proof(ABC):
    """Watches a model run and compares a fixed part of it with what it was."""

    problem: str | None = None
    """What is not the same, as a sentence; None while everything is."""

    @abstractmethod
    def __call__(self, call: Call, args: Any, kwargs: Any, result: Any) -> None:
        """Look at one operator call of the fixed model."""


@dataclass(frozen=True)
class Fix:
    """How a finding is mended.

    Attributes:
        description: what it does, as a phrase: ``"drop the bias"``.
        safe: the model computes the same afterwards, in eval and in training mode.
        apply: does it, in place, on the model given, and returns how the keys of its state dict change; raises
            ``StateError`` where that model is another by now.
        proof: for a safe fix, makes what proves it on a run, from the model before and the model after.
    """

    description: str
    safe: bool
    apply: Callable[[Module], KeyChanges] = field(repr=False)
    proof: Callable[[Module, Module], Proof] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Finding:
    """What a rule found in one place.

    Attributes:
        code: the rule's code, ``"BN001"``.
        name: the rule's name, ``"bias-before-norm"``.
        layer: qualified name of the module; ``""`` is the model itself.
        message: what is the matter there, as a sentence.
        advice: what to do about it by hand, as a sentence.
        fix: how it can be mended automatically, if it can.
        position: its place in the order of execution.
    """

    code: str
    name: str
    layer: str
    message: str
    advice: str
    fix: Fix | None = None
    position: int = field(default=0, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as strings and booleans."""
        fix = None if self.fix is None else {"description": self.fix.description, "safe": self.fix.safe}
        return {
            "code": self.code,
            "name": self.name,
            "layer": self.layer,
            "message": self.message,
            "advice": self.advice,
            "fix": fix,
        }


class Rule(ABC):
    """Something to look for in a model. Subclasses are the rules; the docstring of each is its documentation.

    Attributes:
        code: ``"BN"`` and three digits; never given to another rule again.
        name: the same in words, in kebab case.
        by_default: whether it runs without being selected. A rule whose findings are a choice in good networks does
            not.
    """

    code: ClassVar[str]
    name: ClassVar[str]
    by_default: ClassVar[bool] = True

    @abstractmethod
    def find(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield what the rule finds in a model whose dataflow is ``graph``."""

    def needs_eval(self, model: Module, graph: Graph) -> bool:
        """Whether the rule asks for the dataflow in eval mode, too, of a model in training mode; ``graph`` is in it."""
        return False

    def find_in_eval(self, model: Module, graph: Graph) -> Iterator[Finding]:
        """Yield what shows in the dataflow in eval mode only; the model is in eval mode meanwhile."""
        yield from ()

    def finding(self, layer: str, message: str, advice: str, call: Call, fix: Fix | None = None) -> Finding:
        """Make a finding of this rule, at an operator call."""
        return Finding(self.code, self.name, layer, message, advice, fix, call.index)

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the docstring."""
        return cls.page().splitlines()[0]

    @classmethod
    def page(cls) -> str:
        """Return the docstring, unindented."""
        return inspect.cleandoc(cls.__doc__ or "")

    @classmethod
    def sections(cls) -> dict[str, str]:
        """Return the sections of the docstring by their headings, unindented."""
        parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", cls.page(), flags=re.MULTILINE)
        return {heading: textwrap.dedent(text).strip() for heading, text in zip(parts[1::2], parts[2::2], strict=True)}
