"""Samples that see each other."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, module_line, names_of
from batchnorm.diagnosis.probe import find_leak
from batchnorm.nn.select import named_norms

__all__ = ["BatchMates"]


class BatchMates(Cause):
    """The output for one sample depends on the others in the batch, and no norm is the reason.

    What it finds:
        With every norm in eval mode some samples are given twice, with other batch-mates the second time. The first
        module that is given the same for them both times and returns something else is where they see each other:
        a mean over dimension 0, a softmax or a normalization over the wrong dimension, a batch-wide attention.

    What excludes it:
        A model that does not give the same for the same batch twice.

    Evidence:
        How far its outputs are apart, beside their size.

    Cure:
        Look at the forward of that module for an operation over dimension 0.
    """

    key = "batch_mates"
    excluded_at_home = False
    excluded_by_freeze = False
    judged_by_metric = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion at the module where it begins."""
        leak = find_leak(case.passes)
        if leak is None or _is_known(case, leak.layer):
            return
        case.explained.update(names_of(case.off))
        evidence = (
            f"With other batch-mates the outputs of the same samples differ by up to {leak.difference:.2g} (they are "
            f"up to {leak.size:.2g} in size), though its inputs for them are the same and no norm uses the batch."
        )
        cure = f"print({module_line(leak.layer)})  # look in its forward for an operation over dimension 0"
        yield Suspicion([leak.layer], evidence, cure)


def _is_known(case: Case, layer: str) -> bool:
    """Return whether the module is a norm that keeps no statistics: another cause."""
    norm = named_norms(case.model).get(layer)
    return norm is not None and (norm.running_mean is None or norm.running_var is None)
