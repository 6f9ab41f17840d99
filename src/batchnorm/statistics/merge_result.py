"""What a merge made, and how far apart the models were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from batchnorm.report import Document, Facts, Paragraph, Result, Section, Table, foremost
from batchnorm.report.document import Block
from batchnorm.report.result import finite_or_none

__all__ = ["MergeResult", "MergedStatistics"]


@dataclass(frozen=True, eq=False)
class MergedStatistics:
    """The statistics of one norm, merged from those of several models; float64, (C,), before the cast.

    Attributes:
        name: the norm's name; ``""`` if the model itself is the norm.
        eps: what the norm adds to the variance.
        mean: the weighted mean of the means.
        variance: ``within + between``.
        within: the weighted mean of the models' variances (each unbiased, divisor n − 1).
        between: the weighted mean of the squared distances of their means from ``mean`` (the weights add up to 1:
            no other divisor).
        widest: the distance between the smallest and the largest of their means.
    """

    name: str
    eps: float
    mean: Tensor
    variance: Tensor
    within: Tensor
    between: Tensor
    widest: Tensor

    @property
    def between_share(self) -> Tensor:
        """Between over variance, (C,): 0 where the models agree on the mean, near 1 where little else is left."""
        return (self.between / self.variance).nan_to_num(0.0)  # a variance of 0 has no parts

    @property
    def distance(self) -> Tensor:
        """Widest over √(within + ε), (C,): how many standard deviations of an activation the means are apart."""
        return torch.where(self.widest > 0, self.widest / (self.within + self.eps).sqrt(), 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the extremes over the channels."""
        return {
            "name": self.name,
            "largest_between_share": float(self.between_share.max()),
            "mean_between_share": float(self.between_share.mean()),
            "largest_distance": finite_or_none(float(self.distance.max())),
        }


class MergeResult(Result):
    """What :func:`batchnorm.statistics.merge.merge` made.

    Attributes:
        model: the merged model.
        weights: one a model, adding up to 1.
        layers: the norms whose statistics were merged.
        averaged: how many parameters and other floating-point buffers were averaged.
    """

    def __init__(
        self, model: Module, weights: Sequence[float], layers: Sequence[MergedStatistics], *, averaged: int
    ) -> None:
        self.model = model
        self.weights = tuple(weights)
        self.layers = tuple(layers)
        self.averaged = averaged

    @property
    def advice(self) -> str:
        """What the merged statistics are, how far they may be trusted, and what to do about it."""
        if not self.layers:
            return "The model keeps no running statistics, so none had to be merged."
        if self._alike:
            return (
                "No mean differs between the models, in any norm, so that nothing of a variance lies between them. Are "
                "they different models, or one under several names?"
            )
        shares = max(self.layers, key=lambda layer: float(layer.between_share.max()))
        wide = max(self.layers, key=lambda layer: float(layer.distance.max()))
        return (
            "The running statistics describe the mixture of what the models' norms meet, not what this model computes "
            f"with its averaged weights: up to {_percent(float(shares.between_share.max()))} of a variance "
            f"({shares.name or 'the norm'}) lies between the models, whose means are up to "
            f"{float(wide.distance.max()):.3g} standard deviations apart ({wide.name or 'the norm'}). Where data is at "
            "hand, measure them anew: batchnorm.recalibrate(result.model, batches)."
        )

    @property
    def _alike(self) -> bool:
        """Whether nothing lies between the models, in any norm."""
        return (
            all(bool((layer.distance == 0).all() and (layer.between_share == 0).all()) for layer in self.layers)
            and len(self.weights) > 1
        )

    def document(self) -> Document:
        """Return one row a norm: how much of its variance lies between the models, and how far their means are."""
        facts = Facts([("weights", ", ".join(f"{weight:.4g}" for weight in self.weights))])
        blocks: list[Block] = [facts, Paragraph(self.advice)]
        if self.layers and not self._alike:
            blocks.append(_layer_table([layer.to_dict() for layer in self.layers]))
        return Document(f"Merge {type(self.model).__name__}", self.summary, [Section("", blocks)])

    def to_dict(self) -> dict[str, Any]:
        """Return the model's class, the weights, the layers and the advice."""
        return {
            "verb": "merge",
            "model": type(self.model).__name__,
            "weights": list(self.weights),
            "averaged": self.averaged,
            "layers": [layer.to_dict() for layer in self.layers],
            "advice": self.advice,
        }

    @property
    def summary(self) -> str:
        """The result in one line."""
        models, norms = len(self.weights), len(self.layers)
        return (
            f"{models} model{'s' * (models != 1)} merged: {self.averaged} tensors averaged, the statistics of {norms} "
            f"norm{'s' * (norms != 1)} mixed."
        )


def _percent(share: float) -> str:
    """Return a share with the digits that tell it from nothing."""
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"


def _layer_table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = {
        "name": "layer",
        "largest_between_share": "largest share between",
        "mean_between_share": "mean share between",
        "largest_distance": "largest distance (σ)",
    }
    caption = (
        "Share of the merged variance that lies between the models; distance of the models' means in standard "
        "deviations within a model; over the channels."
    )
    return Table(
        tuple(columns.values()),
        [tuple(row[key] for key in columns) for row in rows],
        caption=caption,
        shown=foremost([math.inf if row["largest_distance"] is None else row["largest_distance"] for row in rows]),
    )
