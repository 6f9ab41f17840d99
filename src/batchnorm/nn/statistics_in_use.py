"""Which statistics norms use, and whether they take a batch in, for as long as a block lasts and in whatever mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module

from batchnorm.blocks import block
from batchnorm.errors import ArgumentTypeError, StateError, UnknownNameError, closest
from batchnorm.nn.frozen import state_of
from batchnorm.nn.redirect import Redirection, norms_for, redirected, require_arguments, rule_of, set_aside
from batchnorm.nn.select import NormModule

__all__ = ["held_on_running", "no_update", "updates", "use"]


def updates(norm: NormModule, replica: NormModule) -> bool:
    """Return whether a call of ``replica`` in place of ``norm`` is to move the running statistics of both."""
    return norm.training and replica.training and norm.track_running_stats and norm.running_mean is not None


def _check_no_update(model: Module, names: str | Sequence[str] | None = None) -> None:
    require_arguments("no_update", model, names)


@block(_check_no_update)
def no_update(model: Module, names: str | Sequence[str] | None = None) -> Iterator[None]:
    r"""Leave the running statistics as they are: in the block no call of a norm changes them.

    .. math::

        \mathrm{running} \leftarrow \mathrm{running}

    The norms normalize as they would otherwise, in train mode by the batch (biased variance, divisor n), and outputs
    and gradients are the same to the last bit. ``running_mean``, ``running_var`` and ``num_batches_tracked`` keep their
    values. Meant for a discriminator that meets generated samples, a teacher in train mode, a warm-up pass, the second
    forward of sharpness-aware minimization.

    It works on every kind of norm module, torch's, this library's, ``SyncBatchNorm`` and subclasses, and does not ask
    which mode the model is in, nor is put into during the block. Blocks nest: a :func:`use` inside or outside decides
    what normalizes; of this and :func:`~batchnorm.statistics.accumulated_update.accumulated_update` the innermost
    decides. It holds for all threads that call the model, those of autograd included, which run checkpointed blocks
    again. Compiled modules run eagerly in the block. Copies of the model that are made in it are ordinary models.

    A forward may enter it too: in eval mode, where nothing is updated anyway, the model is exported, compiled and
    folded as it is without. For a model without a norm, as a folded one is, it does nothing; in train mode it warns.

    Args:
        model: any model, or a norm itself.
        names: which norms, as for :func:`batchnorm.freeze`; None for all.

    Raises:
        ArgumentTypeError: ``model`` is no module.
        StateError: the model holds scripted norms, or is ``DataParallel``; or the block is entered in compiled code
            while a norm is in train mode.
        UnknownNameError: a name means no norm.

    Example:
        >>> import batchnorm, torch
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> with batchnorm.no_update(norm):
        ...     y = norm(torch.randn(8, 2))
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([0., 0.]), tensor(0))

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1: only the moving averages are left out.
    """
    norms = norms_for("no_update", model, names, lambda norm: not norm.training)
    yield from redirected(dict.fromkeys(norms.values(), _NoUpdate()))


def _check_use(statistics: str, model: Module, names: str | Sequence[str] | None = None) -> None:
    if isinstance(statistics, Module):
        raise ArgumentTypeError(
            f'use: expected "batch" or "running" first and the model second; got {type(statistics).__name__} first. '
            f'Write use("batch", model).'
        )
    if statistics not in ("batch", "running"):
        raise UnknownNameError(
            f'use: statistics {statistics!r} are unknown; there are "batch" and "running"'
            f"{closest(str(statistics), ('batch', 'running')) or '.'}"
        )
    require_arguments("use", model, names)


@block(_check_use)
def use(statistics: str, model: Module, names: str | Sequence[str] | None = None) -> Iterator[None]:
    r"""Normalize by the batch's own statistics, or by the running ones, whatever mode the model is in.

    .. math::

        y = \gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    With ``"batch"`` μ and σ² are those of the batch (biased, divisor n), with ``"running"`` they are ``running_mean``
    and ``running_var`` (unbiased in PyTorch, divisor n − 1), constants for the gradients, while γ and β learn on.

    Which statistics normalize is all that it decides: whether they are updated is as it was. ``"batch"`` updates in
    train mode and, like everything in eval mode, not there; ``"running"`` never updates, for the batch's statistics are
    not computed. The norms' ``training`` is not touched, so that ``train()`` and ``eval()`` in the block do what they
    always do, to dropout for instance.

    A norm whose statistics are frozen (:func:`batchnorm.freeze`) is an affine map that no mode reaches, and this does
    not reach it either: it stays on its running statistics. Nesting, threads, compiled code, models without
    norms and copies are as for :func:`no_update`; of two ``use`` for a norm the innermost decides.

    Args:
        statistics: ``"batch"`` or ``"running"``.
        model: any model, or a norm itself.
        names: which norms, as for :func:`batchnorm.freeze`; None for all.

    Raises:
        UnknownNameError: ``statistics`` is something else; or a name means no norm.
        ArgumentTypeError: ``model`` is no module, or stands first.
        StateError: the model holds scripted norms, or is ``DataParallel``; or ``"running"`` is asked of a norm that
            keeps no running statistics; or the block is entered in compiled code, where it would change something.

    Example:
        >>> import batchnorm, torch
        >>> norm = torch.nn.BatchNorm1d(1)
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> with batchnorm.use("running", norm):
        ...     y = norm.train()(x)
        >>> torch.allclose(y, x), norm.running_mean
        (True, tensor([0.]))

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, algorithms 1 and 2.
    """
    rule = _Use(statistics)
    norms = norms_for("use", model, names, rule.holds_for)
    if statistics == "running":
        for name, norm in norms.items():
            if norm.running_mean is None or norm.running_var is None:
                raise StateError(
                    f"use: {name or type(norm).__name__} keeps no running statistics (track_running_stats=False) to "
                    "normalize by. Name other norms."
                )
    yield from redirected(dict.fromkeys(norms.values(), rule))


def held_on_running(norm: Module) -> bool:
    """Whether an open block of :func:`use` keeps a norm on its running statistics, in train mode too."""
    rule = rule_of(norm, "statistics")
    return isinstance(rule, _Use) and rule.statistics == "running"


@dataclass(frozen=True, eq=False)
class _NoUpdate:
    axis: str = "update"

    def require(self, others: Sequence[Redirection]) -> None:
        """Go with all others."""

    def apply(self, norm: NormModule, replica: NormModule, inputs: Mapping[str, Any]) -> Callable[[], None] | None:
        if replica.training:
            set_aside(replica)
        return None


@dataclass(frozen=True, eq=False)
class _Use:
    statistics: str
    axis: str = "statistics"

    def require(self, others: Sequence[Redirection]) -> None:
        """Go with all others."""

    def holds_for(self, norm: NormModule) -> bool:
        """Whether the norm normalizes so in its present mode."""
        return state_of(norm).statistics or norm.training == (self.statistics == "batch")

    def apply(self, norm: NormModule, replica: NormModule, inputs: Mapping[str, Any]) -> Callable[[], None] | None:
        if state_of(norm).statistics:
            return None
        replica.__dict__["training"] = self.statistics == "batch"
        if not replica.training and not torch.is_grad_enabled():
            return None  # by the very buffers: nothing writes into them, and nothing is kept for a backward pass
        if not updates(norm, replica):
            # In eval mode nothing is taken in. And torch's kernel keeps what it normalizes by for its backward pass,
            # which is to find it as it is now.
            set_aside(replica)
        return None
