"""Why eval mode differs from training: the guilty layer, the cause, the cure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.nn import Module

from batchnorm.diagnosis.accusations import Accusations
from batchnorm.diagnosis.case import Case
from batchnorm.diagnosis.gaps import measure
from batchnorm.diagnosis.goal import Goal
from batchnorm.diagnosis.kept_batches import batch_size, hold
from batchnorm.diagnosis.passes import Passes
from batchnorm.diagnosis.readings import Measure
from batchnorm.diagnosis.result import DiagnoseResult, Metrics
from batchnorm.diagnosis.sites import EverySite, accused_by, frozen_norms
from batchnorm.models.calling import Forward, call_on_batch
from batchnorm.models.preconditions import require_module
from batchnorm.models.snapshot import untouched
from batchnorm.models.transaction import transaction
from batchnorm.models.unsynchronized import unsynchronized
from batchnorm.nn.provenance import with_provenance
from batchnorm.report.progress import progress_bar

__all__ = ["diagnose"]


@transaction("diagnose")
@with_provenance("diagnose")
def diagnose(
    model: Module,
    batches: Iterable[Any],
    loss_or_metric: Measure | None = None,
    *,
    higher_is_better: bool | None = None,
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

    With a metric it is the judge: where eval mode is as good as batch statistics and as population statistics, by more
    than chance, a gap is no fault but a note, for the weights were trained with the statistics as they are stored
    (a fine-tuning with frozen norms). A cure whose own trial makes the metric worse is not told. And a model that is no
    better than chance on any statistics is told so: its norms are not the cause.

    The model is run on the batches in eval mode, on batch statistics, for the population statistics as
    :func:`batchnorm.recalibrate` takes them, and on those; then once for each cure that can be tried, and a few times
    more where a cause makes an experiment. Batches are taken, and kept in memory, until there are both 32 of them and
    1024 samples. The model is left bit-identical, whatever happens.

    Args:
        model: any model that holds batch norms, in the mode in which its trouble shows: in eval mode, as it is
            deployed, or in train mode, as it is being trained.
        batches: data on which eval mode is bad, as for :func:`batchnorm.recalibrate`: tensors, tuples with the inputs
            first, or dicts of keyword inputs. 4 to 32 batches, of the batch size of the training if possible.
        loss_or_metric: ``loss_or_metric(output, batch)``, the mean over the samples of the batch. Batches weigh by
            their number of samples.
        higher_is_better: whether more of it is better. None takes its attribute of that name, as torchmetrics has it;
            else it is found out by giving it outputs of other samples, which must be worse. A function that looks at
            the outputs alone tells nothing, and judges nothing.
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
        >>> _ = torch.nn.init.uniform_(model[1].weight)  # γ was loaded, the statistics were not
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
        told = getattr(loss_or_metric, "higher_is_better", None) if higher_is_better is None else higher_is_better
        return _examine(passes, home, accused, told)


def _examine(
    passes: Passes, home: Sequence[Any] | None, accused: Callable[[str], bool], told: bool | None
) -> DiagnoseResult:
    model = passes.model
    modes = {name: bool(getattr(module, "training", False)) for name, module in model.named_modules()}
    frozen = frozen_norms(model)
    gaps = measure(passes)
    goal = Goal(gaps.deployed, gaps.training, gaps.recalibrated, told)
    case = Case(model, modes[""], modes, passes.sites, passes, gaps, home, frozen, goal)
    findings = Accusations(case, accused).findings()
    samples = sum(batch_size(batch) for batch in passes.batches)
    left = (*passes.sites.left.values(), *passes.sites.not_met({layer.name for layer in gaps.layers}))
    return DiagnoseResult(findings, gaps.layers, _metrics(case), len(passes.batches), samples, left)


def _metrics(case: Case) -> Metrics | None:
    gaps = case.gaps
    if gaps.training.metric is None:
        return None
    return Metrics(gaps.training.metric, gaps.deployed.metric, gaps.recalibrated.metric, case.goal.higher_is_better)
