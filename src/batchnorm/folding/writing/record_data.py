"""What the text in a file of pairs has to be: anybody can write one whose checksum is right."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import BatchNormError, InputError, StateError
from batchnorm.folding.writing.forms import (
    Holds,
    by_name,
    is_bool,
    is_name,
    is_number,
    is_number_from_zero,
    is_parameter,
    is_size,
    is_text,
    list_of,
    or_none,
)
from batchnorm.folding.writing.replacement_data import is_part

__all__ = ["fitting", "read_about"]

_FOLDABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_about(path: Any, text: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the text in a file of pairs as data, all of whose parts are there, of their types, and fit together.

    Args:
        path: of the file, for the message.
        text: what stands in it beside the tensors.
        tensors: those, by name.

    Raises:
        InputError: a part is missing, or is something else.
    """
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise _other(path, "its text is no JSON object")
    for part, holds in _PARTS.items():
        if not holds(about.get(part)):
            raise _other(path, f"its part {part!r} is {'missing' if part not in about else 'of another form'}")
    firsts = set(about["same"].values())
    if not firsts <= set(about["norms"]) & set(about["stays"]) or not set(about["norms"]) <= firsts:
        raise _other(path, "its norms are not those that its names stand for")
    of_parameters = {name.removeprefix("parameters/") for name in tensors if name.startswith("parameters/")}
    if of_parameters & set(about["added"]):
        raise _other(path, "a parameter is there that folding is said to have added")
    odd = next((name for name, tensor in tensors.items() if not _is_foldable(name, tensor)), None)
    if odd is not None:
        raise _other(path, f"its {odd} is of {tensors[odd].dtype}, or not finite, so that it was never folded")
    return about


@contextmanager
def fitting(verb: str) -> Iterator[None]:
    """Say of what fails in the body that the pairs are another model's: they name places that this one has not.

    Raises:
        StateError: in the place of the errors of Python and torch.
    """
    try:
        yield
    except BatchNormError:
        raise
    except (LookupError, AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        said = next(iter(str(error).splitlines()), "")[:200].rstrip(".")
        raise StateError(
            f"{verb}: the pairs do not go with this model ({type(error).__name__}: {said}). Pass those of its own fold."
        ) from error


def _other(path: Any, why: str) -> InputError:
    return InputError(f"{path}: expected the pairs of a fold, which FoldResult.save_pairs writes; {why}.")


def _is_foldable(name: str, tensor: Tensor) -> bool:
    """Whether folding computes with such a parameter, or such a tensor of a norm; others have a usual type."""
    if name.startswith("parameters/") or name.rpartition("/")[2] in ("running_mean", "running_var", "weight", "bias"):
        return tensor.dtype in _FOLDABLE and bool(torch.isfinite(tensor).all())
    if name.endswith("/num_batches_tracked"):
        return tensor.dtype == torch.int64
    return tensor.dtype in _FOLDABLE or not (tensor.is_floating_point() or tensor.is_complex())


def _is_norm(value: Any) -> bool:
    return isinstance(value, dict) and all(key in value and holds(value[key]) for key, holds in _NORM.items())


_NORM: Mapping[str, Holds] = {
    "class": is_text,
    "num_features": or_none(is_size),
    "eps": or_none(is_number_from_zero),
    "momentum": or_none(is_number),
    "affine": or_none(is_bool),
    "track_running_stats": or_none(is_bool),
}


_PARTS: Mapping[str, Holds] = {
    "added": by_name(list_of(is_size), is_parameter),
    "norms": by_name(_is_norm),
    "stays": by_name(list_of(is_part)),
    "same": by_name(is_name),
    "digests": by_name(is_text, is_parameter),
    "bordered": list_of(is_name),
    "ties": by_name(is_parameter, is_parameter),
    "moved": by_name(is_name),
}
