"""The norms that a forward pass ran: which module each belongs to, and what is known against folding it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.nn import Linear, Module
from torch.nn.modules.conv import _ConvNd

from batchnorm.dataflow.graph import Call, Graph
from batchnorm.dataflow.refusal import Refusal
from batchnorm.nn.operators import is_norm_operator
from batchnorm.nn.select import NormModule, named_norms

__all__ = ["NormUse", "alternative_to", "is_norm", "norm_uses", "require_no_alternative", "unreached_norms"]

_STATE = ("running_mean", "running_var", "weight", "bias")


@dataclass(frozen=True, eq=False)
class NormUse:
    """Every call of one norm.

    Attributes:
        name: what a report calls it: the module's qualified name, or where the function was called.
        owner: the module that holds its statistics, if one does.
        calls: its operator calls, in order.
    """

    name: str
    owner: Module | None
    calls: tuple[Call, ...]


def is_norm(call: Call) -> bool:
    """Whether the call is a batch norm, by whatever operator."""
    return is_norm_operator(call.op)


def norm_uses(model: Module, graph: Graph) -> list[NormUse]:
    """Return the norms of a pass, in order of their first call; a functional call stands alone."""
    calls: dict[object, list[Call]] = {}
    found: dict[object, tuple[str, Module | None]] = {}
    for call in graph.calls:
        if not is_norm(call):
            continue
        name = _owner_name(model, call)
        owner = None if name is None else model.get_submodule(name)
        key = owner if owner is not None else call
        found.setdefault(key, (call.module if name is None else name, owner))
        calls.setdefault(key, []).append(call)
    return [NormUse(_display(*found[key]), found[key][1], tuple(of_key)) for key, of_key in calls.items()]


def unreached_norms(model: Module, uses: list[NormUse]) -> list[str]:
    """Return the names of the model's norm modules that the pass did not run."""
    reached = {use.owner for use in uses}
    return [name for name, module in named_norms(model).items() if module not in reached]


def alternative_to(model: Module, norm: Module, unreached: Iterable[str]) -> str | None:
    """Return a norm that may run in place of ``norm`` for other inputs, though not for the example's.

    One for each domain, width or task stands beside another: of as many channels, under a name that differs in one part
    (``bns.0`` and ``bns.1``, ``source.bn`` and ``target.bn``), with no layer of its own in front of it.

    Args:
        model: the model.
        norm: one of its norms, which the pass ran.
        unreached: names of the norms that it did not run.
    """
    norms = named_norms(model)
    names = [name.split(".") for name, module in norms.items() if module is norm]
    for other in unreached:
        parts = other.split(".")
        for name in names:
            differing = [i for i, (a, b) in enumerate(zip(name, parts, strict=False)) if a != b]
            if len(name) != len(parts) or len(differing) != 1:
                continue
            part = model.get_submodule(".".join(parts[: differing[0] + 1]))
            has_layer = any(isinstance(m, _ConvNd | Linear) for m in part.modules())
            if norms[other].num_features == norms[".".join(name)].num_features and not has_layer:
                return other
    return None


def require_no_alternative(model: Module, norm: Module | None, unreached: Iterable[str]) -> None:
    """Refuse a norm in whose place another may run.

    Raises:
        Refusal: there is one; says which.
    """
    other = None if norm is None else alternative_to(model, norm, unreached)
    if other is not None:
        raise Refusal(
            f"{other} stands beside it and is not reached by the example inputs: other inputs may take that way, and "
            f"the layer before it cannot absorb both. Remove {other} if nothing uses it."
        )


def _display(name: str, owner: Module | None) -> str:
    if owner is None:
        return f"batch_norm in {name}" if name else "batch_norm in the model's forward"
    return name or type(owner).__name__


def _owner_name(model: Module, call: Call) -> str | None:
    """Return the module that holds the call's statistics (or γ, β where it has none): the running one if it does."""
    for key in _STATE:
        holder = call.holder(key)
        if holder is not None:
            return holder
    # a norm without any state is known by its class alone
    return call.module if isinstance(model.get_submodule(call.module), NormModule) else None
