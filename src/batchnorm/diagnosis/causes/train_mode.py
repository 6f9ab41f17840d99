"""A norm that uses the batch where it should use what it has stored."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, listing, module_line
from batchnorm.diagnosis.norm_record import Basis
from batchnorm.nn.select import named_norms

__all__ = ["TrainMode"]

_MOST_NAMES = 4


class TrainMode(Cause):
    """A norm that normalizes by the batch in eval mode.

    What it finds:
        A norm in train mode inside a model that was handed over in eval mode; a norm that keeps no running statistics
        (``track_running_stats=False``, buffers set to None), which uses the batch in either mode; a functional norm
        called with ``training=True``. A model handed over in train mode is one that its user is training: its norms'
        mode is no fault then.

    What excludes it:
        A model handed over in train mode, whose norms train with it.

    Evidence:
        The modes, and how much the output of one sample depends on the others.

    Cure:
        Call ``eval()`` after whatever put the norm into train mode; give it running statistics.
    """

    key = "train_mode"
    excluded_at_home = False
    excluded_by_freeze = False
    judged_by_metric = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion for norms in train mode, one for norms without statistics."""
        norms = named_norms(case.model)
        without = [name for name, norm in norms.items() if norm.running_mean is None or norm.running_var is None]
        stuck = [name for name in norms if case.modes[name] and not case.was_training and name not in without]
        functional = [
            site.name
            for site, record in case.gaps.deployed.records.items()
            if record.on_batch and site.name not in norms and not case.was_training
        ]
        order = {layer.name: i for i, layer in enumerate(case.layers)}
        if stuck or functional:
            names = sorted([*stuck, *functional], key=lambda name: order.get(name, len(order)))
            yield self._stuck(case, names, functional)
        if without:
            evidence = (
                f"{len(without)} of {len(norms)} norms ({listing(without)}) keep no running statistics: they normalize "
                "by the batch in eval mode too, so that one sample's output depends on the others."
            )
            yield Suspicion(without, evidence, _give_statistics(without))

    def _stuck(self, case: Case, names: list[str], functional: list[str]) -> Suspicion:
        moved = case.gaps.deployed.metric
        evidence = (
            f"{len(names)} of {len(case.layers)} norms ({listing(names)}) normalize by the batch though the model was "
            "handed over in eval mode"
        )
        if functional:
            evidence += f"; {listing(functional)} as a function called with training=True"
        if moved is not None:
            evidence += f"; so the metric is {moved:.4g}"
        first = names[0]
        cure = f"{module_line(first)}.eval()" if len(names) == 1 else "model.eval()"
        return Suspicion(names, f"{evidence}.", cure, Basis("stored"))


def _give_statistics(names: list[str]) -> str:
    norms = f"[{', '.join(module_line(name) for name in names)}]"
    if len(names) > _MOST_NAMES:
        norms = "[m for m in model.modules() if hasattr(m, 'running_var') and m.running_var is None]"
    return (
        f"for norm in {norms}: norm.track_running_stats = True; "
        "norm.register_buffer('running_mean', torch.zeros(norm.num_features)); "
        "norm.register_buffer('running_var', torch.ones(norm.num_features))  "
        "# then batchnorm.recalibrate(model, batches)"
    )
