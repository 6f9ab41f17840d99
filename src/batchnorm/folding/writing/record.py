"""What a model had before it was folded: in memory, or in a file beside the folded weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Module, Parameter, SyncBatchNorm

from batchnorm.errors import ArgumentTypeError, InputError, StateError
from batchnorm.files.tensor_file import read_tensors, write_tensors
from batchnorm.files.tensor_memory import bytes_of
from batchnorm.folding.planning.own_weights import ties
from batchnorm.folding.planning.replacement import Replacement
from batchnorm.folding.writing.record_data import read_about
from batchnorm.folding.writing.replacement_data import Part, from_data, to_data
from batchnorm.models.copying import copy_model
from batchnorm.models.modules import twin
from batchnorm.models.parameters import find_tensor, is_within, qualified

if TYPE_CHECKING:
    from batchnorm.folding.planning.multiply_add import MultiplyAdd

__all__ = ["FoldRecord", "digest"]

_FORMAT = "batchnorm-pairs-1"
_PLAIN: Mapping[str, type[Module]] = {
    cls.__name__: cls for cls in (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)
}
"""Norms that are built from their settings; those of other classes need a model that has one."""
_KEEP = "Keep the original model instead."
_SETTINGS = ("num_features", "eps", "momentum", "affine", "track_running_stats")


@dataclass(frozen=True, eq=False)
class FoldRecord:
    """What a model had before it was folded.

    Attributes:
        parameters: the parameters that have been folded into, by name, as they were; None where there was none.
        norms: the modules that have gone, by every name that they were registered under: norms, and layers that
            computed their weight, in whose place plain ones stand.
        digests: of the parameters as folding left them in the model, by name: one that has others was trained since.
        bordered: names of the convolutions that pad with other values than zeros since.
        stays: what stands in the place of each of these modules, by the same names.
        added: shapes of the parameters that there were none of.
        ties: parameters that were another one, by name: its name.
        moved: names of the activations that have become part of what took a norm's place, and the name of that.
    """

    parameters: Mapping[str, Tensor | None]
    norms: Mapping[str, Module]
    digests: Mapping[str, str]
    bordered: tuple[str, ...]
    stays: Mapping[str, Replacement]
    added: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, str] = field(default_factory=dict)
    moved: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Module,
        parameters: Mapping[str, Parameter],
        norms: Iterable[tuple[Module, Replacement]],
        bordered: Iterable[str],
        multiply_adds: Sequence[MultiplyAdd] = (),
    ) -> FoldRecord:
        """Return what is about to be replaced in a model.

        Args:
            model: the model, not folded yet.
            parameters: its new parameters, by name.
            norms: the modules that go, and those that are replaced as a whole, each with what is to stand there.
            bordered: names of the convolutions that are to pad with a border.
            multiply_adds: of its norms, those that are to become one.
        """
        going = {id(norm): stays for norm, stays in norms}
        convs = {id(model.get_submodule(name)) for name in bordered}
        everywhere = list(model.named_modules(remove_duplicate=False))
        padded = tuple(name for name, m in everywhere if id(m) in convs)
        places = {name: m for name, m in everywhere if id(m) in going}
        stays = {name: going[id(module)] for name, module in places.items()}
        of_plain = {name for name in parameters if _is_of(stays.get(name.rpartition(".")[0]), name)}
        old = {name: find_tensor(model, name) for name in parameters if name not in of_plain}
        # a norm that takes in another one and then goes itself leaves no parameter behind to be recognized by
        staying = {n: p for n, p in parameters.items() if n in of_plain or n.rpartition(".")[0] not in places}
        twins = {id(module): twin(module) for module in places.values()}  # the model itself becomes what is to stand
        for item in multiply_adds:
            built = item.build(model).named_parameters(recurse=False)
            staying |= {qualified(item.module, slot): parameter for slot, parameter in built}
        activations = {id(model.get_submodule(i.moved)): i.module for i in multiply_adds if i.moved is not None}
        return cls(
            old,
            {name: twins[id(module)] for name, module in places.items()},
            {name: digest(new) for name, new in staying.items()},
            padded,
            stays,
            {name: tuple(p.shape) for name, p in staying.items() if name in old and old[name] is None},
            {
                name: other
                for name, other in ties(model).items()
                if any(n in old or any(is_within(n, place) for place in places) for n in (name, other))
            },
            {name: activations[id(module)] for name, module in everywhere if id(module) in activations},
        )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all, and return its path."""
        tensors = {f"parameters/{name}": t for name, t in self.parameters.items() if t is not None}
        first: dict[int, str] = {}
        same = {name: first.setdefault(id(norm), name) for name, norm in self.norms.items()}
        for name in first.values():
            tensors |= {f"norms/{name}/{key}": t for key, t in self.norms[name].state_dict().items()}
        about = {
            "added": dict(self.added),
            "norms": {name: _settings(self.norms[name]) for name in first.values()},
            "stays": {name: to_data(self.stays[name]) for name in first.values()},
            "same": same,
            "digests": dict(self.digests),
            "bordered": list(self.bordered),
            "ties": dict(self.ties),
            "moved": dict(self.moved),
        }
        write_tensors(Path(path), _FORMAT, tensors, json.dumps(about))
        return Path(path)

    @classmethod
    def given(cls, verb: str, pairs: FoldRecord | str | Path, like: Module | None) -> FoldRecord:
        """Return what a verb was given: pairs, or those of the file.

        Raises:
            ArgumentTypeError: it is neither, as ``FoldResult.pairs`` is None where nothing was folded.
            InputError, StateError: as of :meth:`load`.
        """
        if isinstance(pairs, FoldRecord):
            return pairs
        if isinstance(pairs, str | os.PathLike):
            return cls.load(pairs, like)
        raise ArgumentTypeError(
            f"{verb}: expected the pairs of a fold or the path of their file; got {type(pairs).__name__}. "
            "FoldResult.pairs has them, FoldResult.save_pairs writes them; where nothing was folded there are none."
        )

    @classmethod
    def load(cls, path: str | Path, like: Module | None = None) -> FoldRecord:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            like: a model of the original architecture; where the norms are of a class that is not torch's, they are
                copied from it.

        Raises:
            InputError: the file is another one, or damaged.
            StateError: a norm is of a class that is not torch's, and ``like`` has none in its place.
        """
        tensors, text = read_tensors(path, _FORMAT, "the pairs of a fold, which FoldResult.save_pairs writes")
        about = read_about(path, text, tensors)
        parameters = {key.removeprefix("parameters/"): t for key, t in tensors.items() if key.startswith("parameters/")}
        try:
            built = {name: _build(name, settings, tensors, like) for name, settings in about["norms"].items()}
            _require_sizes(about["stays"], tensors)
            stays = {name: from_data(parts) for name, parts in about["stays"].items()}
        except StateError:
            raise
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:  # of torch's own layers
            raise InputError(
                f"{path}: expected the pairs of a fold, which FoldResult.save_pairs writes; a module in it cannot be "
                f"built ({type(error).__name__})."
            ) from error
        norms = {name: built[first] for name, first in about["same"].items()}
        added = {name: tuple(shape) for name, shape in about["added"].items()}
        return cls(
            {**parameters, **dict.fromkeys(added)},
            norms,
            about["digests"],
            tuple(about["bordered"]),
            {name: stays[first] for name, first in about["same"].items()},
            added,
            about["ties"],
            about["moved"],
        )


def _is_of(stays: Replacement | None, name: str) -> bool:
    """Whether a parameter of that name is one of what stands in for a module."""
    parts = () if stays is None else stays.parts
    return any(isinstance(part, Module) and name.rpartition(".")[2] in part._parameters for part in parts)


def digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's values and type."""
    return hashlib.sha256(bytes_of(tensor).cpu().numpy().tobytes() + str(tensor.dtype).encode()).hexdigest()


