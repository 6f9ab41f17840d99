"""Why eval mode differs from training: the guilty layer, the cause, the cure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.nn import Module

from batchnorm.diagnosis.case import Case, Severity
from batchnorm.diagnosis.causes import CAUSES
from batchnorm.diagnosis.gaps import Gaps, measure
from batchnorm.diagnosis.held import batch_size, hold
from batchnorm.diagnosis.passes import Measure, Passes
from batchnorm.diagnosis.probe import order_of
from batchnorm.diagnosis.result import DiagnoseResult, Finding, Metrics
from batchnorm.diagnosis.sites import EverySite, accused_by, frozen_norms
from batchnorm.diagnosis.trial import try_cure
from batchnorm.nn.calling import Forward, call_on_batch
from batchnorm.nn.require import require_module
from batchnorm.nn.snapshot import untouched
from batchnorm.nn.transaction import transaction
from batchnorm.nn.unsynchronized import unsynchronized
from batchnorm.report.progress import progress_bar

__all__ = ["diagnose"]

_ORDER: dict[Severity, int] = {"fatal": 0, "wrong": 1, "doubtful": 2}


@transaction("diagnose")
def diagnose(
    model: Module,
    batches: Iterable[Any],
    loss_or_metric: Measure | None = None,
    *,
    training_batches: Iterable[Any] | None = None,
    names: str | Sequence[str] | None = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> DiagnoseResult:
    r"""Find out why a model is good in training and bad in eval mode: which norm is guilty, of what, and what helps.

    Each norm's stored mean and variance are compared with those of what it meets *once every norm before it is right*,
    so that a layer with a fault of its own stands out from those that inherit it. Per channel, with the measured μ, v
    (unbiased, divisor n − 1) and the stored μ', v':

    .. math::

        \text{mean shift} = \frac{\mu - \mu'}{\sqrt{v + \epsilon}} \qquad
        \text{variance ratio} = \frac{v + \epsilon}{v' + \epsilon} \qquad
        \mathrm{KL} = \tfrac12 \left[ \frac{v}{v'} + \frac{v'}{v} - 2 + (\mu - \mu')^2
            \left(\frac1v + \frac1{v'}\right) \right]

    (ε added to each variance in the last). A layer is off if its typical channel is more than 0.2 standard deviations
    from the stored statistics after the noise is taken off: that of the batches given, from their spread, and that of a
    moving average. Healthy models give no finding on 4 batches of 32 or more. Then one cause after the other is tried
    on what is off, from the certain ones to "stale"; :mod:`batchnorm.diagnosis.causes` describes them.

    The model is run on the batches about six times: in eval mode, on batch statistics, for the population statistics as
    :func:`batchnorm.recalibrate` takes them, on those, and once for each cure that can be tried. At most 32 batches,
    or as many as hold 1024 samples, are taken and kept in memory. The model is left bit-identical, whatever happens.

    Args:
        model: any model that holds batch norms, in the mode in which its trouble shows: in eval mode, as it is
            deployed, or in train mode, as it is being trained.
        batches: data on which eval mode is bad, as for :func:`batchnorm.recalibrate`: tensors, tuples with the inputs
            first, or dicts of keyword inputs. 4 to 32 batches, of the batch size of the training if possible.
        loss_or_metric: ``loss_or_metric(output, batch)``, the mean over the samples of the batch. Whether more is
            better need not be said: what is told is how far a cure goes from the value in eval mode to that on batch
            statistics. Batches weigh by their number of samples.
        training_batches: data of the training; they tell a shift of the data from a fault of the model.
        names: which norms may be named guilty; None for all of them.
        forward: how the model is called on a batch: ``forward(model, batch)``.
        progress: show a progress bar on standard error; None shows it where that is a terminal.

    Returns:
        The findings, the worst first, and the gap of every layer in order of execution.

    Raises:
        ArgumentTypeError: ``batches`` is a single batch, a batch is of a type that needs ``forward``, or
            ``loss_or_metric`` gives no number.
        BatchError: the loader, the model or ``loss_or_metric`` failed.
        EmptyStreamError: there was no batch.
        NonFiniteError: a norm met NaN or infinity though all statistics before it were measured ones.
        ShapeError: a norm met fewer than two values per channel in all.
        StateError: the model holds no batch norm, or calls none.
        UnknownNameError: a name means no norm.

    Example:
        >>> import torch
        >>> from batchnorm.diagnosis import diagnose
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU()).eval()
        >>> result = diagnose(model, torch.randn(256, 4).split(64))
        >>> [(finding.layer, finding.cause, finding.cure) for finding in result.findings]
        [('1', 'never_updated', 'batchnorm.recalibrate(model, batches)')]

    Source: Kullback & Leibler 1951, section 2, for the divergence; Ioffe & Szegedy 2015, arXiv 1502.03167, section 3.1,
    for what inference needs; Wu & Johnson 2021, arXiv 2105.07576, section 3, for how eval mode comes to differ.
    """
    require_module("diagnose", model)
    sites = EverySite(model)
    accused = accused_by(model, names)
    held = hold(batches)
    home = None if training_batches is None else hold(training_batches)
    call = call_on_batch if forward is None else forward
    with untouched(model), unsynchronized(model), progress_bar("Diagnosing", None, progress) as advance:
        passes = Passes(model, sites, held, call, loss_or_metric, advance)
        return _examine(passes, home, accused)


def _examine(passes: Passes, home: Sequence[Any] | None, accused: Callable[[str], bool]) -> DiagnoseResult:
    model = passes.model
    modes = {name: bool(getattr(module, "training", False)) for name, module in model.named_modules()}
    was_training = modes[""]
    frozen = frozen_norms(model)
    gaps = measure(passes)
    case = Case(model, was_training, modes, passes.sites, passes, gaps, home, frozen)
    findings = sorted(_findings(case, accused), key=lambda finding: (_ORDER[finding.severity], finding.position))
    samples = sum(batch_size(batch) for batch in passes.batches)
    return DiagnoseResult(
        findings, gaps.layers, _metrics(gaps), len(passes.batches), samples, tuple(passes.sites.left.values())
    )


def _findings(case: Case, accused: Callable[[str], bool]) -> list[Finding]:
    order = order_of(case.passes) or {layer.name: i for i, layer in enumerate(case.layers)}
    found = []
    for kind in CAUSES:
        for suspicion in kind().find(case):
            guilty = tuple(filter(accused, suspicion.layers))
            if not guilty:
                continue
            gain = None if suspicion.trial is None else try_cure(case, suspicion.trial)
            position = min((order.get(name, len(order)) for name in guilty), default=len(order))
            found.append(
                Finding(
                    guilty[0], kind.key, suspicion.severity or kind.severity, suspicion.evidence, suspicion.cure, gain,
                    guilty, position,
                )
            )  # fmt: skip
    return found


def _metrics(gaps: Gaps) -> Metrics | None:
    values = (gaps.training.metric, gaps.deployed.metric, gaps.settled.metric)
    return None if values[0] is None else Metrics(*values)
