"""Put norms where they belong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import Module

from batchnorm.dataflow.graph import Graph
from batchnorm.dataflow.operator_kinds import family
from batchnorm.dataflow.sizes import runs_of
from batchnorm.dataflow.trace import trace
from batchnorm.errors import BatchNormError
from batchnorm.models.copying import copy_model
from batchnorm.models.preconditions import require_readable
from batchnorm.models.several import Several
from batchnorm.models.snapshot import Structure
from batchnorm.models.transaction import on_failure, transaction
from batchnorm.nn.provenance import with_provenance
from batchnorm.placement.insertion import Insertion, KeyChanges, module_obstacle, owner_of
from batchnorm.placement.sites import Placement, find_placements, obstacle
from batchnorm.report import Document, Paragraph, Result, Section, Table
from batchnorm.verification.same_dataflow import dataflow_difference

__all__ = ["LeftSite", "PlaceResult", "PlacedNorm", "place"]


@transaction("place")
@with_provenance("place")
def place(model: Module, example_inputs: Any, *, inplace: bool = False) -> PlaceResult:
    r"""Insert a norm between each convolution or linear layer and the activation that reads it.

    .. math::

        z = g(W u + b) \quad\longrightarrow\quad z = g(\mathrm{BN}(W u))

    Each such layer ``conv`` becomes ``Sequential(conv=conv, norm=BatchNormNd(C))`` under its old name; its bias is
    dropped, since the subtraction of the batch mean, Σ x / m over the m values of a channel, would cancel it. g is a
    ReLU or a relative (leaky, parametric and randomized ReLU, ReLU6, ELU, CELU, GELU, SiLU, Mish, hard swish) or a
    saturating function (sigmoid, tanh, their piecewise linear forms). SELU is not, because it normalizes by itself.
    Dropout or pooling may lie between the layer and g.

    No norm goes to an output activation, a gate, or a branch that computes nothing but a gate; where the layer's output
    has other readers; behind a layer that is called more than once, shares parameters, is parametrized, or is not a
    module; or where channels are not on axis 1. Each of these is listed in ``left``, with the reason.

    Until it is trained, the model computes in eval mode what it did before: a new norm starts with γ = 1, β = 0,
    running_mean = −b and running_var = 1 − ε. Train it, or measure the statistics (``recalibrate``), before relying on
    the norms. The result is verified by running it, on the example inputs, on others of other sizes and on random ones
    (:mod:`batchnorm.dataflow.sizes`): with the new norms left out, it has to run the same operators on the same values
    as the original; a norm with which it does not is taken out again and listed. So is one that could not stand there
    in one of these runs.

    Args:
        model: any model that runs. Its class, modes, hooks, devices and dtypes are kept; norms follow the layer they
            are put behind, except that those of half-precision layers are kept in float32.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        inplace: rewrite ``model`` itself instead of a copy.

    Returns:
        The model, what was placed and what was left, and how state-dict keys changed.

    Raises:
        InputError: the model fails on the inputs as it is.
        StateError: the model cannot be copied (pass ``inplace=True``), is scripted, or lazy and not yet initialized.

    Example:
        >>> import torch
        >>> from batchnorm.placement.place import place
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 1, 3))
        >>> result = place(model, torch.randn(2, 3, 8, 8))
        >>> [name for name, child in result.model[0].named_children()], result.model[0].conv.bias
        (['conv', 'norm'], None)
        >>> result.renamed
        {'0.weight': '0.conv.weight'}

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 3.2.
    """
    require_readable("place", model)
    work = model if inplace else copy_model("place", model, "Pass inplace=True to rewrite the model itself.")
    runs = runs_of("place", work, example_inputs)
    before = trace(work, runs)
    todo, left = _survey_all(work, before, runs)
    editor = _Editor(work, runs, before)
    on_failure(Structure(work.modules()).restore)
    failed = editor.insert_all([insertion for insertion, _ in todo])
    note = editor.training_note()
    for insertion, site in todo:
        if insertion.layer in failed:
            left.append(_left(work, site, failed[insertion.layer]))
    placed = [
        PlacedNorm(i.layer, i.norm, family(site.activation), i.channels, f"{i.layer}.bias" in editor.dropped)
        for i, site in todo
        if i.layer not in failed
    ]
    warnings = _warnings(work, placed, editor.dropped)
    return PlaceResult(work, placed, left, editor.renamed, editor.dropped, note, warnings, editor.fresh_norms())


def _warnings(model: Module, placed: Sequence[PlacedNorm], dropped: Sequence[str]) -> list[str]:
    """Say what a placed model does otherwise that no run shows."""
    new = {id(p) for one in placed for p in model.get_submodule(one.norm).parameters()}
    others = [p for p in model.parameters() if id(p) not in new]
    found = []
    if new and others and not any(p.requires_grad for p in others):
        found.append(
            "All parameters of the model are frozen (requires_grad=False), and those of the new norms, γ and β, are "
            "not: they would learn. Freeze them too if that is not meant: batchnorm.freeze(result.model)."
        )
    if dropped:
        listed = ", ".join(dropped[:3]) + (", ..." if len(dropped) > 3 else "")
        found.append(
            f"{listed}: gone, and the layers have moved into a Sequential. The model's forward was seen to run; code "
            "outside of it that reads a bias, or a layer's weight by its old name (initialization, weight decay, "
            "export), was not, and would fail."
        )
    return found


def _survey_all(model: Module, graph: Graph, runs: Several) -> tuple[list[tuple[Insertion, Placement]], list[LeftSite]]:
    """Return where norms can go in every run, and the sites of the example's where none can."""
    todo, left = _survey(model, graph.of_run(0))
    for number, label in enumerate(runs.labels[1:], 1):
        other = graph.of_run(number)
        there = {insertion.layer for insertion, _ in _survey(model, other)[0]}
        gone = [site for insertion, site in todo if insertion.layer not in there and other.runs_of(insertion.layer)]
        left += [
            _left(model, site, f"With {label} none could stand there: it is read by others then.") for site in gone
        ]
        todo = [(insertion, site) for insertion, site in todo if not any(site is other for other in gone)]
    return todo, left


