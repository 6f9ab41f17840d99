"""Why a norm stays."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LeftNorm"]


@dataclass(frozen=True)
class LeftNorm:
    """A norm that is still there.

    Attributes:
        norm: its qualified name, or where it is called as a function.
        into: the module that could have absorbed it, None if no linear operator precedes it.
        reason: why it was left, as a sentence.
        becomes: what stands there now, with ``fuse=True``; None for the norm as it was.
    """

    norm: str
    into: str | None
    reason: str
    becomes: str | None = None

    def __str__(self) -> str:
        """Return it as a line."""
        arrow = f"{self.norm} → {self.into}" if self.into else self.norm
        return f"{arrow}: {f'left, as {self.becomes}' if self.becomes else 'not folded'}. {self.reason}"
