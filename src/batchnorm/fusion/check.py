"""The proof that fused norms compute what they did: the model run with them and without them.

It is run as it is, on the example inputs and on others (:mod:`batchnorm.dataflow.sizes`), in evaluation and in
training, from the same random state and with gradients recorded; outputs and buffers must be equal, or differ by no
more than rounding explains (the bound of :mod:`batchnorm.verification.end_to_end`, with every parameter moved by a unit
in its last place).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from traceback import clear_frames
from typing import Any

import torch
from torch.nn import Module

from batchnorm.dataflow.example_error import example_error
from batchnorm.models.calling import call_on_example, compiled_modules_eager, fresh_inputs
from batchnorm.models.outputs import NamedTensor, difference, named_tensors
from batchnorm.models.several import each
from batchnorm.models.snapshot import untouched
from batchnorm.nn.pending import deferring_always
from batchnorm.nn.select import NormModule
from batchnorm.verification.end_to_end import ReferenceOutputs

__all__ = ["mark", "mark_those_that_hold"]


def mark(norms: Mapping[str, NormModule], fused: Sequence[str]) -> None:
    """Mark the norms of these names as fused, and no others."""
    for name, norm in norms.items():
        norm.__dict__.pop("fused", None)
        if name in fused:
            norm.__dict__["fused"] = True


def mark_those_that_hold(
    model: Module, example_inputs: Any, norms: Mapping[str, NormModule], names: Sequence[str]
) -> dict[str, str]:
    """Mark the norms of these names as far as the model computes the same with them; return why not the others.

    Raises:
        InputError: the model runs in none of its modes, so that nothing can be compared.
    """
    if not names:
        return {}
    check = _Check(model, example_inputs, norms)
    failing = check.failing(list(names))
    mark(norms, [name for name in names if name not in failing])
    return failing


class _Check:
    """The model without fused norms, in each mode in which it runs; and the comparison with some."""

    def __init__(self, model: Module, example_inputs: Any, norms: Mapping[str, NormModule]) -> None:
        self._model = model
        self._norms = norms
        self._references: list[tuple[Callable[[Module, Any], list[NamedTensor]], Any, list[NamedTensor]]] = []
        mark(norms, ())
        modes: list[bool | None] = [False, True]
        if len({m.training for m in model.modules() if hasattr(m, "training")}) > 1:
            modes.append(None)
        failure: Exception | None = None
        for number, inputs in enumerate(each(example_inputs)):
            for training in modes:
                for grad in (True, False):
                    run = _runner(training, grad)
                    try:
                        self._references.append((run, inputs, run(model, inputs)))
                        break
                    except Exception as error:  # a single value per channel in training, a loss that needs labels
                        failure = error if number == 0 else failure
        if not self._references:
            raise example_error(model, failure) from failure

    def failing(self, names: list[str]) -> dict[str, str]:
        """Return the norms that must not be fused, found by halves, each with the reason."""
        problem = self._problem(names)
        if problem is None:
            return {}
        if len(names) == 1:
            return {names[0]: problem}
        half = len(names) // 2
        failing = {**self.failing(names[:half]), **self.failing(names[half:])}
        rest = [name for name in names if name not in failing]
        if failing and (not rest or self._problem(rest) is None):
            return failing
        return dict.fromkeys(names, problem)

    def _problem(self, names: list[str]) -> str | None:
        for run, inputs, expected in self._references:
            mark(self._norms, names)
            try:
                outputs = run(self._model, inputs)
            except Exception as error:
                return f"With it fused the model stops: {error}"
            problem = self._difference(run, inputs, expected, outputs)
            if problem is not None:
                return problem
        return None

    def _difference(
        self,
        run: Callable[[Module, Any], list[NamedTensor]],
        inputs: Any,
        expected: list[NamedTensor],
        outputs: list[NamedTensor],
    ) -> str | None:
        if [o.where for o in outputs] != [o.where for o in expected]:
            return "With it fused the model returns other tensors."
        gaps = [difference(a.tensor, b.tensor).largest for a, b in zip(expected, outputs, strict=True)]
        if not any(gaps):
            return None
        mark(self._norms, ())
        parameters = [p for p in self._model.parameters() if p.is_floating_point()]
        bounds = ReferenceOutputs.of(self._model, inputs, parameters, run).bounds()
        for output, gap, bound in zip(expected, gaps, bounds, strict=True):
            if not gap <= bound < float("inf"):
                return (
                    f"With it fused {output.where or 'the output'} differs by {gap:.3g}; rounding explains at most "
                    f"{bound:.3g}."
                )
        return None


def _runner(training: bool | None, grad: bool) -> Callable[[Module, Any], list[NamedTensor]]:
    """Return what runs a model in a mode (None: as it is) and gives its outputs and buffers; it leaves no trace."""

    def run(model: Module, example_inputs: Any) -> list[NamedTensor]:
        with untouched(model), torch.set_grad_enabled(grad), compiled_modules_eager, deferring_always():
            if training is not None:
                model.train(training)
            try:
                outputs = named_tensors(call_on_example(model, fresh_inputs(example_inputs)))
            except Exception as error:
                clear_frames(error.__traceback__)  # what waits there takes its step as it is forgotten: now, not later
                raise
            return [*outputs, *_buffers(model)]

    return run


def _buffers(model: Module) -> Iterator[NamedTensor]:
    for name, buffer in model.named_buffers():
        yield NamedTensor(f"the buffer {name}", buffer.detach().clone())
