"""Tensors by name in a safetensors file of this library's, with a checksum: the format itself has none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.files.failures import system_error
from batchnorm.files.replace import replacing
from batchnorm.files.tensor_memory import bytes_of

__all__ = ["read_tensors", "write_tensors"]

_KEY = "batchnorm"


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], about: str = "") -> None:
    """Write a file, whole or not at all.

    Args:
        path: where.
        kind: what the file is known by when it is read.
        tensors: what is in it, by name; some may share memory.
        about: a text that goes with them.

    Raises:
        OSError: it cannot be written there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # clones: the format holds no memory twice
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    with replacing(path) as fresh:
        try:
            # one text: the library writes several in any order, and the file would never be the same twice
            known = {"format": kind, "about": about, "checksum": _checksum(copies, about)}
            save_file(copies, fresh, {_KEY: json.dumps(known)})
        except SafetensorError as error:  # what Rust makes of a disk that is full
            raise system_error(error, fresh) or OSError(f"{path} cannot be written ({error})") from error


def read_tensors(path: str | Path, kind: str, what: str) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a file by name, and the text that goes with them.

    Args:
        path: the file.
        kind: as it was written.
        what: what it holds, and who writes it, for a sentence: ``"a population that Population.save wrote"``.

    Raises:
        InputError: it is another file, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = _metadata(file.metadata() or {})
            known = metadata.get("format") == kind
            tensors = {key: file.get_tensor(key) for key in list(file.keys())} if known else {}
    except SafetensorError as error:
        raise InputError(f"{path}: expected {what}; it is no complete safetensors file ({error}).") from error
    if not known:
        raise InputError(
            f"{path}: expected {what}; the file holds something else. Weights are loaded with model.load_state_dict."
        )
    about = metadata.get("about", "")
    if metadata.get("checksum") != _checksum(tensors, about):
        raise InputError(f"{path}: expected {what}; its contents have changed since. Write it again.")
    return tensors, about


def _metadata(found: Mapping[str, str]) -> Mapping[str, Any]:
    """Return what was written beside the tensors: in one text, or in several before 0.1.0."""
    try:
        known = json.loads(found[_KEY]) if _KEY in found else found
    except (ValueError, RecursionError):
        return {}
    return known if isinstance(known, Mapping) and isinstance(known.get("about", ""), str) else {}


def _checksum(tensors: Mapping[str, Tensor], about: str) -> str:
    known = hashlib.sha256(about.encode(errors="surrogatepass"))  # half a character, which JSON may hold
    for key, tensor in sorted(tensors.items()):
        known.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        known.update(bytes_of(tensor).numpy().tobytes())
    return known.hexdigest()
