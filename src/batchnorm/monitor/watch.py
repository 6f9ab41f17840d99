"""``watch``: is the data that a model meets the data that its norms were trained on?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

from torch.nn import Module

from batchnorm.errors import ShapeError, StateError
from batchnorm.monitor.drift import judge
from batchnorm.monitor.observe import Observations, keeps_statistics, observed
from batchnorm.monitor.result import WatchResult
from batchnorm.monitor.stream import LayerStream
from batchnorm.nn.require import require_module
from batchnorm.nn.select import NormModule, select_norms

__all__ = ["Watch", "WatchResult", "watch"]

TOLERANCE = 0.1
LEVEL = 0.01


def watch(
    model: Module, *, names: str | Sequence[str] | None = None, tolerance: float = TOLERANCE, level: float = LEVEL
) -> Watch:
    r"""Compare what each norm of a model meets with what it has stored, while a context lasts.

    For each norm, with M_c and s²_c the mean and unbiased variance met in channel c, and μ_c, σ²_c stored:

    .. math::

        D^2 = \frac1C \sum_c \frac{(M_c - \mu_c)^2}{\sigma_c^2 + \epsilon}
              + \left(\sqrt{\frac{s_c^2 + \epsilon}{\sigma_c^2 + \epsilon}} - 1\right)^2

    the Fréchet distance between what is met and what is stored, in stored standard deviations. Its noise is measured,
    not assumed: sample by sample, since the positions of a feature map are no independent values, and by the jackknife,
    whatever the correlation of the channels (see :func:`batchnorm.monitor.drift.judge`). A norm is flagged when what is
    left of D after the noise is taken off exceeds ``tolerance``. The verdict does not depend on how the stream is cut
    into batches. It takes the samples to be independent draws; neighbouring frames of a film are not.

    Also measured: the share of saturated values behind sigmoid and tanh (slope below 5 % of its maximum), and the units
    that never fired behind a ReLU (see :mod:`batchnorm.monitor.saturation`).

    The model, its outputs, its buffers and its gradients are not touched: norms may be in eval or in batch mode (there
    they are compared with what was stored when the watch began), with or without autograd. Norms are recognized by
    their buffers: torch's, this library's, subclasses, scripted ones, and batch norm functions that are given buffers
    registered in the model. Only this thread's calls are seen. A compiled model runs eagerly meanwhile.

    It costs two passes over the input of each norm and one over that of each activation.

    Features that are hardly ever other than 0, or that have very heavy tails, need 100 samples or so: on fewer, streams
    are flagged more often than ``level`` says. What it finds on real pictures, and how often it is wrong, is measured
    by ``benchmarks/watch/digits.py``.

    Args:
        model: any model with stored statistics.
        names: of norms, of modules that hold norms, or patterns; None for all.
        tolerance: D that is no drift: 0.1 allows for what a moving average over small batches is off by.
        level: probability of flagging anything though the stream is what was stored and the distance is at the
            tolerance; it is divided among the norms.

    Returns:
        A context manager; its :meth:`~Watch.result` may be asked for inside and after the block.

    Raises:
        StateError: the model has no norm with stored statistics, or none that has ever been updated.
        UnknownNameError: a name means no norm.
        ShapeError: the tolerance or the level is out of range.

    Example:
        >>> import torch
        >>> import batchnorm
        >>> from batchnorm.monitor import watch
        >>> g = torch.Generator().manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU()).eval()
        >>> model[0].running_mean.fill_(3.0)
        tensor([3., 3., 3., 3.])
        >>> with watch(model) as usual:
        ...     _ = model(torch.randn(256, 4, generator=g) + 3)
        >>> with watch(model) as brighter:
        ...     _ = model(torch.randn(256, 4, generator=g) + 4)
        >>> usual.result().drifted, brighter.result().drifted
        (False, True)
        >>> round(brighter.result().layers[0].distance, 1)
        1.0

    Sources: Ioffe & Szegedy 2015, "Batch Normalization", §3.1, for what is stored; Heusel et al. 2017
    (arXiv 1706.08500) for the distance.
    """
    return Watch(model, names=names, tolerance=tolerance, level=level)


class Watch:
    """The context manager that :func:`watch` returns. Entered again, it goes on where it left off."""

    def __init__(
        self,
        model: Module,
        *,
        names: str | Sequence[str] | None = None,
        tolerance: float = TOLERANCE,
        level: float = LEVEL,
    ) -> None:
        require_module("watch", model)
        if not 0 < tolerance < float("inf"):
            raise ShapeError(f"watch: tolerance={tolerance}: expected a positive number of standard deviations.")
        if not 0 < level < 0.5:
            raise ShapeError(f"watch: level={level}: expected a probability above 0 and below 0.5.")
        self._model = model
        self._norms = select_norms(model, names)
        self._functional = names is None
        self._tolerance = tolerance
        self._level = level
        _check_statistics(model, self._norms, self._functional)
        self._seen = Observations(self._norms)
        self._open: ExitStack | None = None

    def __enter__(self) -> Watch:
        """Begin to watch this thread's calls of the model."""
        if self._open is not None:
            raise StateError("watch: this watch is running already; make a second one with batchnorm.watch(model).")
        stack = ExitStack()
        stack.enter_context(observed(self._model, self._norms, self._seen, functional=self._functional))
        self._open = stack
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching; nothing is left behind in the model or in torch."""
        assert self._open is not None
        stack, self._open = self._open, None
        stack.close()

    def result(self) -> WatchResult:
        """Return what has been seen so far.

        Raises:
            StateError: a model without norm modules called no batch norm function with buffers of its own either.
        """
        if not self._norms and not self._seen.layers:
            raise StateError(_NO_NORM.format(type(self._model).__name__))
        uncalled = [
            LayerStream(name, reference)
            for name, reference in self._seen.references.items()
            if name not in self._seen.layers
        ]
        streams = [*self._seen.layers.values(), *uncalled]
        called = max(len(self._seen.layers), 1)
        layers = [judge(s, tolerance=self._tolerance, level=self._level / called) for s in streams]
        activations = tuple(stream.result() for stream in self._seen.activations.values())
        return WatchResult(tuple(layers), activations, self._tolerance, self._level)


_NO_NORM = (
    "watch: {} has no batch norm with stored statistics; there is nothing to compare the data with. "
    "Watch a model that has norms with track_running_stats=True, before they are folded."
)


def _check_statistics(model: Module, norms: dict[str, NormModule], functional: bool) -> None:
    """Refuse a model that has nothing to be compared with.

    Raises:
        StateError: see :func:`watch`.
    """
    kept = {name: norm for name, norm in norms.items() if keeps_statistics(norm)}
    if not kept:
        if functional and any(True for _ in model.buffers()):
            return  # it may call batch norm functions with buffers of its own
        raise StateError(_NO_NORM.format(type(model).__name__))
    if all(_never_updated(norm) for norm in kept.values()):
        raise StateError(
            f"watch: the stored statistics of {type(model).__name__} have never been updated (all means 0, all "
            "variances 1). Train the model, load its weights, or measure them: batchnorm.recalibrate(model, batches)."
        )


def _never_updated(norm: NormModule) -> bool:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    tracked = norm.num_batches_tracked
    fresh = bool((norm.running_mean == 0).all() and (norm.running_var == 1).all())
    return fresh and (tracked is None or int(tracked) == 0)
