"""Options that are one number, or one for each channel."""

from __future__ import annotations

import math

from batchnorm.cli.errors import CommandError

__all__ = ["read_numbers"]


def read_numbers(option: str, text: str | None) -> list[float] | None:
    """Return the numbers between commas, None for no text.

    >>> read_numbers("--input-mean", "123.7, 116.3, 103.5")
    [123.7, 116.3, 103.5]

    Raises:
        CommandError: one is no finite number.
    """
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise CommandError(
            f"{option} {text}: expected a number, or one for each channel between commas, such as 123.7,116.3,103.5."
        )
    return numbers
