"""``watch``: is the data that a model meets the data that its norms were trained on?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType

from torch.nn import Module

from batchnorm.errors import ArgumentTypeError, ShapeError, StateError
from batchnorm.models.preconditions import require_module
from batchnorm.monitor.drift import LayerDrift, judge
from batchnorm.monitor.observe import ModelObserver, Observations
from batchnorm.monitor.references import Comparable, from_buffers, from_population, keeps_statistics
from batchnorm.monitor.result import WatchResult
from batchnorm.monitor.stream import PANES, LayerStream
from batchnorm.nn.frozen import state_of
from batchnorm.nn.provenance import with_provenance
from batchnorm.nn.select import NormModule, select_norms
from batchnorm.statistics.population import Population

__all__ = ["Watch", "WatchResult", "watch"]

TOLERANCE = 0.1
LEVEL = 0.01
_SMALLEST_WINDOW = 32


def watch(
    model: Module,
    *,
    names: str | Sequence[str] | None = None,
    reference: Population | None = None,
    every: int = 1,
    window: int | None = None,
    tolerance: float = TOLERANCE,
    level: float = LEVEL,
) -> Watch:
    r"""Compare what each norm of a model meets with what it has stored, while a context lasts.

    For each norm, with M_c and s²_c the mean and unbiased variance of all values met in channel c, and μ_c, σ²_c
    stored:

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
    registered in the model.

    Calls in all threads are seen, those of servers with worker threads too, as far as they are calls of the model, or
    of a module in it: ``model(x)``, ``model.features(x)``. What a method that is no module's call does with batch norm
    *functions* is not seen. A compiled model runs eagerly while it is watched, in the calls that are passed over too.

    Every operator is met in the first two calls that are looked at, and in every 16th after them. If all norms and
    activations turn out to be modules of torch or of this library, given their input as the only argument, the others
    are looked at by module hooks alone, which costs less, as long as they call the same modules in the same order; from
    where a call leaves that order, operators are met. What this can miss until the next 16th call: norms and
    activations called as functions in a branch that was not taken before and calls no other modules, and modules that
    were put into the model meanwhile.

    In a service that never ends, ``window`` lets only the last samples count, so that what is new is not lost in what
    was good before, and ``every`` looks at a part of the calls only, so that the others cost next to nothing.
    Memory is bounded in any case: about 0.8 kB a channel (1.2 where maps differ in size), four times as much with a
    window, and two megabytes a norm for what waits to be summed up.

    Of large feature maps some rows are looked at (see :mod:`batchnorm.monitor.positions`); the standard errors contain
    what that leaves open. What it costs is measured by ``python -m benchmarks.watch``.

    Features that are hardly ever other than 0, or that have very heavy tails, need 100 samples or so: on fewer, streams
    are flagged more often than ``level`` says. What it finds on real pictures, and how often it is wrong, is measured
    by ``benchmarks/watch/digits.py``.

    Args:
        model: any model with stored statistics.
        names: of norms, of modules that hold norms, or patterns; None for all.
        reference: what the norms are compared with in place of their stored statistics: the population that
            :func:`batchnorm.recalibrate` returned (``result.population``) for the model as it has become by that; or
            what :func:`batchnorm.monitor.measure` measured on a model as it is, one fine-tuned with frozen norms, whose
            stored statistics are of other data, or a folded one, which has none; or one of these read with
            ``Population.load``.
        every: look at the first of every so many calls of the model.
        window: let only the last so many samples count, at least 32; None for all. Samples leave it a quarter of the
            window at a time, so that it holds between three quarters and the whole.
        tolerance: D that is no drift: 0.1 allows for what a moving average over small batches is off by.
        level: probability of flagging anything though the stream is what was stored and the distance is at the
            tolerance; it is divided among the norms. Without a window it is that of one look at the result: who looks
            at a growing stream again and again gives chance a new draw each time. With a window it is that of one
            window's worth of samples, however often the result is asked for meanwhile: each look is made at level/8,
            for the four steps of a window, and twice that for the looks in between (Lévy's inequality).

    Returns:
        A context manager; its :meth:`~Watch.result` may be asked for inside and after the block.

    Raises:
        StateError: the model has no norm with stored statistics, or none that has ever been updated.
        UnknownNameError: a name means no norm.
        ShapeError: a number is out of range, or the reference is of another number of channels.
        ArgumentTypeError: the reference is no population.

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
    return Watch(model, names=names, reference=reference, every=every, window=window, tolerance=tolerance, level=level)


class Watch:
    """The context manager that :func:`watch` returns. Entered again, it goes on where it left off."""

    def __init__(
        self,
        model: Module,
        *,
        names: str | Sequence[str] | None = None,
        reference: Population | None = None,
        every: int = 1,
        window: int | None = None,
        tolerance: float = TOLERANCE,
        level: float = LEVEL,
    ) -> None:
        require_module("watch", model)
        _check_numbers(every, window, tolerance, level)
        if reference is not None and not isinstance(reference, Population):
            raise ArgumentTypeError(
                f"watch: reference: expected a Population, as recalibrate(model, batches).population or "
                f"Population.load(path); got {type(reference).__name__}."
            )
        self._model = model
        self._norms = select_norms(model, names)
        self._tolerance, self._level = tolerance, level
        functional = names is None
        if reference is None:
            _check_statistics(model, self._norms, functional)
            known = from_buffers(self._norms)
        else:
            known = from_population(model, self._norms, reference)
            functional = False
        self._known: Comparable = known
        norms = {name: norm for name, norm in self._norms.items() if name in known.references}
        self._by_buffers = reference is None
        self._seen = Observations(known.references, window, every)
        self._observer = ModelObserver(model, norms, known.places, self._seen, functional=functional)
        self._open: AbstractContextManager[None] | None = None

    def __enter__(self) -> Watch:
        """Begin to watch the calls of the model, in all threads."""
        if self._open is not None:
            raise StateError("watch: this watch is running already; make a second one with batchnorm.watch(model).")
        opened = self._observer.watching()
        opened.__enter__()
        self._open = opened
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching; nothing is left behind in the model or in torch.

        A call that is still running in another thread ends unwatched; the last hook goes with it.
        """
        assert self._open is not None
        try:
            self._open.__exit__(None, None, None)
        except BaseException:  # an interrupt as that begins
            self._open.__exit__(None, None, None)
            self._open = None
            raise
        self._open = None

    def reset(self) -> None:
        """Forget all that has been seen, and begin anew; what it is compared with stays."""
        self._seen.clear()

    @with_provenance("watch", lambda watching: watching._model)
    def result(self) -> WatchResult:
        """Return what has been seen so far; other threads may go on calling the model meanwhile.

        Raises:
            StateError: a model without norm modules called no batch norm function with buffers of its own either.
        """
        if not self._norms and not self._seen.layers and self._by_buffers:
            raise StateError(_NO_NORM.format(type(self._model).__name__))
        layers, activations = dict(self._seen.layers), list(self._seen.activations.values())
        uncalled = [
            LayerStream(name, reference) for name, reference in self._seen.references.items() if name not in layers
        ]
        window = self._seen.window
        level = self._level / max(len(layers), 1) / (1 if window is None else 2 * PANES)
        judged = tuple(judge(s, tolerance=self._tolerance, level=level) for s in (*layers.values(), *uncalled))
        return WatchResult(
            judged,
            tuple(stream.result() for stream in activations),
            self._tolerance,
            self._level,
            every=self._seen.every,
            window=window,
            notes=self._notes(judged),
            by_reference=not self._by_buffers,
        )

    def _notes(self, layers: Sequence[LayerDrift]) -> tuple[str, ...]:
        notes = []
        frozen = [name for name, norm in self._norms.items() if state_of(norm).statistics]
        if self._by_buffers and any(layer.flagged and layer.name in frozen for layer in layers):
            notes.append(
                f"{len(frozen)} of {len(self._norms)} norms are frozen: what they have stored is the data of before "
                "the freeze. If the model was trained on other data since, compare with those: "
                "watch(model, reference=batchnorm.monitor.measure(model, batches))."
            )
        if self._known.refused:
            first = next(iter(self._known.refused.values()))
            notes.append(f"Not compared: {len(self._known.refused)} of the reference; {first}")
        return tuple(notes)


def _check_numbers(every: int, window: int | None, tolerance: float, level: float) -> None:
    if not 0 < tolerance < float("inf"):
        raise ShapeError(f"watch: tolerance={tolerance}: expected a positive number of standard deviations.")
    if not 0 < level < 0.5:
        raise ShapeError(f"watch: level={level}: expected a probability above 0 and below 0.5.")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ShapeError(f"watch: every={every}: expected a whole number of calls, 1 or more.")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < _SMALLEST_WINDOW):
        raise ShapeError(
            f"watch: window={window}: expected a whole number of samples, {_SMALLEST_WINDOW} or more, or None for all."
        )


_NO_NORM = (
    "watch: {} has no batch norm with stored statistics; there is nothing to compare the data with. "
    "Watch a model that has norms with track_running_stats=True; a folded one beside what is measured on good data: "
    "watch(model, reference=batchnorm.monitor.measure(model, batches))."
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
