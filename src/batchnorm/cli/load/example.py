"""``--input``, ``--data`` and ``--example``: what the model is run on once, and what else it is run on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from batchnorm.cli.errors import CommandError, reason
from batchnorm.cli.load.batches import device_of, dtype_of, load_batches
from batchnorm.errors import closest
from batchnorm.report.provenance import source

__all__ = ["load_example", "load_examples", "random_input"]

_SHAPE = r"\s*\d+(\s*[,x×]\s*\d+)*\s*"

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
}


def load_example(
    model: Module, inputs: Sequence[str] | None, data: str | None = None, *, batch_size: int = 64, seed: int = 0
) -> tuple[Any, ...] | dict[str, Any]:
    """Return the arguments to call ``model`` with once: a tuple of positional ones, or a dict of keyword ones.

    Args:
        model: whose floating dtype and device the random inputs take.
        inputs: one shape for each argument, such as ``"8,3,224,224"`` or ``"8,16:int64"``.
        data: instead, where the first batch is taken from; see :func:`load_batches`.
        batch_size: samples in a batch cut from a file.
        seed: of the random inputs.

    Raises:
        CommandError: neither or both are given, or one cannot be used.
    """
    if inputs and data is not None:
        raise CommandError("--input and --data: give one of them; --data takes its first batch as the example input.")
    if inputs:
        source("data", f"random numbers, seed {seed}")
        generator = torch.Generator().manual_seed(seed)
        return tuple(random_input(shape, dtype_of(model), generator).to(device_of(model)) for shape in inputs)
    if data is None:
        raise CommandError("--input or --data is needed, to run the model once: such as --input 8,3,224,224.")
    return _arguments(data, _first_batch(data, load_batches(data, model, batch_size=batch_size)))


def load_examples(
    model: Module, sources: Sequence[str] | None, *, batch_size: int = 64, seed: int = 0
) -> list[tuple[Any, ...] | dict[str, Any]]:
    """Return further arguments to call ``model`` with, one set for each source.

    Args:
        model: whose floating dtype and device the random inputs take.
        sources: shapes as of ``--input``, with a semicolon between those of several arguments; or where a first batch
            is taken from, as ``--data`` says.
        batch_size: samples in a batch cut from a file.
        seed: of the random inputs; each source has another.

    Raises:
        CommandError: one cannot be used.
    """
    found = []
    for number, one in enumerate(sources or (), start=1):
        shapes = one.split(";")
        are_shapes = all(re.fullmatch(f"{_SHAPE}(:.*)?", shape) for shape in shapes)
        given: tuple[Any, Any] = (shapes, None) if are_shapes else (None, one)
        try:
            found.append(load_example(model, *given, batch_size=batch_size, seed=seed + number))
        except CommandError as error:
            raise CommandError(re.sub("^--(input|data) ", "--example ", str(error))) from error
    return found


def random_input(spec: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return a random tensor of a shape, standard normal; zeros and ones for an integer dtype.

    >>> random_input("2,3:int64", torch.float32, torch.Generator()).shape
    torch.Size([2, 3])
    """
    shape, colon, named = spec.partition(":")
    if not re.fullmatch(_SHAPE, shape):
        raise CommandError(f"--input {spec}: expected sizes between commas, such as 8,3,224,224.")
    sizes = [int(size) for size in re.split("[,x×]", shape)]
    if 0 in sizes:
        raise CommandError(f"--input {spec}: every size must be 1 or more.")
    if colon and named not in _DTYPES:
        raise CommandError(f"--input {spec}: no dtype {named!r}{closest(named, _DTYPES)}; one of {', '.join(_DTYPES)}.")
    dtype = _DTYPES[named] if colon else dtype
    try:
        if dtype.is_floating_point:
            return torch.randn(sizes, generator=generator, device="cpu").to(dtype)
        return torch.randint(0, 2, sizes, generator=generator, device="cpu").to(dtype)
    except (RuntimeError, MemoryError, TypeError) as error:  # torch's allocator raises RuntimeError
        raise CommandError(f"--input {spec}: a tensor of this size cannot be made ({reason(error)}).") from error


def _first_batch(data: str, batches: Iterable[Any]) -> Any:
    try:
        for batch in batches:
            return batch
    except Exception as error:
        raise CommandError(f"--data {data}: the loader raised {reason(error)} before its first batch.") from error
    raise CommandError(f"--data {data}: no batch in it; at least one is needed.")


def _arguments(data: str, batch: Any) -> tuple[Any, ...] | dict[str, Any]:
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor | Mapping):
        return _arguments(data, batch[0])
    raise CommandError(
        f"--data {data}: expected batches that are a tensor, a tuple with the inputs first, or a dict of keyword "
        f"inputs; the first is of type {type(batch).__name__}."
    )