def _survey(model: Module, graph: Graph) -> tuple[list[tuple[Insertion, Placement]], list[LeftSite]]:
    """Return where norms can go, and the sites where none can."""
    todo: dict[str, tuple[Insertion, Placement]] = {}
    left: dict[tuple[str, str], LeftSite] = {}
    for site in find_placements(graph):
        reason = obstacle(site) or module_obstacle(model, graph, site.layer)
        if reason is None:
            insertion = Insertion.at(model, site)
            todo[insertion.layer] = (insertion, site)
        else:
            entry = _left(model, site, reason)
            left.setdefault((entry.layer, entry.reason), entry)
    return list(todo.values()), list(left.values())


def _left(model: Module, site: Placement, reason: str) -> LeftSite:
    name = owner_of(model, site.layer.args["weight"])
    return LeftSite(site.layer.module if name is None else name, family(site.activation), reason)


class _Editor:
    """Puts norms in, looks whether the model is still the same, and takes out those with which it is not."""

    def __init__(self, model: Module, runs: Several, before: Graph) -> None:
        self.renamed: dict[str, str] = {}
        self.dropped: list[str] = []
        self._model = model
        self._runs = runs
        self._before = before
        self._done: list[Insertion] = []
        self._keys: dict[str, KeyChanges] = {}

    def insert_all(self, insertions: list[Insertion]) -> dict[str, str]:
        """Insert them together or, if that does not work, one by one; return the reasons of those that failed."""
        failed: dict[str, str] = {}
        if self._attempt(insertions) is not None:
            for insertion in insertions:
                reason = self._attempt([insertion])
                if reason is not None:
                    failed[insertion.layer] = reason
        for renamed, dropped in self._keys.values():
            self.renamed.update(renamed)
            self.dropped.extend(dropped)
        return failed

    def training_note(self) -> str | None:
        """Return what is wrong with a training step on the example inputs; None if nothing is, or none is due."""
        if not any(self._norm_of(insertion).training for insertion in self._done):
            return None
        try:
            trace(self._model, self._runs.inputs[0])
        except BatchNormError as error:
            return f"In the training mode that it is in, the placed model cannot run on these inputs. {error}"
        return None

    def fresh_norms(self) -> dict[str, dict[str, Tensor]]:
        """Return the state of each placed norm, for the state dicts of older checkpoints."""
        states = {}
        for insertion in self._done:
            state = {key: value.clone() for key, value in self._norm_of(insertion).state_dict().items()}
            states.update(dict.fromkeys(insertion.slots, state))
        return states

    def _norm_of(self, insertion: Insertion) -> Module:
        return self._model.get_submodule(insertion.norm)

    def _attempt(self, insertions: list[Insertion]) -> str | None:
        """Insert, and take out again if the model is not the same with them; return how it is not."""
        start = len(self._done)
        for insertion in insertions:
            self._done.append(insertion)
            self._keys[insertion.layer] = insertion.do(self._model)
        problem = self._problem()
        if problem is not None:
            for insertion in reversed(self._done[start:]):
                insertion.undo(self._model)
                del self._keys[insertion.layer]
            del self._done[start:]
        return problem

    def _problem(self) -> str | None:
        """Return, as a sentence, how the model with its norms differs from the original."""
        norms = {insertion.norm: self._norm_of(insertion) for insertion in self._done}
        modes = {norm: norm.training for norm in norms.values()}
        renamed = {old: new for keys, _ in self._keys.values() for old, new in keys.items()}
        dropped = [key for _, keys in self._keys.values() for key in keys]
        try:
            for norm in modes:  # in eval mode a norm is the identity still, and takes a batch of one
                norm.training = False
            found = dataflow_difference(self._before, trace(self._model, self._runs), norms, renamed, dropped)
        except BatchNormError as error:
            return f"With a norm there the model fails: {error}"
        finally:
            for norm, training in modes.items():
                norm.training = training
        return None if found is None else f"With a norm there the model computes something else: {found}."


