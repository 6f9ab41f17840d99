"""Other sizes, values and numbers that a model runs on: what one run shows is not a constant of the model.

A number that a forward computes from the size of its input, a pad that the example did not need, a slice that took all
of it, a branch: one run cannot tell them from constants. So the model is run on inputs of other sizes, made of the
example: another batch (one entry among them), other sizes of each further axis (odd ones, smaller and larger ones, one)
and other values; numbers among its arguments are changed. Axes of several inputs that have the same place and size are
changed together. A size at which the model stops is none of its.

Sizes are small where the example's are large, so that all of this costs little beside one pass on the example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_flatten, tree_unflatten

from batchnorm.dataflow.conditionals import COND
from batchnorm.dataflow.graph import Graph
from batchnorm.dataflow.refusal import listed
from batchnorm.dataflow.run import run
from batchnorm.dataflow.trace import trace
from batchnorm.dataflow.unreached import Reached
from batchnorm.errors import InputError, StateError
from batchnorm.models.copying import copy_model
from batchnorm.models.kept import Kept
from batchnorm.models.random_inputs import random_like
from batchnorm.models.several import EXAMPLE, Several

__all__ = ["Accepts", "Runs", "find_runs", "runs_of"]

Accepts = Callable[[Any], bool]
"""Whether inputs are such as the model is meant for, where that is known of it."""

RANDOM = "random inputs"
_LARGE, _LONG, _MANY = 64, 257, 16
_MOST_NUMBERS = 4


@dataclass(frozen=True, eq=False)
class Runs:
    """What a model was found to run on.

    Attributes:
        all: the given inputs first, then random ones of the example's shape, then those of other sizes and numbers.
        given: how many were given.
        on_random_inputs: whether it runs on random inputs of the example's shape.
        warnings: at which sizes it does not run, and which of its code none of the runs reached, as sentences.
        model: the copy that it was found with, if that is as it was: a model that keeps nothing of its calls, as far
            as can be told (:class:`batchnorm.models.kept.Kept`). None otherwise.
    """

    all: Several
    given: int
    on_random_inputs: bool
    warnings: Sequence[str]
    model: Module | None

    @property
    def of_user(self) -> Several:
        """The inputs that were given."""
        return Several(self.all.inputs[: self.given], self.all.labels[: self.given])

    @property
    def described(self) -> list[str]:
        """What each run was on, but for the example's."""
        return list(self.all.labels[1:])

    @property
    def warming(self) -> Several:
        """Runs after which the model keeps what it keeps after all: random ones of the example's shape are left out."""
        start = self.given + self.on_random_inputs
        keep = [*range(self.given), *range(start, len(self.all.inputs))]
        return Several(tuple(self.all.inputs[i] for i in keep), tuple(self.all.labels[i] for i in keep))


def find_runs(copied: Callable[[], Module], given: Several, accepts: Accepts | None = None) -> Runs:
    """Find other inputs that a model runs on.

    Args:
        copied: returns a copy of the model, to be run on inputs at which it may stop half way.
        given: the example's inputs first, then others that were given.
        accepts: whether inputs are such as the model is meant for; None takes all on which it runs.

    Raises:
        InputError: the model fails on inputs that were given.
    """
    search = _Search(copied, given.inputs[0], accepts)
    with search.reached.watching():
        graph = trace(search.model, given)
    random = search.attempt({}, {}, label=RANDOM)
    search.vary_sizes()
    search.vary_numbers()
    if _reads_numbers(graph):
        here = search.label(search.now)
        for factor in (-1.0, 4.0):
            search.attempt(search.now, {}, factor=factor, label=f"{here}, scaled by {factor:g}")
        for shift in (-3.0, 3.0):
            search.attempt(search.now, {}, shift=shift, label=f"{here}, moved by {shift:g} deviations")
    found = search.found
    runs = Several((*given.inputs, *(inputs for inputs, _ in found)), (*given.labels, *(label for _, label in found)))
    warnings = [*(search.warnings() if accepts is None else ()), *search.reached.sentences()]
    return Runs(runs, len(given.inputs), random, warnings, search.model if search.is_as_it_was() else None)


def runs_of(verb: str, model: Module, example_inputs: Any) -> Several:
    """Return the example inputs, and others on which the model runs; those alone where it cannot be copied.

    Raises:
        InputError: the model fails on the example inputs.
    """
    given = Several((example_inputs,), (EXAMPLE,))
    trace(model, example_inputs)
    try:
        return find_runs(lambda: copy_model(verb, model, ""), given).all
    except StateError:
        return given


@dataclass(frozen=True)
class _Axes:
    """Axes that are as long as each other in whatever the model takes.

    Attributes:
        places: each as the number of the leaf and the axis.
        size: how long they are in the example.
    """

    places: tuple[tuple[int, int], ...]
    size: int


