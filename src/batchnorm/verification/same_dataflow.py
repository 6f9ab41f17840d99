"""Whether two models compute the same but for the norms that one of them has in addition.

Operators are functions of their arguments: if both run the same operators on the same values, in the same order, with
the same numbers beside them, then the models are the same. No tolerance is needed to see that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch.utils._pytree import tree_flatten

from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.operator_kinds import BATCH_NORMS, family

__all__ = ["dataflow_difference"]


def dataflow_difference(
    before: Graph, after: Graph, inserted: Collection[str], renamed: Mapping[str, str], dropped: Collection[str]
) -> str | None:
    """Return how ``after`` differs from ``before`` beyond the inserted norms, as a phrase; None if it does not.

    Args:
        before: dataflow of the model as it was.
        after: dataflow of the rewritten model.
        inserted: names of the norms that it has in addition.
        renamed: old names of state tensors with their new ones.
        dropped: old names of state tensors that are not passed any more.
    """
    matching = _Matching(renamed, dropped)
    matching.pair(before.inputs, after.inputs)
    kept: list[Call] = []
    for call in after.calls:
        if call.module not in inserted:
            kept.append(call)
        elif family(call) in BATCH_NORMS:
            matching.passes_on(call)
    for one, other in zip(before.calls, kept, strict=False):
        place = f"{one.name} in {one.module or 'the model'}"
        if one.op is not other.op:
            return f"{other.name} runs instead of {place}"
        if not matching.same(one.args, other.args):
            return f"{place} gets other arguments"
        matching.pair(one.outputs, other.outputs)
    if len(before.calls) != len(kept):
        return f"{len(kept)} operators run instead of {len(before.calls)}"
    return None if matching.same(before.outputs, after.outputs) else "other values are returned"


class _Matching:
    """Which value of the new dataflow is which of the old one."""

    def __init__(self, renamed: Mapping[str, str], dropped: Collection[str]) -> None:
        self._old_name = {new: old for old, new in renamed.items()}
        self._dropped = set(dropped)
        self._old: dict[Value, Value] = {}
        self._through: dict[Value, Value] = {}

    def pair(self, old: tuple[Value, ...], new: tuple[Value, ...]) -> None:
        self._old.update(zip(new, old, strict=False))

    def passes_on(self, norm: Call) -> None:
        """Take the output of an inserted norm for its input."""
        read = norm.args["input"]
        self._through[norm.output] = self._through.get(read, read)

    def same(self, old: Any, new: Any) -> bool:
        leaves_old, spec_old = tree_flatten(_plain(old))
        leaves_new, spec_new = tree_flatten(_plain(new))
        return spec_old == spec_new and all(map(self._same_leaf, leaves_old, leaves_new))

    def _same_leaf(self, old: Any, new: Any) -> bool:
        if not isinstance(old, Value) or not isinstance(new, Value):
            return self._bias_dropped(old, new) or (type(old) is type(new) and bool(old == new))
        new = self._through.get(new, new)
        if new.kind == "state":
            return old.kind == "state" and {self._old_name.get(name, name) for name in new.names} == set(old.names)
        # a constant is known by where it is met first
        return self._old.setdefault(new, old) is old if new.kind == "constant" else self._old.get(new) is old

    def _bias_dropped(self, old: Any, new: Any) -> bool:
        return new is None and isinstance(old, Value) and bool(old.names) and self._dropped.issuperset(old.names)


def _plain(args: Any) -> Any:
    return dict(args) if isinstance(args, Mapping) else args
