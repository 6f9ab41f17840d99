"""What models hold, by name, and whether they fit together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import AveragedModel

from batchnorm.errors import InputError, NonFiniteError, StateError, UnknownNameError, closest
from batchnorm.models.preconditions import lazy_names
from batchnorm.models.prefixes import wrapper_prefix
from batchnorm.nn.select import named_norms
from batchnorm.statistics.sites import BATCHES, MEAN, VARIANCE

__all__ = ["Entry", "Source", "StatisticsPair", "counts_of_averages", "entries_of", "source_of", "statistics_of"]


@dataclass(frozen=True, eq=False)
class Entry:
    """A parameter or buffer of a model, once, however many names it has.

    Attributes:
        names: all of them, the first registered first.
        tensor: the parameter or buffer itself.
        is_buffer: whether it is a buffer.
        persistent: whether it is part of the model's state dict.
    """

    names: tuple[str, ...]
    tensor: Tensor
    is_buffer: bool
    persistent: bool

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.tensor.dtype

    @property
    def floating(self) -> bool:
        """Whether it has an average."""
        return self.tensor.is_floating_point() or self.tensor.is_complex()


@dataclass(frozen=True)
class StatisticsPair:
    """The running statistics of one norm: the full names of its buffers.

    Attributes:
        name: the norm's name; ``""`` if the model itself is the norm.
        mean: name of the running mean.
        variance: name of the running variance.
        counter: name of the number of batches; None where none is kept.
        eps: what the norm adds to the variance; 0 where that is not known.
    """

    name: str
    mean: str
    variance: str
    counter: str | None
    eps: float


@dataclass(frozen=True, eq=False)
class Source:
    """The values that one of the models gives, by the first name of each entry of the merged one."""

    label: str
    values: Mapping[str, Tensor]

    def require_variance(self, name: str) -> None:
        """Refuse what is no variance.

        Raises:
            NonFiniteError: it holds NaN or infinity.
            StateError: it is negative somewhere.
        """
        self.require_finite(name)
        lowest = float(self.values[name].min()) if self.values[name].numel() else 0.0
        if lowest < 0:
            raise StateError(
                f"merge: {self.label}: {name} reaches {lowest:.4g}, and no variance is negative. Recalibrate that "
                "model first, or give it weight 0."
            )

    def require_finite(self, name: str) -> None:
        """Refuse NaN and infinity in a tensor.

        Raises:
            NonFiniteError: it holds some.
        """
        value = self.values[name]
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise NonFiniteError(
                f"merge: {self.label}: {name} holds NaN or infinity in {bad} of its {value.numel()} values, which "
                "would spread to the merged model. Leave that model out, or give it weight 0."
            )


def entries_of(model: Module) -> list[Entry]:
    """Return what a model holds, parameters first; a tied tensor once, with all its names.

    Raises:
        StateError: a parameter or buffer has no value: it is lazy, or on the meta device.
    """
    lazy = lazy_names(model)
    if lazy:
        raise StateError(f"merge: {lazy[0]} has no value yet. Run the model once on real inputs first.")
    absent = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if absent:
        raise StateError(
            f"merge: {absent[0]} is on the meta device, where there are no values. Load the weights first."
        )
    found: dict[int, tuple[list[str], Tensor, bool]] = {}
    for buffers, named in (
        (False, model.named_parameters(remove_duplicate=False)),
        (True, model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in named:
            found.setdefault(id(tensor), ([], tensor, buffers))[0].append(name)
    stored = set(model.state_dict())
    return [
        Entry(tuple(names), tensor, is_buffer, persistent=not stored.isdisjoint(names))
        for names, tensor, is_buffer in found.values()
    ]


def statistics_of(model: Module) -> list[StatisticsPair]:
    """Return the running statistics that a model keeps.

    Those are the buffers of torch's norms and of their subclasses. In other modules, whose code cannot tell, two
    buffers of one shape count if they have the name ``running_mean`` and the same one with ``running_var``, as those
    of functional norms and of norms that only evaluate do.
    """
    first = {name: entry for entry in entries_of(model) for name in entry.names}
    pairs: dict[str, StatisticsPair] = {}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        own = dict(module.named_buffers(recurse=False, remove_duplicate=False))
        for mean_key in own:
            variance_key = mean_key.replace(MEAN, VARIANCE)
            known = isinstance(module, _NormBase) and mean_key == MEAN
            if variance_key == mean_key or variance_key not in own:
                continue
            if not known and not (own[mean_key].is_floating_point() and own[mean_key].shape == own[variance_key].shape):
                continue
            counter = mean_key.replace(MEAN, BATCHES)
            rest = mean_key.removesuffix(MEAN).rstrip("._")
            mean = first[dot + mean_key].name
            pairs[mean] = pairs.get(mean) or StatisticsPair(
                name=f"{dot}{rest}".rstrip("."),
                mean=mean,
                variance=first[dot + variance_key].name,
                counter=first[dot + counter].name if counter in own else None,
                eps=float(getattr(module, "eps", 0.0)),
            )
    return list(pairs.values())


def counts_of_averages(model: Module) -> set[str]:
    """Return the names of the buffers in which an ``AveragedModel`` counts the models that it averaged."""
    return {
        f"{name}.n_averaged".lstrip(".") for name, module in model.named_modules() if isinstance(module, AveragedModel)
    }


def source_of(label: str, given: Module | Mapping[str, Tensor], base: Module, entries: Iterable[Entry]) -> Source:
    """Return the values that a model or a state dict gives for the entries of ``base``.

    What a wrapper (DistributedDataParallel, torch.compile) put before all of its names is left out.

    Raises:
        InputError: shape or dtype differ.
        StateError: norms differ in what they are, or tied parameters in their values.
        UnknownNameError: names differ.
    """
    if isinstance(given, Module):
        held = {name: entry.tensor for entry in entries_of(given) for name in entry.names}
    else:
        held = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    entries = list(entries)
    prefix = wrapper_prefix(held, [name for entry in entries for name in entry.names])
    held = {name.removeprefix(prefix): value for name, value in held.items()}
    if isinstance(given, Module):
        _require_same_norms(label, {n.removeprefix(prefix): m for n, m in named_norms(given).items()}, base)
    _require_known(label, held, entries)
    whole = isinstance(given, Module)
    return Source(label, {entry.name: _value(label, held, entry, whole) for entry in entries})


def _require_known(label: str, held: Mapping[str, Tensor], entries: Iterable[Entry]) -> None:
    known = [name for entry in entries for name in entry.names]
    unknown = sorted(held.keys() - set(known))
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UnknownNameError(
            f"merge: {label} holds {unknown[0]!r}{more}, which the merged model does not"
            f"{closest(unknown[0], known) or '.'} All must be of one architecture."
        )


def _value(label: str, held: Mapping[str, Tensor], entry: Entry, whole: bool) -> Tensor:
    """Return the one value of an entry, whichever of its names it has here."""
    names = [name for name in entry.names if name in held]
    if not names:
        if not whole and not entry.persistent:
            return entry.tensor  # no state dict holds it
        raise UnknownNameError(
            f"merge: {label} has no {entry.name!r}{closest(entry.name, held) or '.'} All must be of one architecture."
        )
    value = held[names[0]]
    if value.shape != entry.tensor.shape:
        raise InputError(
            f"merge: {names[0]} has shape {tuple(value.shape)} in {label} and {tuple(entry.tensor.shape)} in the "
            "merged model. All must be of one architecture."
        )
    if value.dtype != entry.dtype:
        raise InputError(
            f"merge: {names[0]} is {value.dtype} in {label} and {entry.dtype} in the merged model. Cast one of them."
        )
    if value.is_meta:
        raise StateError(f"merge: {names[0]} of {label} is on the meta device, where there are no values.")
    value = value.detach().to(entry.tensor.device)
    for other in names[1:]:
        if not torch.equal(held[other].detach().to(value.device), value):
            raise StateError(
                f"merge: {names[0]} and {other} are one tensor in the merged model and have two values in {label}. "
                "Tie them there too, or pass model= a model in which they are not tied."
            )
    return value


def _require_same_norms(label: str, theirs: Mapping[str, Module], base: Module) -> None:
    for name, norm in named_norms(base).items():
        other = theirs.get(name)
        for key in ("eps", "momentum"):
            one, two = getattr(norm, key), getattr(other, key, None)
            if other is not None and one != two:
                raise StateError(
                    f"merge: {name or type(norm).__name__}: {key} is {two} in {label} and {one} in the merged model, "
                    "so that their statistics mean different things. Set both alike first."
                )
