"""Which running statistics of a model are to be measured anew, and which are left as they are."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from batchnorm.errors import StateError, UnknownNameError
from batchnorm.files.tensor_memory import Footprint, footprint, repeats
from batchnorm.models.preconditions import lazy_names
from batchnorm.nn.frozen import state_of
from batchnorm.nn.redirect import original_of
from batchnorm.nn.select import listed, meant_by, select_norms

__all__ = ["Address", "Left", "NothingToMeasure", "Site", "Sites", "has_loose_pair"]

MEAN, VARIANCE, BATCHES = "running_mean", "running_var", "num_batches_tracked"


Address: TypeAlias = tuple[str, str, tuple[str, str, "str | None"]]


class NothingToMeasure(StateError):  # noqa: N818
    """A model has no norm that could be measured."""


@dataclass(frozen=True, eq=False)
class Site:
    """A set of running statistics: those of a norm module, or buffers that a functional batch norm is given.

    Attributes:
        name: the module's name; for a functional norm, its buffers' name without ``running_mean``.
        owner: the module that holds the buffers.
        keys: what the owner calls mean, variance and number of batches; the last may be None.
        owner_name: the owner's name in the model.
    """

    name: str
    owner: Module
    keys: tuple[str, str, str | None]
    owner_name: str

    @property
    def address(self) -> Address:
        """What the site is called in every process that holds this model."""
        return self.name, self.owner_name, self.keys

    @property
    def running_mean(self) -> Tensor:
        """The buffer that holds the mean."""
        buffer: Tensor = getattr(self.owner, self.keys[0])
        return buffer

    @property
    def running_var(self) -> Tensor:
        """The buffer that holds the unbiased variance."""
        buffer: Tensor = getattr(self.owner, self.keys[1])
        return buffer


@dataclass(frozen=True)
class Left:
    """A norm that was not recalibrated, and why."""

    name: str
    reason: str


def _require_own_memory(name: str, owner: Module, keys: tuple[str, str, str | None]) -> None:
    """Refuse buffers of which channels share memory, so that none of them can be written by itself."""
    for key in keys:
        buffer = None if key is None else getattr(owner, key)
        if buffer is not None and repeats(buffer):
            where = f"{name}.{key}".removeprefix(".")
            raise StateError(
                f"recalibrate: {where} is one value, expanded to {buffer.numel()} channels, and cannot hold one for "
                f"each. Give it memory of its own: model.get_submodule({name!r}).{key} = buffer.clone()."
            )


@dataclass(frozen=True)
class _Buffer:
    owner: Module
    prefix: str  # the owner's name and a dot; "" for the model itself
    key: str
    frozen: str | None  # why it counts as frozen, in the modes before the pass

    @property
    def site_name(self) -> str:
        name = f"{self.prefix}{self.key}"
        return name.removesuffix(MEAN).rstrip("._") or name


class Sites:
    """The running statistics of a model: chosen, left, and those that are only known once a functional norm runs.

    Args:
        model: any model, in the modes that its user left it in.
        names: None for all that the user did not freeze; else names, as for :func:`batchnorm.nn.select.select_norms`.
        may_be_none: whether it is no error that there are none; :meth:`require_some` asks for them later.

    Raises:
        NothingToMeasure: there is nothing to recalibrate.
        UnknownNameError: a name means nothing.
    """

    def __init__(self, model: Module, names: str | Sequence[str] | None, *, may_be_none: bool = False) -> None:
        self.left: dict[str, Left] = {}
        self.unknown_calls = 0
        self._model = model
        # a buffer is the same memory whoever hands the tensor on (a scripted module, a detach)
        self._by_key: dict[Footprint, Site | None] = {}
        self._buffers = _loose_buffers(model)
        norms, self._loose_names = _select(model, names, {b.site_name for b in self._buffers.values()})
        self._check_lazy(model)
        everything = names is None
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                self._add_norm(name, module, chosen=name in norms, spare_frozen=everything)
        self._any_norm = bool(norms)
        if not may_be_none:
            self.require_some()

    def _add_norm(self, name: str, norm: _BatchNorm, *, chosen: bool, spare_frozen: bool) -> None:
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            if chosen:
                self.left[name] = Left(name, "keeps no running statistics (track_running_stats=False)")
            return
        reason = _why_frozen(self._model, norm) if spare_frozen else None
        if chosen and reason:
            self.left[name] = Left(name, reason)
        measured = chosen and not reason
        keys = (MEAN, VARIANCE, BATCHES if getattr(norm, BATCHES, None) is not None else None)
        if measured:
            _require_own_memory(name, norm, keys)
        self._by_key.setdefault(footprint(mean), Site(name, norm, keys, name) if measured else None)

    def _check_lazy(self, model: Module) -> None:
        lazy = lazy_names(model)
        if lazy:
            raise StateError(
                f"recalibrate: {lazy[0]} has no size yet, for a lazy layer learns it in its first forward pass. Run "
                "the model once, then recalibrate."
            )

    def require_some(self) -> None:
        """Refuse a model without anything to measure.

        Raises:
            NothingToMeasure: there is nothing.
        """
        wanted = self._loose_names is None or bool(self._loose_names)
        if self.known or (wanted and _any_pair(self._buffers)):
            return
        model = type(self._model).__name__
        if not self._any_norm:
            raise NothingToMeasure(
                f"recalibrate: {model} holds no batch norm with running statistics, so there is nothing to recalibrate."
            )
        reasons = "; ".join(f"{left.name or model}: {left.reason}" for left in list(self.left.values())[:3])
        more = "; ..." if len(self.left) > 3 else ""
        raise NothingToMeasure(
            f"recalibrate: none of the norms can be recalibrated ({reasons}{more}). Name those that are frozen "
            "to measure them all the same: names=[...]."
        )

    def is_loose(self, buffer: Tensor) -> bool:
        """Return whether a buffer is measured if a functional norm turns out to be given it."""
        found = self._buffers.get(footprint(buffer))
        if found is None:
            return False
        if self._loose_names is None:
            return found.frozen is None
        return found.site_name in self._loose_names

    def names_of_loose(self) -> list[str]:
        """Return the names of such buffers, as in the model."""
        return [f"{b.prefix}{b.key}" for b in self._buffers.values() if self.is_loose(getattr(b.owner, b.key))]

    @property
    def known(self) -> list[Site]:
        """The sites to measure that are known so far."""
        return [site for site in self._by_key.values() if site is not None]

    def not_met(self, met: Collection[str]) -> list[Left]:
        """Return those of the known that were to be measured, by their names, and were not met."""
        reason = "never called during the pass; calls in threads that the model starts itself are not seen"
        return [Left(s.name, reason) for s in self.known if s.name not in met and s.name not in self.left]

    def at(self, address: Address) -> Site:
        """Return the site that another process found at this address.

        Raises:
            StateError: the model of this process has no such buffers.
        """
        site = next((site for site in self.known if site.address == address), None)
        if site is not None:
            return site
        name, owner_name, keys = address
        try:
            owner = self._model.get_submodule(owner_name)
            new = Site(name, owner, keys, owner_name)
            key = footprint(new.running_mean)
        except AttributeError as error:
            raise StateError(
                f"recalibrate: another process measured {name or 'a norm'}, which {type(self._model).__name__} does "
                "not have in this one. Give every process the same model."
            ) from error
        self._by_key[key] = new
        return new

    def find(self, running_mean: Tensor | None, running_var: Tensor | None) -> Site | None:
        """Return the site of these running statistics, or None if they are not to be measured."""
        if running_mean is None or running_var is None:
            return None
        original = original_of(running_mean)
        if original is not None:
            self._leave_out(original)
            return None
        key = footprint(running_mean)
        if key not in self._by_key:
            self._by_key[key] = self._functional(running_mean, running_var)
        return self._by_key[key]

    def _leave_out(self, running_mean: Tensor) -> None:
        """Note that a norm of these statistics does not normalize by them, for the model's own code says so."""
        site = self._by_key.get(footprint(running_mean))
        if site is not None:
            reason = "normalizes by each batch, in a block use('batch', ...) that the model's own code opens"
            self.left[site.name] = Left(site.name, reason)

    def _functional(self, running_mean: Tensor, running_var: Tensor) -> Site | None:
        """Return the site of a functional norm, met for the first time."""
        mean, variance = self._buffers.get(footprint(running_mean)), self._buffers.get(footprint(running_var))
        if mean is None or variance is None or mean.owner is not variance.owner:
            self.unknown_calls += 1
            return None
        name = mean.site_name
        if self._loose_names is not None and name not in self._loose_names:
            return None
        if mean.frozen and self._loose_names is None:
            self.left[name] = Left(name, mean.frozen)
            return None
        counter = mean.key.replace(MEAN, BATCHES)
        counted = counter != mean.key and isinstance(getattr(mean.owner, counter, None), Tensor)
        keys = (mean.key, variance.key, counter if counted else None)
        return Site(name, mean.owner, keys, mean.prefix.removesuffix("."))