@dataclass(frozen=True)
class PlacedNorm:
    """A norm that was put behind ``layer``; ``activation`` is the operator that reads it."""

    layer: str
    norm: str
    activation: str
    channels: int
    bias_dropped: bool


@dataclass(frozen=True)
class LeftSite:
    """A layer before an activation that got no norm, and why."""

    layer: str
    activation: str
    reason: str


@dataclass(frozen=True, eq=False, repr=False)
class PlaceResult(Result):
    """What :func:`place` did.

    Attributes:
        model: the model with the norms; the original itself where ``inplace=True`` was given.
        placed: the new norms, in order of execution.
        left: layers before activations that got none, each with a reason.
        renamed: old state-dict keys with their new ones.
        dropped: old state-dict keys of the biases that are gone.
        note: why a training step fails on the example inputs, if the model is in training mode and one does.
        warnings: what no run shows: a frozen model that learns again; what code outside ``forward`` would miss.
    """

    model: Module
    placed: list[PlacedNorm]
    left: list[LeftSite]
    renamed: dict[str, str]
    dropped: list[str]
    note: str | None = None
    warnings: list[str] = field(default_factory=list)
    _fresh: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def convert_state_dict(self, old: Mapping[str, Any]) -> dict[str, Any]:
        """Return a checkpoint of the original model as one of the placed model, which computes the same in eval mode.

        Keys are renamed, each dropped bias becomes minus the running mean of its norm, and the new norms' other entries
        are those they started with.
        """
        new = {self.renamed.get(key, key): value for key, value in old.items() if key not in self.dropped}
        for slot, fresh in self._fresh.items():
            new.update({f"{slot}.norm.{key}": value.clone() for key, value in fresh.items()})
            bias = old.get(f"{slot}.bias")
            if bias is not None:
                new[f"{slot}.norm.running_mean"] = -bias.detach().to(fresh["running_mean"].dtype)
        return new

    def document(self) -> Document:
        """Return one table of the new norms and one of the sites without."""
        sections = []
        if self.note:
            sections.append(Section("", [Paragraph(self.note, "bad")]))
        if self.warnings:
            sections.append(Section("", [Paragraph(warning) for warning in self.warnings]))
        if self.placed:
            rows = [(p.layer, p.norm, p.channels, p.activation, p.bias_dropped) for p in self.placed]
            table = Table(("layer", "norm", "channels", "before", "bias dropped"), rows)
            sections.append(Section("Placed", [table]))
        if self.left:
            left = Table(("layer", "before", "reason"), [(s.layer, s.activation, s.reason) for s in self.left])
            sections.append(Section("Left as they are", [left]))
        summary = (
            f"{len(self.placed)} norm{'s' * (len(self.placed) != 1)} placed, "
            f"{len(self.left)} site{'s' * (len(self.left) != 1)} left."
        )
        return Document("Place", summary, sections)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model."""
        return {
            "placed": [asdict(p) for p in self.placed],
            "left": [asdict(s) for s in self.left],
            "renamed": dict(self.renamed),
            "dropped": list(self.dropped),
            "note": self.note,
            "warnings": list(self.warnings),
        }
