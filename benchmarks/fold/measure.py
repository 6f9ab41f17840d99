"""One tool, one model: how many norms are left, and how far the outputs are from what they were."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from benchmarks.fold.counting import count_norms
from benchmarks.fold.errors import ROUNDINGS, WRONG, largest_error
from benchmarks.fold.subject import Subject
from benchmarks.fold.tools import NotJudgedError, Tool
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["compare", "quietly", "verdict"]

_NOTHING: dict[str, Any] = dict.fromkeys(("left", "error", "raised", "skipped", "seconds"))
_EXAMPLE, _FRESH = 1, 2  # seeds of the inputs that a tool is given, and of those that it is judged by


def compare(subject: Subject, tools: Sequence[Tool]) -> Iterator[dict[str, Any]]:
    """Yield a row a tool: norms before and after, the output's relative error, what it raised, how long it took."""
    fresh = subject.inputs(_FRESH)
    original = subject.build()
    before = count_norms(original, *fresh)
    with quietly():
        expected = _outputs(original(*fresh))
    shared: dict[torch.dtype, nn.Module] = {}
    for tool in tools:
        model = shared.get(tool.dtype) if tool.reads_only else None
        if model is None:
            model = subject.build().to(tool.dtype)
        if tool.reads_only:
            shared[tool.dtype] = model
        yield {
            "tool": tool.name,
            "version": tool.version(),
            "norms": before,
            "rounding": _rounding(subject, tool.dtype, expected),
            **_judge(tool, model, subject, expected),
        }


def _rounding(subject: Subject, dtype: torch.dtype, expected: Sequence[Tensor]) -> float:
    """Return how far the model as it is goes from float64 in the dtype that a tool works in."""
    if dtype == torch.float64:
        return 0.0
    with quietly():
        return largest_error(expected, _outputs(subject.build().to(dtype)(*_cast(subject.inputs(_FRESH), dtype))))


def verdict(row: dict[str, Any]) -> str:
    """Return "skipped", "raised", "wrong" or "right"; a tool that leaves every norm where it was is right."""
    if row["skipped"] is not None:
        return "skipped"
    if row["raised"] is not None:
        return "raised"
    return "wrong" if row["error"] > max(WRONG, ROUNDINGS * row["rounding"]) else "right"


@contextmanager
def quietly() -> Iterator[None]:
    """Run without gradients, and without the warnings of torch's tracers and exporters about themselves."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def _judge(tool: Tool, model: nn.Module, subject: Subject, expected: Sequence[Tensor]) -> dict[str, Any]:
    example, fresh = (_cast(subject.inputs(seed), tool.dtype) for seed in (_EXAMPLE, _FRESH))
    start = time.perf_counter()
    with quietly():
        try:
            folded = tool.fold(model, example)
            seconds = time.perf_counter() - start
            error = largest_error(expected, _outputs(folded.run(*fresh)))
            left = folded.norms(*fresh)
        except NotJudgedError as reason:
            return _NOTHING | {"skipped": str(reason)}
        except Exception as problem:  # whatever a tool raises is its result
            return _NOTHING | {"raised": _told(problem), "seconds": time.perf_counter() - start}
    return _NOTHING | {"left": left, "error": error, "seconds": seconds}


def _cast(inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)  # type: ignore[no-any-return]


def _outputs(returned: Any) -> list[Tensor]:
    return [leaf.detach().double() for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]


def _told(problem: BaseException) -> str:
    lines: Iterable[str] = (line.strip() for line in str(problem).splitlines())
    return f"{type(problem).__name__}: {next(filter(None, lines), '')}"[:160]
