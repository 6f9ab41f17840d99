"""``--output``: a state dict, or a program that runs without the user's code."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import Module

from batchnorm.cli.errors import CommandError, reason
from batchnorm.cli.output import Files, note, writing

__all__ = ["save_model"]


def save_model(
    model: Module | ExportedProgram,
    path: Path | None,
    example: tuple[Any, ...] | dict[str, Any] | None = None,
    files: Files | None = None,
) -> None:
    """Write the model to the file of ``--output``, if there is one, all at once.

    ``.safetensors``, ``.pt`` and ``.pth`` take its state dict; ``.pt2`` takes a ``torch.export`` program made by
    running the model on ``example``, for any batch size where the example's is 2 or more and the model allows it.
    A program is written as it is.

    Args:
        model: what is written.
        path: where; None for nowhere.
        example: arguments to run it on.
        files: those that it takes its place together with.

    Raises:
        CommandError: the file cannot be written, or the model cannot be exported.
    """
    if path is None:
        return
    writer = _writer(model, path, example)
    if files is not None:
        files.write("--output", path, writer)
        return
    with writing() as alone:
        alone.write("--output", path, writer)


def _writer(model: Module | ExportedProgram, path: Path, example: Any) -> Callable[[Path], object]:
    if isinstance(model, ExportedProgram):
        return lambda fresh: _write_program(model, fresh)
    if path.suffix == ".pt2":
        program = _export(model, example)
        return lambda fresh: _write_program(program, fresh)
    state = model.state_dict()
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        tensors = _tensors(state)
        return lambda fresh: save_file(tensors, fresh)
    return lambda fresh: torch.save(state, fresh)


def _write_program(program: ExportedProgram, path: Path) -> None:
    memory = io.BytesIO()  # C++ writes the archive, and ends the process where it meets a full disk
    torch.export.save(program, memory)
    path.write_bytes(memory.getbuffer())


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    odd = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise CommandError(
            f"--output: the model's entry {odd!r} is of type {type(state[odd]).__name__}, and a .safetensors file "
            "takes tensors only; write a .pt file."
        )
    # each on its own memory: the format refuses tied tensors
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def _export(model: Module, example: Any) -> torch.export.ExportedProgram:
    args, kwargs = ((), example) if isinstance(example, Mapping) else (tuple(example), {})
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    batch = {len(tensor) for tensor in tensors}
    any_batch = len(batch) == 1 and batch.pop() > 1
    dynamic = _any_first_size(args, kwargs) if any_batch else None
    try:
        with _quiet():
            program = torch.export.export(model, args, dict(kwargs), dynamic_shapes=dynamic)
    except Exception as error:
        raise CommandError(
            f"--output: torch.export cannot export {type(model).__name__} ({reason(error)}); write its state dict, "
            "to a .safetensors or .pt file."
        ) from error
    if not any_batch:
        note("the program takes inputs of exactly the example's shape; a batch of 2 or more frees the batch size.")
    elif not program.range_constraints:  # torch.export takes a size that the model fixes for a constant, in silence
        note("the program takes inputs of exactly the example's shape: the model's code fixes the batch size.")
    _verify(model, program, args, kwargs)
    return program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what torch.export prints and logs when it fails: pages of its graph."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def _any_first_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    def free(value: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.ndim else None

    return (*(free(value) for value in args),) if args else {name: free(value) for name, value in kwargs.items()}


def _verify(
    model: Module, program: torch.export.ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    with torch.no_grad():
        expected, got = model(*args, **kwargs), program.module()(*args, **kwargs)
    try:
        torch.testing.assert_close(got, expected, equal_nan=True)
    except AssertionError as error:
        raise CommandError(
            f"--output: what torch.export made differs from the model, {reason(error)}; nothing was written."
        ) from error
