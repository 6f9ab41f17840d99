"""One tool, one model: how many norms are left, and how far the outputs are from what they were."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from benchmarks.fold.counting import count_norms
from benchmarks.fold.subject import Subject
from benchmarks.fold.tools import Tool
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["WRONG", "compare", "quietly", "verdict"]

WRONG = 1e-3  # relative to the largest output: rounding is far below it, a wrong fold far above
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
        yield {"tool": tool.name, "version": tool.version(), "norms": before, **_judge(tool, model, subject, expected)}


def verdict(row: dict[str, Any]) -> str:
    """Return "raised", "wrong" or "right"; a tool that leaves every norm where it was is right."""
    if row["raised"] is not None:
        return "raised"
    return "wrong" if row["error"] > WRONG else "right"


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
            error = _error(expected, _outputs(folded.run(*fresh)))
            left = folded.norms(*fresh)
        except Exception as problem:  # whatever a tool raises is its result
            return {"left": None, "error": None, "raised": _told(problem), "seconds": time.perf_counter() - start}
    return {"left": left, "error": error, "raised": None, "seconds": seconds}


def _cast(inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)  # type: ignore[no-any-return]


def _outputs(returned: Any) -> list[Tensor]:
    return [leaf.detach().double() for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]


def _error(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Return the largest difference of an output, relative to its largest value."""
    if [a.shape for a in expected] != [b.shape for b in got]:
        return float("inf")
    return max(_relative(a, b) for a, b in zip(expected, got, strict=True))


def _relative(a: Tensor, b: Tensor) -> float:
    error = float((a - b).abs().max() / a.abs().max())
    return float("inf") if math.isnan(error) else error


def _told(problem: BaseException) -> str:
    lines: Iterable[str] = (line.strip() for line in str(problem).splitlines())
    return f"{type(problem).__name__}: {next(filter(None, lines), '')}"[:160]