@dataclass(eq=False)
class _Search:
    """Attempts to run a model on inputs made of the example's."""

    copied: Callable[[], Module]
    example: Any
    accepts: Accepts | None
    found: list[tuple[Any, str]] = field(default_factory=list)
    now: dict[_Axes, int] = field(default_factory=dict)  # sizes at which it is known to run, small ones if possible

    def __post_init__(self) -> None:
        self.model = self.copied()
        self._kept = Kept(self.model)
        self.reached = Reached(self.model)
        leaves, self._structure = tree_flatten(self.example)
        self._leaves = leaves
        self._tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim()}
        self._batch, self._others = _axes_of(self._tensors)
        self._varied: set[tuple[int, int]] = set()

    def attempt(
        self,
        sizes: Mapping[_Axes, int],
        numbers: Mapping[int, Any],
        *,
        factor: float = 1.0,
        shift: float = 0.0,
        label: str | None = None,
        keep: bool = True,
    ) -> bool:
        """Run the model with other sizes and numbers; keep the inputs if it runs, and say so."""
        shapes = self._shapes(sizes)
        inputs = random_like(self.example, len(self.found), shapes=shapes, factor=factor, shift=shift)
        if numbers:
            leaves = [numbers.get(i, leaf) for i, leaf in enumerate(tree_flatten(inputs)[0])]
            inputs = tree_unflatten(leaves, self._structure)
        if self.accepts is not None and not self.accepts(inputs):
            return False
        reached = self.reached.another()
        try:
            with reached.watching():
                run(self.model, inputs, len(self.found) + 1)
        except InputError:
            if not self.is_as_it_was():  # it stopped half way
                self.model = self.copied()
            return False
        if keep:
            self.reached.add(reached)
        self._varied.update(place for axes, size in sizes.items() if size != axes.size for place in axes.places)
        if keep:
            self.found.append((inputs, self.label(sizes) if label is None else label))
        return True

    def is_as_it_was(self) -> bool:
        """Whether the model can be told to be what it was before it was run."""
        return self._kept.is_still_in(self.model)

    def _shapes(self, sizes: Mapping[_Axes, int]) -> dict[int, tuple[int, ...]]:
        shapes = {number: list(tensor.shape) for number, tensor in self._tensors.items()}
        for axes, size in sizes.items():
            for number, axis in axes.places:
                shapes[number][axis] = size
        return {number: tuple(shape) for number, shape in shapes.items()}

    def label(self, sizes: Mapping[_Axes, int]) -> str:
        """Return what inputs of these sizes are called in a sentence."""
        shapes = list(self._shapes(sizes).values())
        return f"inputs of shape{'s' * (len(shapes) > 1)} {listed([str(shape) for shape in shapes])}" if shapes else ""

    # -- sizes -------------------------------------------------------------------------------------------------------

    def vary_sizes(self) -> None:
        """Find, for each axis, whether it can have another size; then keep inputs in which several do."""
        for number, axes in enumerate(self._others):
            self._shrink(axes, number)
        for axes in _joined([axes for axes in self._others if axes not in self.now]):
            self._shrink(axes, 0)
        for sizes, factor in self._mixtures():
            if not self.attempt({**self.now, **sizes}, {}, factor=factor) and len(sizes) > 1:
                for axes, size in sizes.items():
                    self.attempt({**self.now, axes: size}, {}, factor=factor)
        if self.now and all(label == RANDOM for _, label in self.found):
            self.attempt(self.now, {})

    def _shrink(self, axes: _Axes, number: int) -> None:
        """Let axes have the first of other sizes at which the model runs."""
        for size in _other_sizes(axes.size, number):
            if self.attempt({**self.now, axes: size}, {}, keep=False):
                self.now[axes] = size
                return

    def _mixtures(self) -> Iterator[tuple[dict[_Axes, int], float]]:
        """Yield sizes to keep: those of the batch, each with another size of one axis; a long one of each; and one."""
        batch, free = self._batch, list(self.now)
        batches = [] if batch is None else [n for n in (1, batch.size + 1, 2 * batch.size + 1) if n != batch.size]
        for number in range(max(len(batches), 1 + (len(free) > 0))):
            sizes: dict[_Axes, int] = {}
            if batch is not None and number < len(batches):
                sizes[batch] = batches[number]
            if number:
                sizes |= {axes: _second_size(axes.size, self.now[axes], number) for axes in free[number - 1 :: 2]}
            if sizes:
                yield sizes, (1.0, -1.0, 4.0)[number % 3]
        ones = dict.fromkeys(free, 1)
        thin = ones if self.attempt({**self.now, **ones}, {}, keep=False) else {}
        yield from (({**thin, axes: max(2 * axes.size + 1, _LONG)}, 1.0) for axes in free)
        if thin:
            yield ones | ({} if batch is None else {batch: batch.size + _MANY}), 1.0

    # -- numbers -----------------------------------------------------------------------------------------------------

    def vary_numbers(self) -> None:
        """Run the model with other numbers in place of those among its arguments; a truth value is no number."""
        numbers = {i: value for i, leaf in enumerate(self._leaves) if (value := _other_numbers(leaf))}
        for i in list(numbers)[:_MOST_NUMBERS]:
            for value in numbers[i]:
                shown, old = (v.item() if isinstance(v, Tensor) else v for v in (value, self._leaves[i]))
                if self.attempt(self.now, {i: value}, label=f"{shown:g} in place of {old:g} among the inputs"):
                    break

    # -- the warnings ------------------------------------------------------------------------------------------------

    def warnings(self) -> list[str]:
        """Return at which sizes the model does not run, though many models would."""
        fixed = []
        for number, tensor in self._tensors.items():
            axes = [axis for axis in range(1, tensor.dim()) if (number, axis) not in self._varied]
            channels = tensor.is_floating_point() or tensor.is_complex()
            if channels and axes:  # one of the axes holds channels, of which a model takes a fixed number
                axes.remove(1 if 1 in axes else axes[-1])
            if self._batch is not None and (number, 0) in self._batch.places and (number, 0) not in self._varied:
                axes.insert(0, 0)
            if axes:
                fixed.append((axes, tuple(tensor.shape)))
        return [
            f"The model runs at one size only of {'axis' if len(axes) == 1 else 'axes'} "
            f"{listed([str(axis) for axis in axes])} of its input of shape {shape}: at the others that were tried it "
            "stops. Folding has been verified at that size."
            for axes, shape in fixed
        ]


