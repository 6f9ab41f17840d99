"""Whether safe fixes are safe: the model before and after them, compared in one mode.

Three things have to hold, on the example inputs and on others of other sizes (:mod:`batchnorm.dataflow.sizes`). The
same operators run on the same values, but for the tensors that were dropped. What each fix changed computes the same
within the rounding of float64 (the fix's own proof). And the outputs differ by no more than rounding explains
(:mod:`batchnorm.verification.end_to_end`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module

from batchnorm.checks.patterns import layer_name
from batchnorm.checks.rule import Finding, Rule
from batchnorm.dataflow.graph import Graph
from batchnorm.dataflow.run import run
from batchnorm.dataflow.trace import trace
from batchnorm.errors import InputError, VerificationError
from batchnorm.models.outputs import difference
from batchnorm.models.several import Several
from batchnorm.models.snapshot import untouched
from batchnorm.verification.end_to_end import Agreement, ReferenceOutputs
from batchnorm.verification.same_dataflow import dataflow_difference as dataflow_difference

__all__ = ["Comparison", "in_mode", "trace_in_mode"]


@contextmanager
def in_mode(model: Module, *, training: bool) -> Iterator[None]:
    """Put the model into train or eval mode for a block, and leave it as it was."""
    with untouched(model):
        model.train(training)
        yield


def trace_in_mode(model: Module, example_inputs: Any, *, training: bool) -> Graph:
    """Return the dataflow in train or eval mode; the model is left in the mode it is in."""
    with in_mode(model, training=training):
        return trace(model, example_inputs)


class Comparison:
    """A model before and after safe fixes.

    Args:
        before: the model as it was.
        after: the fixed model.
        runs: what both run on, the example inputs first.
        findings: what was fixed.
        rules: the rules that ran.
        dropped: keys that the state dict lost.
    """

    def __init__(
        self,
        before: Module,
        after: Module,
        runs: Several,
        findings: Sequence[Finding],
        rules: Sequence[type[Rule]],
        dropped: Sequence[str],
    ) -> None:
        self._before = before
        self._after = after
        self._runs = runs
        self._inputs = runs.inputs[0]
        self._findings = findings
        self._rules = {rule.code: rule for rule in rules}
        self._dropped = dropped

    def in_mode(self, *, training: bool) -> Agreement:
        """Compare in train or eval mode.

        Raises:
            VerificationError: the models are not the same.
            InputError: one of them fails on the inputs.
        """
        with in_mode(self._before, training=training), in_mode(self._after, training=training):
            runs = self._that_run()
            graph = trace(self._before, runs)
            for number, label in enumerate(runs.labels):
                self._require_findings(graph.of_run(number), training, f" with {label}" if number else "")
            self._require_same_dataflow(graph, runs)
            return self._require_same_outputs()

    def _that_run(self) -> Several:
        """Return the inputs on which the model runs in the mode that it is in; the example's in any case."""
        given, *others = zip(self._runs.inputs, self._runs.labels, strict=True)
        kept = [given]
        for inputs, label in others:
            try:
                run(self._before, inputs)
            except InputError:  # a batch of one, in training
                continue
            kept.append((inputs, label))
        return Several(tuple(inputs for inputs, _ in kept), tuple(label for _, label in kept))

    def _require_findings(self, graph: Graph, training: bool, where: str) -> None:
        """Other modes and sizes may take other ways through the model: the rule has to find the same, or nothing."""
        for finding in self._findings:
            again = self._rules[finding.code]().find(self._before, graph)
            found = any((f.code, f.layer) == (finding.code, finding.layer) and f.fix is not None for f in again)
            if not found and any(layer_name(call) == finding.layer for call in graph.calls):
                mode = "training" if training else "eval"
                raise VerificationError(f"It would not be safe in {mode} mode{where}: the model runs other code then.")

    def _require_same_dataflow(self, graph: Graph, runs: Several) -> None:
        fixes = [finding.fix for finding in self._findings if finding.fix is not None]
        proofs = [fix.proof(self._before, self._after) for fix in fixes if fix.proof is not None]

        def observe(*event: Any) -> None:
            for proof in proofs:
                proof(*event)

        found = dataflow_difference(graph, trace(self._after, runs, observer=observe), (), {}, self._dropped)
        if found is not None:
            raise VerificationError(f"The fixed model computes something else: {found}.")
        for proof in proofs:
            if proof.problem is not None:
                raise VerificationError(proof.problem)

    def _require_same_outputs(self) -> Agreement:
        reference = ReferenceOutputs.of(self._before, self._inputs, self._touched())
        worst = Agreement(0.0, 0.0)
        fixed = run(self._after, self._inputs)
        if [output.where for output in fixed] != [output.where for output in reference.outputs]:
            raise VerificationError("The fixed model returns other tensors than the original.")
        for old, new, bound in zip(reference.outputs, fixed, reference.bounds(), strict=True):
            error = difference(old.tensor, new.tensor).largest
            if not error <= bound:
                where = old.where or "(the only one)"
                raise VerificationError(f"Output {where} moves by {error:.3g}; rounding explains {bound:.3g} at most.")
            if error >= worst.error:
                worst = Agreement(error, bound)
        return worst

    def _touched(self) -> list[Tensor]:
        """Return the parameters of the fixed layers: to nudge them draws every rounding after them anew."""
        layers = [self._before.get_submodule(finding.layer) for finding in self._findings]
        return [p for layer in layers for p in layer.parameters(recurse=False) if p.is_floating_point()]
