"""``--weights``: read a state dict without running anything that the file contains, and fit it to the model."""

from __future__ import annotations

import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from batchnorm.cli.errors import CommandError, reason
from batchnorm.cli.output import note
from batchnorm.errors import closest
from batchnorm.files.tensor_memory import Footprint, footprint
from batchnorm.models.prefixes import wrapper_prefix
from batchnorm.report.provenance import source

__all__ = ["fit_weights", "read_weights"]

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
# where training scripts and frameworks put the state dict inside a checkpoint
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Return the state dict in a file.

    Raises:
        CommandError: no such file, another suffix, damaged, or holding more than tensors.
    """
    source("weights", str(path))
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        program = " A .pt2 is a program with its weights: give it as --model." if path.suffix == ".pt2" else ""
        raise CommandError(
            f"--weights {path}: expected a file that ends in .safetensors, {', '.join(TORCH_SUFFIXES[:-1])} or "
            f"{TORCH_SUFFIXES[-1]}; got {path.suffix or 'no suffix'}.{program}"
        )
    if not path.exists():
        raise CommandError(f"--weights {path}: no such file.")
    if not path.is_file():
        raise CommandError(f"--weights {path}: expected a file; this is a directory.")
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return _unwrap(path, found)


def fit_weights(model: Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load the state into the model, every entry of both.

    Raises:
        CommandError: entries are missing, unknown, or of another shape.
    """
    state = _without_prefix(model, state, path)
    own = model.state_dict()
    for name, value in state.items():
        mine = own.get(name)
        if isinstance(mine, Tensor) and not is_lazy(mine) and mine.shape != value.shape:
            raise CommandError(
                f"--weights {path}: {name} has shape {_shape(value)} in the file and {_shape(mine)} in "
                f"{type(model).__name__}."
            )
    try:
        outcome = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CommandError(f"--weights {path}: {reason(error)}.") from error
    # a tied tensor may be stored under one of its names only: the other is filled with it
    filled = {_address(own[name]) for name in state if name in own} - {None}
    missing = [name for name in outcome.missing_keys if _address(own[name]) not in filled]
    unexpected = list(outcome.unexpected_keys)
    if missing or unexpected:
        raise CommandError(f"--weights {path} does not fit {type(model).__name__}: {_misfits(missing, unexpected)}.")


def _address(entry: Any) -> Footprint | None:
    """Return where a tensor's values are; None for what has none."""
    has_values = isinstance(entry, Tensor) and not is_lazy(entry) and entry.data_ptr() != 0
    return footprint(entry) if has_values else None


def _misfits(missing: list[str], unexpected: list[str]) -> str:
    said = []
    if missing:
        said.append(f"{_entries(missing)} of the model not in the file, first {missing[0]!r}")
    if unexpected:
        hint = closest(unexpected[0], missing).replace("; did you mean", ", perhaps for") if missing else ""
        said.append(f"{_entries(unexpected)} of the file not in the model, first {unexpected[0]!r}{hint.rstrip('?')}")
    return "; ".join(said)


def _entries(names: list[str]) -> str:
    return "1 entry" if len(names) == 1 else f"{len(names)} entries"


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "()"


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CommandError(
            f"--weights {path}: not a complete safetensors file ({reason(error)}); it may be cut short."
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():  # of a TorchScript archive, which is refused below
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CommandError(f"--weights {path}: {error.strerror or reason(error)}.") from error
    except pickle.UnpicklingError as error:
        if _holds_objects(error):
            raise CommandError(
                f"--weights {path}: it holds Python objects, which only unpickling would read, and that can run any "
                "code; save model.state_dict() instead of the model."
            ) from error
        raise CommandError(_damaged(path, error)) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        if "TorchScript" in str(error):
            raise CommandError(
                f"--weights {path}: it is a TorchScript program; expected a state dict. "
                "Save torch.jit.load(file).state_dict()."
            ) from error
        raise CommandError(_damaged(path, error)) from error


def _holds_objects(error: pickle.UnpicklingError) -> bool:
    said = str(error)
    return any(sign in said for sign in ("Unsupported global", "Unsupported operand", "Unsupported class", "GLOBAL"))


def _damaged(path: Path, error: Exception) -> str:
    return f"--weights {path}: not a complete file of torch.save ({type(error).__name__}); it may be cut short."


def _unwrap(path: Path, found: Any) -> Mapping[str, Tensor]:
    """Return the state dict inside what a checkpoint holds."""
    if isinstance(found, Mapping):
        for key in _WRAPPERS:
            inner = found.get(key)
            if isinstance(inner, Mapping):
                note(f"{path}: taking its entry {key!r}.{_others(path, found, key)}")
                found = inner
                break
    if not isinstance(found, Mapping) or not found:
        kind = "nothing" if isinstance(found, Mapping) else f"an object of type {type(found).__name__}"
        raise CommandError(f"--weights {path}: expected a state dict, tensors by name; got {kind}.")
    tensors = {name: value for name, value in found.items() if not str(name).endswith("_extra_state")}
    odd = _first(name for name, value in tensors.items() if not isinstance(value, Tensor))
    if odd is not None:
        raise CommandError(
            f"--weights {path}: expected tensors by name; its entry {odd!r} is of type {type(found[odd]).__name__}."
        )
    return found


def _others(path: Path, found: Mapping[Any, Any], taken: str) -> str:
    """Return which other entries of a checkpoint are state dicts, such as averaged weights, and how to take one."""
    others = [key for key, value in found.items() if key != taken and _is_state(value)]
    if not others:
        return ""
    are = "another state dict" if len(others) == 1 else "other state dicts"
    return (
        f" {', '.join(map(repr, others))}: {are} in it; to take one: "
        f"torch.save(torch.load({path.name!r})[{others[0]!r}], {f'{others[0]}.pth'!r})."
    )


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping) and len(value) > 0 and all(isinstance(tensor, Tensor) for tensor in value.values())
    )


def _without_prefix(model: Module, state: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor]:
    prefix = wrapper_prefix(state, model.state_dict())
    if not prefix:
        return state
    note(f"{path}: its names start with {prefix!r}, as of a wrapped model; read without it.")
    return _cut_prefix(state, prefix)


def _cut_prefix(state: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    cut = OrderedDict((name.removeprefix(prefix), value) for name, value in state.items())
    # load_state_dict reads each module's format version here, by the module's name
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        renamed = {f"{name}.".removeprefix(prefix).rstrip("."): version for name, version in versions.items() if name}
        cut._metadata = renamed  # type: ignore[attr-defined]
    return cut


def _first(items: Iterable[Any]) -> Any:
    return next(iter(items), None)
