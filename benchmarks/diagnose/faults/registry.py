"""What a planted fault is, how one is registered, and what the benches offer to those who plant."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.diagnose.architectures import ARCHITECTURES, TIMM
from benchmarks.diagnose.data import Batch, Data, load
from benchmarks.diagnose.training import PLAIN, Recipe, norms, trained
from torch import Tensor, nn

__all__ = ["EVERY", "FAULTS", "HEALTHY", "THREE", "Bench", "Fault", "Metric", "Planted", "accuracy", "fault", "healthy"]


Metric = Callable[[Tensor, Batch], Tensor]


def accuracy(logits: Tensor, batch: Batch) -> Tensor:
    """Return the share of pictures that are classified rightly."""
    return (logits.argmax(1) == batch[1]).double().mean()


@dataclass(frozen=True)
class Planted:
    """A model with one fault, what diagnose is given, and the model as it should be.

    Attributes:
        model: with the fault, in the modes in which it is handed over.
        layers: the qualified names of which any counts as the right layer; empty for a healthy model.
        batches: evaluation data.
        training_batches: what the training loader gives.
        right: the model without the fault, in eval mode: the same weights wherever that is possible.
        right_batches: the same pictures in the same order, as they should be given.
        metric: what diagnose is given to judge by; None if nothing.
    """

    model: nn.Module
    layers: frozenset[str]
    batches: list[Batch]
    training_batches: list[Batch]
    right: nn.Module
    right_batches: list[Batch]
    metric: Metric | None = None


@dataclass(frozen=True)
class Bench:
    """Where a fault is planted: an architecture, a seed, and the fault's name, which tells the choices apart."""

    architecture: str
    seed: int
    fault: str = ""

    @property
    def data(self) -> Data:
        """The pictures, cut into training and held-out parts by the seed."""
        return load(self.seed)

    def trained(self, recipe: Recipe = PLAIN) -> nn.Module:
        """Return a copy of the trained network, in eval mode."""
        return copy.deepcopy(trained(self.architecture, self.seed, recipe))

    def pick(self, names: Sequence[str]) -> str:
        """Return one of the names, the same for the same architecture, seed and fault."""
        return random.Random(f"{self.architecture} {self.seed} {self.fault}").choice(list(names))

    def pick_norm(self, model: nn.Module) -> str:
        """Return the name of one of the model's norms."""
        return self.pick(list(norms(model)))

    def planted(
        self,
        model: nn.Module,
        layers: Sequence[str],
        right: nn.Module,
        *,
        batches: list[Batch] | None = None,
        training_batches: list[Batch] | None = None,
        right_batches: list[Batch] | None = None,
        metric: Metric | None = None,
    ) -> Planted:
        """Return the fault with the data that most faults are shown on: both parts in batches of 64."""
        batches = self.data.held_out() if batches is None else batches
        return Planted(
            model,
            frozenset(layers),
            batches,
            self.data.training() if training_batches is None else training_batches,
            right,
            batches if right_batches is None else right_batches,
            metric,
        )


@dataclass(frozen=True)
class Fault:
    """A kind of fault and the one form of it that ``plant`` plants; a healthy model has the cause "healthy"."""

    cause: str
    form: str
    plant: Callable[[Bench], Planted]
    architectures: tuple[str, ...]

    @property
    def name(self) -> str:
        """The cause and the form: ``"poisoned.nan"``."""
        return f"{self.cause}.{self.form}"

    def __call__(self, architecture: str, seed: int) -> Planted:
        """Plant it into a fresh copy of the trained network."""
        return self.plant(Bench(architecture, seed, self.name))


# For faults that need a training run of their own: the layers of this library train as torch's do.
THREE = ("mlp", "resnet", "mobilenet")
# For faults of which the networks of timm get a share, too.
EVERY = (*ARCHITECTURES, *TIMM)
FAULTS: dict[str, Fault] = {}
HEALTHY: dict[str, Fault] = {}
Plant = Callable[[Bench], Planted]


def fault(cause: str, form: str, *, architectures: Sequence[str] = tuple(ARCHITECTURES)) -> Callable[[Plant], Plant]:
    """Register a function that plants a fault of the given cause."""
    return _register(FAULTS, cause, form, architectures)


def healthy(form: str, *, architectures: Sequence[str] = tuple(ARCHITECTURES)) -> Callable[[Plant], Plant]:
    """Register a function that returns a model without a fault."""
    return _register(HEALTHY, "healthy", form, architectures)


def _register(book: dict[str, Fault], cause: str, form: str, architectures: Sequence[str]) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        made = Fault(cause, form, plant, tuple(architectures))
        if made.name in book:
            raise ValueError(f"{made.name}: registered twice")
        book[made.name] = made
        return plant

    return register
