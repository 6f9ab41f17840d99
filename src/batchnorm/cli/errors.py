"""What can go wrong at the command line, and how it is told."""

from __future__ import annotations

import re

from batchnorm.errors import BatchNormError
from batchnorm.harmless import harmless

__all__ = ["CommandError", "one_line", "reason"]

_LONGEST = 600


class CommandError(BatchNormError):
    """An option, or a file it names, cannot be used."""


def one_line(text: str) -> str:
    r"""Return a message as one line that ends in a full stop, cut where it would fill the screen.

    >>> one_line("layer1.bn: got 1 value\n  Use a larger batch")
    'layer1.bn: got 1 value Use a larger batch.'
    """
    line = harmless(re.sub(r"\s+", " ", text).strip()).replace("?.", "?")
    if len(line) > _LONGEST:
        line = line[:_LONGEST].rstrip() + " …"
    return line if line.endswith((".", "!", "?", "…")) else f"{line}."


def reason(error: BaseException) -> str:
    r"""Return the kind of a foreign exception and what it says first, without a full stop.

    Torch puts C++ backtraces, and pages of advice, behind the first line of its messages.

    >>> reason(ValueError("no such size\nsomewhere in C++"))
    'ValueError: no such size'
    """
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    return f"{kind}: {one_line(said[0]).rstrip('.')}" if said else kind
