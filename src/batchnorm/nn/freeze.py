"""A freeze that lasts: a frozen norm stays frozen when the model is put into train mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch.nn import Module
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.errors import StateError
from batchnorm.models.preconditions import lazy_names, require_module
from batchnorm.models.transaction import on_failure, transaction
from batchnorm.nn.frozen import THAWED, Exact, FrozenParts, move, state_of, thawed_class
from batchnorm.nn.provenance import with_provenance
from batchnorm.nn.select import NormModule, named_norms, select_norms
from batchnorm.report import Document, Paragraph, Result, Section, Table

__all__ = ["FreezeResult", "FrozenLayer", "freeze", "is_frozen", "unfreeze"]


def is_frozen(module: Module) -> bool:
    """Return whether :func:`freeze` holds the statistics of ``module``; of a module with norms inside, those of all.

    >>> import torch
    >>> from batchnorm.nn.freeze import freeze, is_frozen
    >>> norm = torch.nn.BatchNorm1d(4)
    >>> before = is_frozen(norm)
    >>> result = freeze(norm)
    >>> before, is_frozen(norm)
    (False, True)
    """
    norms = named_norms(module).values()
    return all(state_of(norm).statistics for norm in norms) if norms else state_of(module).statistics


@transaction("freeze")
@with_provenance("freeze")
def freeze(
    model: Module, names: str | Sequence[str] | None = None, *, stats: bool = True, affine: bool = True
) -> FreezeResult:
    r"""Freeze norms: each stays the affine map that it is in eval mode, whatever mode the model is put into.

    .. math::

        y = \frac{\gamma}{\sqrt{\mathrm{running\_var} + \epsilon}}\,(x - \mathrm{running\_mean}) + \beta

    With ``stats``, the running mean and variance (unbiased in PyTorch, divisor n − 1) are neither updated nor
    replaced by a batch's own: ``model.train()``, ``norm.train()`` and ``model.apply(...)`` no longer reach the norm.
    With ``affine``, γ and β stop learning: ``requires_grad`` is False and a gradient that waits in ``.grad`` is
    dropped, for optimizers would still apply it.

    The model is changed in place. Its state-dict keys and outputs in eval mode do not change, the norms remain
    instances of their class, and copies (``copy.deepcopy``, ``pickle``, ``torch.save(model)``) are frozen too.
    Freezing again adds to what is frozen. A shared norm is frozen wherever it is used.

    Freeze before the model is wrapped into ``DistributedDataParallel``, which notes once which parameters learn, and
    after ``SyncBatchNorm.convert_sync_batchnorm``, which makes new layers. ``model.requires_grad_(True)`` sets every
    parameter's flag, those of frozen norms as well.

    Args:
        model: any model, or a norm itself; torch's norms, this library's, and subclasses of either.
        names: which norms: None for all, else names, names of modules that hold norms, or patterns (``"*.bn2"``).
        stats: freeze the running statistics.
        affine: freeze the norm's own parameters.

    Returns:
        What is frozen, layer by layer; its ``undo()`` takes this call back.

    Raises:
        StateError: a norm keeps no running statistics, is lazy and not yet initialized, is parametrized, or shares a
            parameter with a module that is not being frozen; or there is nothing to freeze. Nothing is changed then.
        UnknownNameError: a name means no norm.

    Example:
        >>> import torch
        >>> from batchnorm.nn.freeze import freeze, unfreeze
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        >>> result = freeze(model)
        >>> model.train()[1].training
        False
        >>> model[1].extra_repr().split(", ")[-1], isinstance(model[1], torch.nn.BatchNorm1d)
        ('frozen=statistics and affine', True)
        >>> result = unfreeze(model)
        >>> model[1].training
        True

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 3.1 and Algorithm 2, step 11.
    """
    if not (stats or affine):
        raise StateError(
            "freeze: stats=False and affine=False leave nothing to freeze. Pass stats=True to hold the running "
            "statistics, affine=True to hold weight and bias, or both."
        )
    require_module("freeze", model)
    norms = select_norms(model, names)
    if not norms:
        raise StateError(f"freeze: {type(model).__name__} holds no batch norm. Pass the model that does.")
    for name, norm in norms.items():
        _require_freezable(name or type(norm).__name__, norm, stats)
    target = {
        name: FrozenParts(stats or state_of(norm).statistics, affine or state_of(norm).affine)
        for name, norm in norms.items()
    }
    return _change("freeze", model, norms, target)


@transaction("unfreeze")
@with_provenance("unfreeze")
def unfreeze(model: Module, names: str | Sequence[str] | None = None) -> FreezeResult:
    """Take :func:`freeze` back: class, attributes and ``requires_grad`` flags are what they were before it.

    The mode is the one the norm would be in now had it never been frozen: the one at the time of the freeze, or the
    one that ``train()`` or ``eval()`` asked for since. Norms that are not frozen are left as they are.

    Args:
        model: a model with frozen norms, or a frozen norm itself.
        names: which norms, as for :func:`freeze`.

    Returns:
        The norms that were frozen; its ``undo()`` freezes them again.

    Raises:
        StateError: a norm was parametrized since, or shares a parameter with a norm that stays frozen.
        UnknownNameError: a name means no norm.

    Example:
        >>> import torch
        >>> from batchnorm.nn.freeze import freeze, unfreeze
        >>> norm = torch.nn.BatchNorm1d(2).train()
        >>> _ = freeze(norm)
        >>> _ = unfreeze(norm)
        >>> norm.training, norm.weight.requires_grad
        (True, True)
    """
    require_module("unfreeze", model)
    norms = {name: norm for name, norm in select_norms(model, names).items() if state_of(norm) != THAWED}
    for name, norm in norms.items():
        _require_own_class(name or type(norm).__name__, norm)
    return _change("unfreeze", model, norms, dict.fromkeys(norms, THAWED))


# -- what stands against it ----------------------------------------------------------------------------------------


def _require_freezable(name: str, norm: NormModule, stats: bool) -> None:
    if lazy_names(norm):
        raise StateError(
            f"{name}: a lazy norm that does not know its number of channels cannot be frozen. Run the model once first."
        )
    if stats and (norm.running_mean is None or norm.running_var is None):
        raise StateError(
            f"{name}: keeps no running statistics (track_running_stats=False), so there is nothing to hold: it "
            "normalizes by each batch's own. Pass stats=False to freeze weight and bias only, or name other norms."
        )
    _require_own_class(name, norm)


def _require_own_class(name: str, norm: Module) -> None:
    if is_parametrized(norm):
        raise StateError(
            f"{name}: is parametrized (torch.nn.utils.parametrize), which swaps the norm's class as freezing does. "
            "Remove the parametrization first: torch.nn.utils.parametrize.remove_parametrizations."
        )


def _require_no_split(model: Module, norms: Mapping[str, NormModule], target: Mapping[str, FrozenParts]) -> None:
    """Refuse where one parameter would have to learn at one place and stand still at another."""
    wanted = {id(norm): target[name].affine for name, norm in norms.items()}
    changing: dict[int, tuple[str, bool]] = {}
    for name, norm in norms.items():
        if state_of(norm).affine != target[name].affine:
            for key, parameter in norm.named_parameters(name, recurse=False):
                changing[id(parameter)] = (key, target[name].affine)
    for name, module in model.named_modules():
        held = wanted.get(id(module), state_of(module).affine)
        for key, parameter in module.named_parameters(name, recurse=False):
            mine, freezing = changing.get(id(parameter), ("", held))
            if freezing != held:
                verb, other = ("frozen", "learns") if freezing else ("unfrozen", "stays frozen")
                raise StateError(
                    f"{mine}: cannot be {verb}, for it is the same parameter as {key}, which {other}. "
                    + ("Name both layers, or pass affine=False." if freezing else "Name both layers.")
                )


# -- the change itself -----------------------------------------------------------------------------------------------


def _change(
    verb: str, model: Module, norms: Mapping[str, NormModule], target: Mapping[str, FrozenParts]
) -> FreezeResult:
    _require_no_split(model, norms, target)
    before = [state_of(norm) for norm in norms.values()]
    exact = Exact(norms.values())
    on_failure(exact.restore)
    move(norms.values(), target.values())
    dropped = exact.dropped_gradients()

    def take_back() -> None:
        on_failure(Exact(norms.values()).restore)
        move(norms.values(), before)
        for parameter, grad in dropped:
            parameter.grad = grad

    layers = tuple(FrozenLayer(name, thawed_class(type(norm)).__name__, *target[name]) for name, norm in norms.items())
    after = [(norm, type(norm)) for norm in norms.values()]
    return FreezeResult(verb, layers, len(named_norms(model)), after, take_back)


# -- what it returns -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrozenLayer:
    """One norm and what of it is frozen now."""

    name: str
    kind: str
    statistics: bool
    affine: bool


class FreezeResult(Result):
    """What :func:`freeze` or :func:`unfreeze` did.

    Attributes:
        layers: the norms that were meant, with what of each is frozen now.
        total: how many norms the model has.
    """

    def __init__(
        self,
        verb: str,
        layers: tuple[FrozenLayer, ...],
        total: int,
        after: Sequence[tuple[Module, type]],
        take_back: Callable[[], None],
    ) -> None:
        self.verb = verb
        self.layers = layers
        self.total = total
        self._after: Sequence[tuple[Module, type]] | None = after
        self._take_back = take_back

    @transaction("undo", lambda result: result._norms())
    def undo(self) -> None:
        """Take the call back: classes, flags and waiting gradients; the modes are those last asked for.

        Raises:
            StateError: it was taken back already, or a norm was frozen, unfrozen or rewritten since.
        """
        if self._after is None:
            raise StateError(f"undo: this {self.verb} was already taken back.")
        for layer, (norm, cls) in zip(self.layers, self._after, strict=True):
            if type(norm) is not cls or state_of(norm) != (layer.statistics, layer.affine):
                raise StateError(
                    f"undo: {layer.name} was frozen, unfrozen or rewritten since this {self.verb}. Take the later "
                    "change back first."
                )
        on_failure(partial(setattr, self, "_after", self._after))
        self._take_back()
        self._after = None

    def _norms(self) -> Iterator[Module]:
        return (norm for norm, _ in self._after or ())

    def document(self) -> Document:
        """Return one row a norm."""
        done = "frozen" if self.verb == "freeze" else "unfrozen"
        table = Table(
            ("layer", "class", "statistics frozen", "weight and bias frozen"),
            [(layer.name, layer.kind, layer.statistics, layer.affine) for layer in self.layers],
        )
        blocks = [table] if self.layers else [Paragraph("No norm was frozen.")]
        return Document(
            self.verb.capitalize(), f"{len(self.layers)} of {self.total} norms {done}.", [Section("", blocks)]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the verb, the number of norms in the model, and the layers."""
        return {"verb": self.verb, "total": self.total, "layers": [asdict(layer) for layer in self.layers]}
