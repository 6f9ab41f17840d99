"""A population kept beside the model: what its norms met, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.files.tensor_file import read_tensors, write_tensors
from batchnorm.harmless import harmless
from batchnorm.moments import Moments

__all__ = ["LayerPopulation", "Population"]

_FORMAT = "batchnorm-population-1"
_PARTS = ("count", "mean", "m2", "mean_error", "variance_error")


@dataclass(frozen=True, eq=False)
class LayerPopulation:
    """What one norm met, or another module.

    Attributes:
        moments: of all values, per channel.
        mean_error: standard error of the mean, float64, (C,).
        variance_error: standard error of the variance (divisor n), float64, (C,).
        batches: how many batches the values came in.
        of_norm: whether it was a norm; None where that is not known, in files of before 0.1.0. A norm is given what it
            is to normalize, the identity in the place of a folded one what the norm would have returned.
    """

    moments: Moments
    mean_error: Tensor
    variance_error: Tensor
    batches: int
    of_norm: bool | None = None

    def __repr__(self) -> str:
        """Return one line, however many channels there are."""
        return f"LayerPopulation({self.moments.num_features} channels, {_values(self)}, {_batches(self.batches)})"

    def batch_spread(self) -> tuple[Tensor, Tensor]:
        r"""Return the standard deviations of a batch's mean and variance (divisor m), (C,), for batches like those.

        .. math:: \sqrt{B}\;\mathrm{se}(\mathrm{mean}) \qquad \sqrt{B}\;\mathrm{se}(v)

        for B batches of about one size: what a new batch of the same data may be off by.
        """
        root = self.batches**0.5
        return self.mean_error * root, self.variance_error * root

    def effective_values(self) -> Tensor:
        r"""Return how many independent values would leave the mean as uncertain: v / se(mean)²."""
        return self.moments.variance() / self.mean_error.square()


@dataclass(frozen=True, eq=False)
class Population:
    r"""The moments that the norms of a model met, with their sampling errors, as a file beside its weights.

    A state dict has no room for them, and one with new keys would not load elsewhere; so they are a file of their own,
    in the safetensors format: ``{name}/count``, ``/mean``, ``/m2`` (sum of squared deviations, no divisor),
    ``/mean_error``, ``/variance_error``, float64, (C,), and the numbers ``/batches`` and ``/of_norm``.

    Attributes:
        layers: by the norm's name.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from batchnorm.statistics import Population, recalibrate
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> result = recalibrate(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[3.0], [5.0]])])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = result.population.save(Path(folder) / "population.safetensors")
        ...     kept = Population.load(path).layers["0"]
        >>> kept.moments, kept.mean_error
        (Moments(count=[4.0], mean=[3.0], m2=[8.0]), tensor([1.], dtype=torch.float64))
    """

    layers: Mapping[str, LayerPopulation]

    def __repr__(self) -> str:
        """Return one line, however many norms and channels there are."""
        count = len(self.layers)
        shown = ", ".join(harmless(name) or "the model" for name in list(self.layers)[:3]) + ", ..." * (count > 3)
        most = max(self.layers.values(), key=lambda layer: layer.batches, default=None)
        met = "" if most is None else f": {shown}; {_values(most)}, {_batches(most.batches)}"
        return f"<Population of {count} layer{'s' * (count != 1)}{met}>"

    def _repr_html_(self) -> str:
        """Return the same for a notebook."""
        return f"<code>{escape(repr(self))}</code>"

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all, and return its path."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            parts = (*layer.moments.state_dict().values(), layer.mean_error, layer.variance_error)
            tensors |= {f"{name}/{part}": t for part, t in zip(_PARTS, parts, strict=True)}
            tensors[f"{name}/batches"] = torch.tensor(layer.batches, device="cpu")
            if layer.of_norm is not None:
                tensors[f"{name}/of_norm"] = torch.tensor(layer.of_norm, device="cpu")
        write_tensors(Path(path), _FORMAT, tensors)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Population:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file is another one, or damaged.
        """
        tensors, _ = read_tensors(path, _FORMAT, "a population that Population.save wrote")
        names = dict.fromkeys(key.rpartition("/")[0] for key in tensors)
        odd = next((name for name in names if not _is_layer(name, tensors)), None)
        if odd is not None:
            raise InputError(
                f"{path}: expected a population that Population.save wrote; of {odd!r} it does not hold the six "
                "tensors that belong to a norm, all but one of float64 and of one length, or a count, a sum of squares "
                "or an error in it is none."
            )
        return cls({name: _layer(name, tensors) for name in names})


def _is_layer(name: str, tensors: Mapping[str, Tensor]) -> bool:
    parts = [tensors.get(f"{name}/{part}") for part in _PARTS]
    batches = tensors.get(f"{name}/batches")
    shapes = {None if part is None or part.dtype != torch.float64 else tuple(part.shape) for part in parts}
    is_whole = (
        len(shapes) == 1 and None not in shapes and all(shape is not None and len(shape) == 1 for shape in shapes)
    )
    of_norm = tensors.get(f"{name}/of_norm", torch.tensor(True, device="cpu"))
    kind_is_known = of_norm.shape == () and of_norm.dtype == torch.bool
    has_batches = batches is not None and batches.shape == () and batches.dtype == torch.int64 and int(batches) >= 0
    return is_whole and has_batches and kind_is_known and _can_be(name, tensors)


def _can_be(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the numbers can be counts, sums of squares and errors; where NaN was met, all but counts are NaN."""
    count, _, *never_negative = (tensors[f"{name}/{part}"] for part in _PARTS)
    is_count = torch.isfinite(count).all() and (count >= 0).all()
    return bool(is_count) and not any(bool((t < 0).any()) for t in never_negative)


def _layer(name: str, tensors: Mapping[str, Tensor]) -> LayerPopulation:
    count, mean, m2, mean_error, variance_error = (tensors[f"{name}/{part}"] for part in _PARTS)
    of_norm = tensors.get(f"{name}/of_norm")
    return LayerPopulation(
        Moments(count, mean, m2),
        mean_error,
        variance_error,
        int(tensors[f"{name}/batches"]),
        None if of_norm is None else bool(of_norm),
    )


def _values(layer: LayerPopulation) -> str:
    most = int(layer.moments.count.max()) if layer.moments.num_features else 0
    return f"{most:,} value{'s' * (most != 1)} a channel"


def _batches(count: int) -> str:
    return f"{count:,} batch{'es' * (count != 1)}"
