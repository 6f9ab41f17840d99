"""The ways that a norm can stand in a network, each as the smallest model that has it.

A family is a file; importing it registers its patterns, in the order in which they are told.
"""

from __future__ import annotations

from importlib import import_module

from benchmarks.fold.patterns.pattern import PATTERNS, Pattern

__all__ = ["PATTERNS", "Pattern"]

for family in ("hosts", "kinds", "calls", "around", "joins", "onward"):
    import_module(f"{__name__}.{family}")