def _axes_of(tensors: Mapping[int, Tensor]) -> tuple[_Axes | None, list[_Axes]]:
    """Return the axes of the batch, and all others: those of the same place, from the last, and size together."""
    if not tensors:
        return None, []
    first = next(iter(tensors.values())).shape[0]
    batch = _Axes(tuple((i, 0) for i, tensor in tensors.items() if tensor.shape[0] == first), first)
    others: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, tensor in tensors.items():
        for axis in range(tensor.dim() - 1, 0, -1):
            others.setdefault((axis - tensor.dim(), tensor.shape[axis]), []).append((number, axis))
    axes = [_Axes(tuple(places), size) for (_, size), places in others.items() if size]
    return (batch if first else None), axes


def _joined(fixed: Sequence[_Axes]) -> list[_Axes]:
    """Return axes of the same size as one: the model may want them to be equal."""
    by_size: dict[int, list[_Axes]] = {}
    for axes in fixed:
        by_size.setdefault(axes.size, []).append(axes)
    return [
        _Axes(tuple(place for axes in group for place in axes.places), size)
        for size, group in by_size.items()
        if len(group) > 1
    ]


def _other_sizes(size: int, number: int) -> list[int]:
    """Return sizes to try in place of one, of the axis of that number: axes of one size get different ones."""
    if size >= _LARGE:
        tried = [33 + 2 * number, size // 2 + 1 + number, size + 1 + number, size - 32, size + 32]
    else:
        tried = [size + 1 + 2 * number, size + 2 + 2 * number, 2 * size, size - 1, size // 2]
    return [other for other in dict.fromkeys(tried) if other >= 1 and other != size]


def _second_size(size: int, first: int, number: int) -> int:
    """Return a further size: on the other side of the example's than the first one, unless that is large."""
    if first < size:
        return first + 5 + 4 * number if size >= _LARGE else size + 1 + 16 * number
    return max(size - 2 * number, 1 + number % 2) if size > 1 else first + 2


def _other_numbers(leaf: Any) -> list[Any]:
    if isinstance(leaf, float):
        return [1.5 * leaf + 0.25]
    whole = isinstance(leaf, int) and not isinstance(leaf, bool)
    if whole or (isinstance(leaf, Tensor) and leaf.numel() == 1 and _holds_a_number(leaf)):
        return [leaf + 1, leaf - 1]
    return []


def _holds_a_number(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype.itemsize > 1


def _reads_numbers(graph: Graph) -> bool:
    """Whether the model's code reads numbers out of tensors, or takes parts whose size depends on values."""
    return any(call.op is COND or call.name in _READS for call in graph.calls)


_READS = {
    *("item", "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "masked_select"),
    *("unique_dim", "_unique2", "unique_consecutive", "bincount", "argwhere"),
}
