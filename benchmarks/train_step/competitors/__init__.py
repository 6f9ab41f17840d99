"""Who takes part: one file a competitor, each in a process of its own, with the environment that it is to have.

A competitor's file offers

- ``layer(case)``: a callable that takes x, or x and a residual, and does the case's work in training;
- ``backend(layer, *inputs)``: the name of what serves that call;
- ``network(model, example)``: a network, made ready; raises ``NotOfferedError`` with the reason if it cannot.

The yardstick (``copy_speed``) offers a ``subject(case)`` instead: something with ``once()`` and ``info()``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# torch's CPU allocator reads it once, at the first allocation: large tensors come in huge pages.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
COPY = "copy"

_LAYERS = ("layers", "bfloat16", "small", "memory")


class NotOfferedError(Exception):
    """A competitor cannot do this; the message says why."""


@dataclass(frozen=True)
class Competitor:
    """One who takes part.

    Attributes:
        name: in the rows.
        title: in tables and plots.
        file: the module of this package that holds it.
        groups: of cases that it takes part in.
        environment: variables of its process.
    """

    name: str
    title: str
    file: str
    groups: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


_HUGE = {HUGE_PAGES: "1"}

COMPETITORS = (
    Competitor("torch", "torch", "torch_eager", (*_LAYERS, "nets")),
    Competitor("torch-thp", "torch, huge pages", "torch_eager", (*_LAYERS, "nets"), _HUGE),
    Competitor("torch-compile", "torch.compile", "torch_compile", ("layers", "bfloat16", "memory")),
    Competitor("batchnorm", "batchnorm", "ours", (*_LAYERS, "nets")),
    Competitor("batchnorm-thp", "batchnorm, huge pages", "ours", (*_LAYERS, "nets"), _HUGE),
    Competitor("batchnorm-inplace", "batchnorm, in place", "ours_inplace", ("layers",)),
    Competitor("batchnorm-convert", "batchnorm, convert without fuse", "ours_convert", ("nets",)),
    Competitor("nothing", "the frame with no layer", "nothing", ("small",)),
    Competitor(COPY, "copy", "copy_speed", ("layers", "bfloat16", "small"), _HUGE),
)
