"""Why something is left as it is."""

from __future__ import annotations

__all__ = ["Refusal"]


class Refusal(Exception):  # noqa: N818 - nothing went wrong
    """One norm cannot be folded; the message is the reason, in one sentence. It never leaves this package."""