def _require_sizes(stays: Mapping[str, Sequence[Part]], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a multiply-add of other channels than its norm had.

    Raises:
        ValueError: there is one.
    """
    for name, parts in stays.items():
        known = {t.numel() for key, t in tensors.items() if key.rpartition("/")[0] == f"norms/{name}"}
        for part in parts:
            if not isinstance(part, str) and "channels" in part and part["channels"] not in known:
                raise ValueError(f"{name} had other channels")


def _settings(norm: Module) -> dict[str, Any]:
    name = f"{type(norm).__module__}.{type(norm).__qualname__}"
    if _plain(name) is None:  # settings of other classes are not read, and may be of any type
        return {"class": name, **dict.fromkeys(_SETTINGS)}
    known = {key: getattr(norm, key) for key in _SETTINGS}
    momentum = None if known["momentum"] is None else float(known["momentum"])
    return {"class": name, **known, "eps": float(known["eps"]), "momentum": momentum}


def _plain(name: str) -> type[Module] | None:
    """Return the class of that full name, if settings alone build its norms."""
    kind = _PLAIN.get(name.rpartition(".")[2])
    return kind if kind is not None and name == f"{kind.__module__}.{kind.__qualname__}" else None


def _build(name: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], like: Module | None) -> Module:
    parts = {key.rpartition("/"): tensor for key, tensor in tensors.items()}
    state = {key: tensor for (place, _, key), tensor in parts.items() if place == f"norms/{name}"}
    kind = _plain(settings["class"])
    if kind is not None:
        if None in (settings[key] for key in _SETTINGS if key != "momentum"):
            raise ValueError("a setting is missing")
        # without memory: the tensors of the file are put in, whatever size the text says
        norm = kind(**{key: settings[key] for key in _SETTINGS}, device="meta")
    elif like is not None and name in dict(like.named_modules(remove_duplicate=False)):
        norm = copy_model("unfold", like.get_submodule(name), _KEEP)
    else:
        raise StateError(
            f"unfold: {name} was a {settings['class']}, which only its own code can build. Pass like=, a model of the "
            "original architecture."
        )
    norm.load_state_dict(state, assign=True)  # in the types that they had
    if kind is not None and not bool((state["running_var"].double() + settings["eps"] > 0).all()):
        raise ValueError("a variance is negative")
    return norm
