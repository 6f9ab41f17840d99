"""What several processes compare before they measure one model together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from batchnorm.errors import StateError
from batchnorm.models.digest import digest_of
from batchnorm.nn.select import named_norms
from batchnorm.statistics.buffers import write_all
from batchnorm.statistics.ranks import Ranks
from batchnorm.statistics.sites import Sites

__all__ = ["Borrowed", "agree"]

_ARGUMENTS = "Give every process the same arguments."
_MODEL = "Give every process the same model."
_WEIGHTS = (
    "Load the same checkpoint in every process, or send rank 0's values to all: "
    "torch.distributed.broadcast(tensor.data, 0) for each parameter and buffer."
)
_BUFFERS = (
    "Pass the DistributedDataParallel wrapper, whose buffers are those of rank 0, or send them yourself: "
    "torch.distributed.broadcast(buffer, 0) for each of model.buffers()."
)


@dataclass(frozen=True)
class _Held:
    """What one process brings: texts that are compared and shown, digests that are compared only."""

    arguments: list[tuple[str, str]]
    modules: list[tuple[str, str]]
    norms: list[tuple[str, str]]
    tensors: list[tuple[str, str]]
    parameters: dict[str, bytes]
    buffers: dict[str, bytes]


@dataclass(frozen=True)
class _Loan:
    """A buffer that holds another value in this process than in rank 0, while all measure with rank 0's."""

    name: str
    owner: Module
    key: str
    value: Tensor
    kept: bool  # DistributedDataParallel would make it rank 0's before the next pass
    loose: bool  # perhaps one of a functional norm, which is known once it runs


@dataclass
class Borrowed:
    """The buffers in which processes differ, and what rank 0 holds in them."""

    _loans: list[_Loan] = field(default_factory=list)

    def write(self) -> None:
        """Give this process the values of rank 0; the caller puts its own back."""
        write_all([(getattr(loan.owner, loan.key), loan.value) for loan in self._loans])

    def to_keep(self, measured: Iterable[tuple[Module, str]]) -> list[tuple[str, Module, str, Tensor]]:
        """Return what this process is to keep of rank 0's, so that all hold one model: name, owner, key, value.

        Args:
            measured: the buffers that are given a measured value.

        Raises:
            StateError: one that differs, and may belong to a functional norm, was not measured.
        """
        done = {(id(owner), key) for owner, key in measured}
        left = [loan for loan in self._loans if (id(loan.owner), loan.key) not in done]
        for loan in left:
            if loan.loose and not loan.kept:
                raise _different_buffer(loan.name)
        return [(loan.name, loan.owner, loan.key, loan.value) for loan in left if loan.kept]

    def note(self, kept: Sequence[str]) -> str:
        """Say which buffers became those of rank 0."""
        listed = ", ".join(kept[:3]) + (", ..." if len(kept) > 3 else "")
        return (
            f"{len(kept)} buffer{'s' * (len(kept) != 1)} that no norm was measured for ({listed}) held other values in "
            "each process and became rank 0's, as DistributedDataParallel makes them before the next pass."
        )


def agree(ranks: Ranks, model: Module, sites: Sites, arguments: Mapping[str, Any]) -> Borrowed:
    """See that all processes are about to do the same with the same network, in one exchange; two if buffers differ.

    Compared are the arguments; the modules, by name and class, in their order; what is measured and what is left;
    names, shapes and dtypes of all parameters and buffers; the bits of the parameters and of the buffers that are not
    measured. What each process holds by design is not: parts of a model that is divided among them (FSDP, DTensor),
    and what DistributedDataParallel was told to ignore.

    Raises:
        StateError: something differs; in every process, with the same sentence.
    """
    if ranks.size == 1:
        return Borrowed()
    mine = _held(model, sites, arguments)
    replies: list[_Held] = ranks.agree(mine)
    first = replies[0]
    for rank, other in enumerate(replies[1:], 1):
        _compare(first.arguments, other.arguments, rank, _ARGUMENTS)
        _compare(first.modules, other.modules, rank, _MODEL)
        _compare(first.norms, other.norms, rank, f"{_MODEL[:-1]}, with the same norms frozen, and the same names=.")
        _compare(first.tensors, other.tensors, rank, _MODEL)
        odd = next((name for name, bits in first.parameters.items() if other.parameters.get(name) != bits), None)
        if odd is not None:
            raise StateError(
                f"recalibrate: the processes hold different networks: the values of {odd} differ between rank 0 and "
                f"rank {rank}. {_WEIGHTS} The model is as it was in every process."
            )
    differing = [name for name, bits in first.buffers.items() if any(r.buffers.get(name) != bits for r in replies)]
    return _borrow(ranks, model, sites, differing) if differing else Borrowed()


