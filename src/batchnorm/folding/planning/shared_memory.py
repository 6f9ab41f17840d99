"""What a norm keeps apart in memory: its output is a copy, into which others may write."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.norms import NormUse
from batchnorm.dataflow.refusal import Refusal
from batchnorm.travel.rules import location

__all__ = ["norm_input", "require_not_written_into"]


def norm_input(norm: Call) -> Value:
    """Return what a norm reads.

    Raises:
        Refusal: the pass did not see it as a tensor.
    """
    value = norm.args.get("input")
    if not isinstance(value, Value):
        raise Refusal("Its input is not a tensor that the pass saw.")
    return value


def require_not_written_into(graph: Graph, use: NormUse, gone: Collection[Call]) -> None:
    """Refuse a norm without which an operator would write into what others read.

    What is written into its output is written into its input then, and into what that is a view of.

    Raises:
        Refusal: something else reads that.
    """
    for call in use.calls:
        writers = [c for value in _aliases(graph, call.output) for c in graph.readers(value) if c.writes_into(value)]
        if not writers:
            continue
        for value, reader in _same_memory(call, gone):
            others = graph.other_readers(value, [reader])  # another call of the norm passes the same memory on
            if others or value.producer is None:
                other = others[0] if others else "the caller of the model, whose input it is,"
                raise Refusal(f"{location(writers[0])} would write into what {other} also reads.", calls=writers[:1])


def _same_memory(call: Call, gone: Collection[Call]) -> Iterator[tuple[Value, Call]]:
    """Yield what a call reads and what that may share its memory with, back from call to call; each with its reader."""
    value = norm_input(call)
    yield value, call
    while (producer := value.producer) is not None and (producer in gone or _may_alias(producer)):
        read = producer.args.get("input", producer.args.get("self"))
        if not isinstance(read, Value):
            return
        value, call = read, producer
        yield value, call


def _aliases(graph: Graph, value: Value) -> Iterator[Value]:
    """Yield a value, and those that may be the same memory: outputs of views and of operators that pass it on."""
    yield value
    for call in graph.readers(value):
        if _may_alias(call):
            for output in call.outputs:
                yield from _aliases(graph, output)


def _may_alias(call: Call) -> bool:
    return call.name in _MAY_ALIAS or call.op.is_view


_MAY_ALIAS = {"reshape", "contiguous", "flatten", "dropout", "feature_dropout", "to", "alias", "detach", "view_as"}
