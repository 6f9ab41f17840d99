"""A program read from a file: first every part of the archive is looked at, then it is loaded from the same bytes."""

from __future__ import annotations

import contextlib
import io
import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

import torch
from torch.export import ExportedProgram

from batchnorm.files.program.text import PICKLED, UntrustedError, look_into_config, look_into_graph

__all__ = ["read_program"]


def read_program(path: str | Path) -> ExportedProgram:
    """Return the program that ``torch.export.save`` wrote to a file, if all it holds is operators and tensors.

    ``torch.export.load`` unpickles, compiles and imports what a file tells it to. So the archive is read into memory
    and looked at: that nothing in it is pickled but plain containers of tensors, that its text names operators, sizes
    and words only, that it holds no compiled code, and that it unpacks to no more than its own size. What was looked at
    is what is loaded.

    Raises:
        InputError: the file holds something else, or is damaged. Nothing in it was run.
        OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        _look_into_archive(data)
    except UntrustedError as error:
        raise UntrustedError(
            f"{path}: expected a program that torch.export.save wrote, of operators and tensors; it holds {error}. "
            "Nothing in it was run. Where you trust the file, pass torch.export.load(path) to the function in Python."
        ) from error
    from torch.export.pt2_archive._package import load_pt2

    # what torch.export.load calls first: after an error it would go on to read the file as one of an older format
    with _weights_only():
        return load_pt2(io.BytesIO(data)).exported_programs["model"]


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Let no call of ``torch.load`` in this process unpickle more than tensors: a second lock on the same door."""
    force, forbid = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, forbid)}
    os.environ[force] = "1"
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _look_into_archive(data: bytes) -> None:
    _look_into_zip(data)
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))
        names = list(reader.get_all_records())
    except RuntimeError as error:
        raise UntrustedError("no archive of torch's") from error
    # what reads archives in Python and what reads them in C++ have to see the same one
    if sorted(names) != sorted(_without_root(data)):
        raise UntrustedError("records that not every reader of archives finds")
    if "archive_format" not in names:
        raise UntrustedError("what torch 2.7 or earlier wrote; load it there, and save it again")
    empty = {PurePosixPath(name).name for name in names if not reader.get_record_size(name)}
    for name in names:
        look = next((look for pattern, look in _RECORDS.items() if re.fullmatch(pattern, name)), None)
        if look is None:
            raise UntrustedError(f"{name!r}, {_told(name)}")
        if look is not _nothing:
            look(reader.get_record(name), empty)
    if "models/model.json" not in names:
        raise UntrustedError("no program of the name 'model'")


def _look_into_zip(data: bytes) -> None:
    """Refuse an archive that unpacks to more than it is, or that is damaged."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, UnicodeDecodeError) as error:
        raise UntrustedError("no complete archive; it may be cut short") from error
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise UntrustedError("compressed records")
    if sum(entry.file_size for entry in entries) > len(data):
        raise UntrustedError("records that unpack to more than the file holds")
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        raise UntrustedError("two records of one name")
    if any(".." in name.split("/") or name.startswith("/") or "\\" in name or "\0" in name for name in names):
        raise UntrustedError("a record that lies outside of the archive")


def _without_root(data: bytes) -> list[str]:
    """Return the names of an archive's records, within the one folder that holds them all."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
    root = names[0].partition("/")[0] if names else ""
    return [name.removeprefix(f"{root}/") if name.startswith(f"{root}/") else f"/{name}" for name in names]


def _look_into_pickle(data: bytes, empty: Collection[str]) -> None:
    """Refuse a file of ``torch.save`` that holds more than tensors in plain containers."""
    if not data:
        return
    _look_into_zip(data)
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise UntrustedError(f"Python objects, {PICKLED}") from error


def _nothing(data: bytes, empty: Collection[str]) -> None:
    """Tensors as bytes, and text that is not used."""


_RECORDS: Mapping[str, Callable[[bytes, Collection[str]], None]] = {
    r"models/[\w-]+\.json": lambda data, _: look_into_graph(data),
    r"data/weights/[\w-]+_weights_config\.json": lambda data, empty: look_into_config(data, "weight_", empty),
    r"data/constants/[\w-]+_constants_config\.json": lambda data, empty: look_into_config(data, "tensor_", empty),
    r"data/(weights|constants|sample_inputs)/[\w-]+\.pt": _look_into_pickle,
    r"data/weights/weight_\d+": _nothing,
    r"data/constants/tensor_\d+": _nothing,
    r"archive_format|archive_version|byteorder|version|\.data/\w+|extra/.*": _nothing,
}


def _told(name: str) -> str:
    if name.startswith("data/aotinductor"):
        return "which is compiled code"
    if "obj_" in name:
        return f"an object of a class of its own, {PICKLED}"
    return "which is no part of a program"