def _loose_buffers(model: Module) -> dict[Footprint, _Buffer]:
    """Return the floating-point buffers that belong to no norm module: a functional norm may be given any two."""
    return {
        footprint(buffer): _Buffer(module, f"{prefix}." if prefix else "", key, _why_frozen(model, module))
        for prefix, module in model.named_modules()
        if not isinstance(module, _NormBase)
        for key, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point() and not is_lazy(buffer) and buffer.numel() > 0
    }


def has_loose_pair(model: Module) -> bool:
    """Return whether the model holds two buffers of one size that are no norm module's, for a functional norm."""
    return _any_pair(_loose_buffers(model))


def _any_pair(buffers: dict[Footprint, _Buffer]) -> bool:
    """Return whether some module holds two buffers of one size, as a functional norm needs them."""
    seen: set[tuple[int, int]] = set()
    for (_, _, axes), buffer in buffers.items():
        size = math.prod(size for _, size in axes)
        if (id(buffer.owner), size) in seen:
            return True
        seen.add((id(buffer.owner), size))
    return False


def _select(model: Module, names: str | Sequence[str] | None, loose: set[str]) -> tuple[set[str], set[str] | None]:
    """Return the names of the chosen norms, and of the chosen functional norms (None: all there may be)."""
    if names is None:
        return set(select_norms(model, None)), None
    norms: set[str] = set()
    functional: set[str] = set()
    for name in listed(names):
        found = {n for n in loose if meant_by(name, n)}
        functional |= found
        try:
            norms |= set(select_norms(model, name))
        except UnknownNameError:
            if not found:
                raise
    return norms, functional


def _why_frozen(model: Module, owner: Module) -> str | None:
    """Return why a norm counts as frozen by its user, or None."""
    if state_of(owner).statistics:
        return "frozen"
    if getattr(model, "training", False) and not getattr(owner, "training", False):
        return "frozen by hand: in eval mode inside a model in train mode"
    return None
