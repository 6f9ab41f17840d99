"""``--data``: batches from an .npz file, or from the user's own loader."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.conv import _ConvNd

from batchnorm.cli.errors import CommandError, reason
from batchnorm.cli.load.objects import call_factory, find_object
from batchnorm.cli.output import note
from batchnorm.report.provenance import source

__all__ = ["ArrayBatches", "device_of", "doubt", "dtype_of", "load_batches"]

_PREFERRED = ("x", "inputs")
_doubt: ContextVar[str] = ContextVar("_doubt", default="")


class ArrayBatches:
    """An array of samples cut into batches; the last one may be smaller."""

    def __init__(self, array: Tensor, batch_size: int) -> None:
        self._batches = array.split(batch_size)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        """Iterate over the batches, from the first each time."""
        return iter(self._batches)


def load_batches(spec: str, model: Module, *, batch_size: int = 64) -> Iterable[Any]:
    """Return the batches that ``spec`` names.

    Args:
        spec: a file ``*.npz``; or ``package.module:name`` of an iterable, or of a callable that returns one.
        model: whose floating dtype and device the arrays of a file take.
        batch_size: samples in a batch cut from a file.

    Raises:
        CommandError: no such file or name, damaged, or not an iterable.
    """
    source("data", spec)
    _doubt.set("")
    if spec.endswith(".npz"):
        array = _read_npz(Path(spec))
        _doubt.set(_doubts(spec, array, model))
        tensor = torch.from_numpy(array)
        dtype = dtype_of(model) if tensor.is_floating_point() else tensor.dtype
        return ArrayBatches(tensor.to(device=device_of(model), dtype=dtype), batch_size)
    if ":" not in spec:
        raise CommandError(f"--data {spec}: expected a file that ends in .npz, or MODULE:NAME, such as net:batches.")
    found = find_object("--data", spec)
    if not isinstance(found, Iterable) and callable(found):
        found = call_factory("--data", spec, found)
    if not isinstance(found, Iterable) or isinstance(found, str | bytes):
        raise CommandError(f"--data {spec}: expected an iterable of batches; got an object of {_type(found)}.")
    if isinstance(found, Tensor):
        raise CommandError(
            f"--data {spec}: expected an iterable of batches; got one tensor of shape {tuple(found.shape)}. "
            "Return a list of batches, such as list(x.split(64))."
        )
    return found


def doubt() -> str:
    """Return what about the array that was read last may be why a model failed on it, as sentences; "" for nothing."""
    return _doubt.get()


def _doubts(spec: str, array: np.ndarray[Any, np.dtype[Any]], model: Module) -> str:
    """Return what about an array does not go with the model's first layer.

    It is no error: a model may turn pictures of bytes into floats, or move the channels, itself.
    """
    said = []
    layers = list(model.modules())
    if array.dtype.kind in "iub" and not any(isinstance(m, torch.nn.Embedding | torch.nn.EmbeddingBag) for m in layers):
        scaled = " / 255, or scaled as in training" if array.dtype == np.uint8 else ""
        said.append(
            f"The data in {spec} are {array.dtype}; a model takes floats, unless it converts them itself: save "
            f"x.astype('float32'){scaled}."
        )
    first = next((m for m in layers if isinstance(m, _ConvNd)), None)
    if first is not None and array.ndim == len(first.kernel_size) + 2:
        channels = first.in_channels
        if array.shape[1] != channels and array.shape[-1] == channels:
            order = (0, array.ndim - 1, *range(1, array.ndim - 1))
            said.append(
                f"Channels last? The first convolution takes {channels} channels, which the last axis of the data has, "
                f"of shape {array.shape}, and not the second: save x.transpose{order}."
            )
    return " ".join(said)


def dtype_of(model: Module) -> torch.dtype:
    """Return the dtype of the model's first floating parameter; the default dtype where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def device_of(model: Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU where it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _read_npz(path: Path) -> np.ndarray[Any, np.dtype[Any]]:
    if not path.exists():
        raise CommandError(f"--data {path}: no such file.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            name = _pick(path, list(archive.files))
            array: np.ndarray[Any, np.dtype[Any]] = archive[name]
    except ValueError as error:
        # numpy takes whatever it does not know for a pickle
        if "allow_pickle" not in str(error) or not zipfile.is_zipfile(path):
            raise CommandError(_damaged(path, error)) from error
        raise CommandError(
            f"--data {path}: it holds Python objects, which only unpickling would read, and that can run any code; "
            "save an array of numbers."
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, MemoryError) as error:
        raise CommandError(_damaged(path, error)) from error
    except OSError as error:
        raise CommandError(f"--data {path}: {error.strerror or reason(error)}.") from error
    if array.ndim == 0 or array.dtype.kind not in "fiub":
        raise CommandError(
            f"--data {path}: expected an array of numbers with the samples along its first axis; its array {name!r} "
            f"is of dtype {array.dtype} and shape {array.shape}."
        )
    if not len(array):
        raise CommandError(f"--data {path}: its array {name!r} has no sample; at least one batch is needed.")
    # torch has no tensor of another byte order, nor of the wider floats
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return native.astype(np.float64) if native.dtype.kind == "f" and native.dtype.itemsize > 8 else native


def _pick(path: Path, names: list[str]) -> str:
    if not names:
        raise CommandError(f"--data {path}: it holds no array; save one with numpy.savez({path.name!r}, x=array).")
    name = next((n for n in _PREFERRED if n in names), names[0])
    if len(names) > 1:
        note(f"{path}: taking its array {name!r} of {', '.join(names)}.")
    return name


def _damaged(path: Path, error: Exception) -> str:
    return f"--data {path}: not a complete .npz file ({type(error).__name__}); it may be cut short or not one at all."


def _type(found: object) -> str:
    return f"type {type(found).__name__}"