def _held(model: Module, sites: Sites, arguments: Mapping[str, Any]) -> _Held:
    divided, ignored = _divided(model), _ignored(model)
    named = {n: p for n, p in model.named_parameters() if n not in ignored}
    parameters = {n: p for n, p in named.items() if not n.startswith(divided)}
    buffers = {n: b for n, b in model.named_buffers() if n not in ignored}
    both = {**parameters, **buffers}
    return _Held(
        arguments=[(f"{key}=", repr(value)) for key, value in arguments.items()],
        # without the module of the class: what is __main__ in one process is __mp_main__ in another
        modules=[(name or "the model", type(m).__qualname__) for name, m in model.named_modules()],
        norms=_norms(model, sites),
        tensors=[(n, f"{str(t.dtype).removeprefix('torch.')} of shape {tuple(t.shape)}") for n, t in both.items()],
        parameters={name: digest_of(p) for name, p in parameters.items()},
        buffers={name: digest_of(b) for name, b in buffers.items()},
    )


def _norms(model: Module, sites: Sites) -> list[tuple[str, str]]:
    """Return what becomes of each norm, of modules and of buffers that a functional norm may be given."""
    measured = {site.name for site in sites.known}
    found = []
    for name, norm in named_norms(model).items():
        left = sites.left[name].reason if name in sites.left else "not among names="
        fate = "measured" if name in measured else f"left as it is ({left})"
        found.append((name or "the model", f"{fate}, with eps={norm.eps}"))
    loose = [(name, "measured if a functional norm is given it") for name in sites.names_of_loose()]
    return found + loose


def _compare(mine: list[tuple[str, str]], theirs: list[tuple[str, str]], rank: int, remedy: str) -> None:
    """Refuse two lists of subjects with their texts if they differ, by the first that does."""
    if mine == theirs:
        return
    place = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    here, there = (one[place] if place < len(one) else None for one in (mine, theirs))
    if here is not None and there is not None and here[0] == there[0]:
        subject = here[0]
        difference = f"{subject} is {here[1]} in rank 0 and {there[1]} in rank {rank}"
        if subject.endswith("="):
            difference = f"{subject}{here[1]} in rank 0 and {subject}{there[1]} in rank {rank}"
    else:
        texts = ["nothing" if one is None else f"{one[0]} ({one[1]})" for one in (here, there)]
        difference = f"rank 0 has {texts[0]} where rank {rank} has {texts[1]}"
    raise StateError(
        f"recalibrate: the processes do not measure the same: {difference}. {remedy} The model is as it was in every "
        "process."
    )


def _borrow(ranks: Ranks, model: Module, sites: Sites, differing: Sequence[str]) -> Borrowed:
    """Return rank 0's values of the buffers that differ.

    Raises:
        StateError: one of them is not measured, and nothing says that rank 0's is the one that counts.
    """
    owners = {f"{prefix}.{key}".lstrip("."): (m, key) for prefix, m in model.named_modules() for key in _keys(m)}
    synchronized = tuple(
        f"{name}.module.".lstrip(".")
        for name, m in model.named_modules()
        if isinstance(m, DistributedDataParallel) and m.broadcast_buffers
    )
    measured = {(id(site.owner), key) for site in sites.known for key in site.keys}
    loans = []
    for name in differing:
        owner, key = owners[name]
        buffer: Tensor = getattr(owner, key)
        kept, loose = name.startswith(synchronized), sites.is_loose(buffer)
        writable = buffer.layout == torch.strided and torch._debug_has_internal_overlap(buffer) != 1
        if not (kept or loose or (id(owner), key) in measured) or not writable:
            raise _different_buffer(name)
        loans.append(_Loan(name, owner, key, buffer, kept, loose))
    values = ranks.agree({loan.name: loan.value.detach().cpu() for loan in loans} if ranks.rank == 0 else None)[0]
    return Borrowed([replace(loan, value=values[loan.name].to(loan.value.device)) for loan in loans])


def _different_buffer(name: str) -> StateError:
    return StateError(
        f"recalibrate: the processes hold different networks: the values of {name}, which is not measured, differ "
        f"between them. {_BUFFERS} The model is as it was in every process."
    )


def _keys(module: Module) -> list[str]:
    return [key for key, _ in module.named_buffers(recurse=False)]


def _divided(model: Module) -> tuple[str, ...]:
    """Return where the names of parameters begin of which each process holds a part."""
    return tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__)
    )


def _ignored(model: Module) -> set[str]:
    """Return the parameters and buffers that DistributedDataParallel was told to leave to each process."""
    return {
        f"{name}.{own}".lstrip(".")
        for name, module in model.named_modules()
        for own in getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    }
