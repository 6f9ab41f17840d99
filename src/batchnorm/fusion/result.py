"""What a conversion did, norm by norm."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch.nn import Module

from batchnorm.nn.swap import class_name
from batchnorm.report import Document, Paragraph, Result, Section, Table

__all__ = ["ConvertResult", "FusedNorm"]


@dataclass(frozen=True)
class FusedNorm:
    """A norm that is computed together with what follows it.

    Attributes:
        norm: its qualified name.
        activation: the activation, as :func:`batchnorm.functional.batch_norm` calls it.
        residual: whether a tensor is added in between.
        where: the module in whose forward the activation runs; ``""`` is the model itself. It stays where it is.
    """

    norm: str
    activation: str
    residual: bool
    where: str

    def __str__(self) -> str:
        """Return it as a line."""
        chain = f"add → {self.activation}" if self.residual else self.activation
        return f"{self.norm} → {chain} in {self.where or 'the model'}: fused."


@dataclass(frozen=True, repr=False)
class ConvertResult(Result):
    """What :func:`~batchnorm.convert` or :func:`~batchnorm.revert` did.

    Attributes:
        model: the model with the new layers.
        converted: the names of the layers that changed class; a shared one is named once.
        left: (name, reason) of every norm that did not.
        verb: ``"convert"`` or ``"revert"``.
        fused: with ``fuse=True``, the norms that are computed together with what follows them.
        unfused: with ``fuse=True``, (name, reason) of every other norm.
    """

    model: Module
    converted: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    verb: str
    fused: tuple[FusedNorm, ...] = ()
    unfused: tuple[tuple[str, str], ...] = ()

    def document(self) -> Document:
        """Return one row a norm: changed, or left with the reason; and likewise fused, or not."""
        total = len(self.converted) + len(self.left)
        summary = f"{len(self.converted)} of {total} norms {'converted' if self.verb == 'convert' else 'reverted'}"
        summary += f", {len(self.fused)} fused." if self.fused or self.unfused else "."
        norms = dict(self.model.named_modules())
        rows: list[tuple[str, str, str]] = [
            (name, f"now {class_name(type(norms[name]))}", "") for name in self.converted if name in norms
        ]
        rows += [(name, "left as it is", reason) for name, reason in self.left]
        columns = ("layer", "what became of it", "why")
        blocks = [Table(columns, rows)] if rows else [Paragraph("The model holds no batch norm.")]
        sections = [Section("", blocks)]
        if self.fused:
            found = [(f.norm, "added to" if f.residual else "", f.activation, f.where) for f in self.fused]
            sections.append(Section("Fused", [Table(("norm", "residual", "activation", "in"), found)]))
        if self.unfused:
            sections.append(Section("Not fused", [Table(("norm", "why"), self.unfused)]))
        return Document(self.verb.capitalize(), summary, sections)

    def to_dict(self) -> dict[str, Any]:
        """Return the verb, the names converted, and names and reasons of those left; likewise of those fused."""
        return {
            "verb": self.verb,
            "converted": list(self.converted),
            "left": [{"name": name, "reason": reason} for name, reason in self.left],
            "fused": [asdict(item) for item in self.fused],
            "unfused": [{"name": name, "reason": reason} for name, reason in self.unfused],
        }
