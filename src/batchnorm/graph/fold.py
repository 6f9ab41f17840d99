"""Norms with fixed statistics, absorbed by the operators before and after them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from batchnorm.errors import InputError, StateError, VerificationError
from batchnorm.graph.dataflow import Graph, Value
from batchnorm.graph.fold_result import FoldedNorm, FoldResult, LeftNorm
from batchnorm.graph.input_norm import INNER, NORMALIZATION, WithNormalizedInput, outer_name
from batchnorm.graph.leftover import Leftover, failing, find_leftovers
from batchnorm.graph.norms import norm_uses
from batchnorm.graph.parameters import find_tensor
from batchnorm.graph.plan import Plan, Step, describe_source, make_plan
from batchnorm.graph.proof import Proof
from batchnorm.graph.refusal import Refusal
from batchnorm.graph.rewrite import Rewrite, round_parameters
from batchnorm.graph.threads import threads_for_float64
from batchnorm.graph.trace import trace
from batchnorm.graph.unfold import Pairs
from batchnorm.graph.verify import Agreement, Reference, as_float64, run, spacing, verify, verify_float64
from batchnorm.nn.copying import copy_model
from batchnorm.nn.require import require_readable

__all__ = ["fold"]


def fold(
    model: Module,
    example_inputs: Any,
    *,
    inplace: bool = False,
    input_mean: float | Sequence[float] | Tensor | None = None,
    input_std: float | Sequence[float] | Tensor | None = None,
    borders: bool = False,
    fuse: bool = False,
) -> FoldResult:
    r"""Absorb every norm that can be absorbed by the operators before and after it.

    With fixed statistics a norm is s·x + t per channel, and a linear operator next to it can compute that itself:

    .. math::

        s = \frac{\gamma}{\sqrt{\mathrm{var} + \varepsilon}} \qquad t = \beta - s \cdot \mathrm{mean} \qquad
        s (W x + b) + t = (s W) x + (s b + t) \qquad W (s x + t) + b = (W s) x + (W t + b)

    (Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 2, line 11; ``var`` as it is stored.) Merged in float64, rounded
    once. Such a map travels through all operators that commute with it: views, pools, sums of which both operands take
    the scale, ReLU where the scale is positive, and so on; a part of it may go back and the rest forth. Convolutions,
    transposed convolutions, linear layers, embeddings and other norms absorb it. Each norm that is left is listed with
    the reason.

    The model is run on copies, as it is: in the modes, dtypes and on the devices it is in. What is folded is what the
    pass shows, so the inputs must take the way through the model that matters. Where a norm that they do not reach
    stands beside one that they do (``bns.0`` and ``bns.1``), neither is folded: other inputs may take the other. Every
    value is compared in float64 with what it was, and the folded model with the original end to end (about twelve
    forward passes in all, five of them in float64).

    Args:
        model: any model that runs; call ``model.eval()`` first.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        inplace: fold ``model`` itself, once all is verified, instead of a copy.
        input_mean: mean of the data set's normalization, one number a channel or one for all: it is folded too, so that
            the folded model takes what is not normalized. ``example_inputs`` are such inputs then.
        input_std: its standard deviation, likewise; inputs were divided by it.
        borders: let convolutions that pad with zeros absorb a shift before them: they pad with −t/s then, in a class of
            this library. That reads the input once more, as the norm did. For the normalization of the input it is
            always done where needed.
        fuse: let each norm that is left, if its statistics are fixed, become one multiply-add per channel
            (:class:`batchnorm.nn.scale_shift.ScaleShift`), computed in one pass with the activation behind it where
            that is a module of torch's own and reads nothing else. Otherwise they stay the modules that they are.

    Returns:
        The folded model, of the same class: its norms are ``torch.nn.Identity``, or the activation that they also ran;
        their neighbours have new parameters, and a bias where they had none. The state dict changes accordingly.

    Raises:
        InputError: the model fails on the inputs.
        StateError: the model cannot be copied, is scripted, or has lazy parameters that have not been initialized.
        VerificationError: the outputs differ by more than rounding explains. As after every other exception, the model
            is as it was.

    Example:
        >>> import torch, batchnorm
        >>> from batchnorm.graph.fold import fold
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.Tanh(), torch.nn.BatchNorm2d(8)
        ... ).eval()
        >>> result = fold(net, torch.randn(1, 3, 16, 16))
        >>> for norm in result.folded:
        ...     print(norm)
        1 → 0: folded.
        >>> print(result.left[0].reason)  # doctest: +ELLIPSIS
        It reads the output of tanh in 2, which is no linear operator. Nor can it go on: ...
        >>> [type(module).__name__ for module in result.model]
        ['Conv2d', 'Identity', 'Tanh', 'BatchNorm2d']
        >>> result.error <= result.bound
        True
    """
    require_readable("fold", model)
    if isinstance(model, DistributedDataParallel):
        raise StateError("fold: DistributedDataParallel writes into the buffers before each pass. Fold model.module.")
    if input_mean is None and input_std is None:
        return _fold(model, example_inputs, inplace, borders, fuse)
    outer = WithNormalizedInput(model, example_inputs, input_mean, input_std)
    return _of_inner(_fold(outer, example_inputs, inplace, True, fuse))


def _fold(model: Module, example_inputs: Any, inplace: bool, borders: bool, fuse: bool) -> FoldResult:
    try:
        return _fold_if_verified(model, example_inputs, inplace, borders, fuse, True)
    except VerificationError:
        # who recovers a value from what a norm made of it loses digits: more than rounding explains, perhaps
        return _fold_if_verified(model, example_inputs, inplace, borders, fuse, False)


def _fold_if_verified(
    model: Module, example_inputs: Any, inplace: bool, borders: bool, fuse: bool, sharing: bool
) -> FoldResult:
    with torch.inference_mode(False):
        work = _copy(model)
        run(work, example_inputs)  # what a model keeps from its first call is there in all that follow
        graph = trace(work, example_inputs)
        plan, parameters = _plan_that_holds(work, graph, example_inputs, borders, fuse, sharing)
        if isinstance(model, WithNormalizedInput):
            _require_normalization(plan)
        agreement, exact = Agreement(0.0, 0.0), None
        if plan.changes:
            touched = _touched(work, plan)
            reference = Reference.of(work, example_inputs, touched)
            rewrite = Rewrite()
            rewrite.apply(work, plan, parameters)
            agreement = verify(reference, run(work, example_inputs))
            with threads_for_float64(graph):
                exact = _in_float64(model, example_inputs, plan, reference, touched)
        del work
        target = model if inplace else _copy(model)
        pairs = None
        if plan.changes:
            norms = [target.get_submodule(name) for name in plan.replaced]
            pairs = Pairs.of(target, parameters, norms, plan.parameters.borders).with_leftovers(target, plan.leftovers)
            with _all_or_nothing() as rewrite:
                rewrite.apply(target, plan, parameters)
    return FoldResult(
        target,
        [_told(step) for step in sorted(plan.steps, key=lambda step: plan.order[step.name])],
        sorted(_left(plan), key=lambda item: plan.order[item.norm]),
        agreement.error,
        agreement.bound,
        exact.error if exact is not None else None,
        pairs,
    )


def _require_normalization(plan: Plan) -> None:
    """Refuse, before anything is changed, a model that cannot take in the normalization of its input.

    Raises:
        StateError: it cannot.
    """
    reason = next((item.reason for item in plan.left if item.norm == NORMALIZATION), None)
    if reason is not None:
        raise StateError(f"fold: the normalization of the input cannot be folded. {outer_name(reason)}")


def _of_inner(result: FoldResult) -> FoldResult:
    """Return the result for the model itself, of which the input's normalization has become a part."""
    assert result.pairs is not None
    told = [replace(item, norm=outer_name(item.norm), into=outer_name(item.into)) for item in result.folded]
    left = [
        replace(
            item,
            norm=outer_name(item.norm),
            into=None if item.into is None else outer_name(item.into),
            reason=outer_name(item.reason),
        )
        for item in result.left
    ]
    inner = result.model.get_submodule(INNER)
    return replace(result, model=inner, folded=told, left=left, pairs=result.pairs.of_submodule(INNER))


def _copy(model: Module) -> Module:
    remedy = "Folding is tried out on copies, with inplace=True too: take off the model what cannot be copied."
    return copy_model("fold", model, remedy)


def _told(step: Step) -> FoldedNorm:
    into = ", ".join(host.name for host in step.into)
    return FoldedNorm(step.name, into, ", ".join(dict.fromkeys(host.kind for host in step.into)))


def _left(plan: Plan) -> list[LeftNorm]:
    """Return the norms that are left, with what has become of them."""
    becomes = {item.name: item.told for item in plan.leftovers}
    return [replace(item, becomes=becomes.get(item.norm)) for item in plan.left]


def _plan_that_holds(
    model: Module, graph: Graph, example_inputs: Any, borders: bool, fuse: bool, sharing: bool
) -> tuple[Plan, dict[str, Parameter]]:
    """Return what can be done with ``model``, all of it proved, and its new parameters; it is not changed."""
    banned: dict[str, str] = {}
    kept: dict[str, str] = {}  # norms that do not become multiply-adds either
    while True:
        plan = make_plan(model, graph, banned, with_borders=borders, sharing=sharing)
        if fuse:
            plan.leftovers = find_leftovers(model, plan, kept)
        parameters, problems = _rounded(model, plan)
        if plan.changes and not problems:
            with threads_for_float64(graph):
                problems = _problems(model, plan, example_inputs, banned)
        if not problems:
            sources = {use.name: describe_source(graph, use) for use in norm_uses(model, graph)}
            plan.left += [LeftNorm(name, sources.get(name), reason) for name, reason in banned.items()]
            return plan, parameters
        leftovers = {item.name for item in plan.leftovers}
        kept |= {name: reason for name, reason in problems.items() if name in leftovers}
        banned |= {name: reason for name, reason in problems.items() if name not in leftovers}


def _rounded(model: Module, plan: Plan) -> tuple[dict[str, Parameter], dict[str, str]]:
    """Return the new parameters, or the norms that must stay because one does not fit into its type."""
    replaced = {item.module for item in plan.leftovers}
    try:
        rounded = round_parameters(model, plan.parameters)
        return {name: new for name, new in rounded.items() if name.rpartition(".")[0] not in replaced}, {}
    except Refusal as refusal:
        guilty = [step.name for step in plan.steps if any(host.name == refusal.module for host in step.into)]
        return {}, dict.fromkeys(guilty or [step.name for step in plan.steps], str(refusal))


def _problems(model: Module, plan: Plan, example_inputs: Any, banned: Collection[str]) -> dict[str, str]:
    """Return the norms that must stay, after a look at every value of a run in float64."""
    wide, inputs = _copy(model).double(), as_float64(example_inputs)
    try:
        run(wide, inputs)
    except InputError:  # a model that does not run in float64 is looked at in its own types
        wide, inputs = _copy(model), example_inputs
    proof = Proof(plan)
    trace(wide, inputs, observer=proof.before)
    rewrite = Rewrite()
    rewrite.apply(wide, plan, round_parameters(wide, plan.parameters))
    try:
        trace(wide, inputs, observer=proof.after)
    except InputError as error:
        reason = f"Without it the model stops: {error.__cause__}."
        if plan.leftovers:

            def stops(items: Sequence[Leftover]) -> bool:
                return _stops(model, replace(plan, leftovers=list(items)), example_inputs)

            return dict.fromkeys((item.name for item in failing(plan.leftovers, stops)), reason)
        return dict.fromkeys(_culprits(model, plan, example_inputs, banned), reason)
    return proof.problems()


def _stops(model: Module, plan: Plan, example_inputs: Any) -> bool:
    """Whether the model fails once it is folded by a plan."""
    copied = _copy(model)
    Rewrite().apply(copied, plan, round_parameters(copied, plan.parameters))
    try:
        run(copied, example_inputs)
    except InputError:
        return True
    return False


def _culprits(model: Module, plan: Plan, example_inputs: Any, banned: Collection[str]) -> list[str]:
    """Return the norms without which the model raises, found by halves."""
    names = [step.name for step in plan.steps]
    if len(names) == 1:
        return names
    found: list[str] = []
    for half in (names[: len(names) // 2], names[len(names) // 2 :]):
        stay = {*banned, *names} - set(half)
        part = make_plan(model, plan.graph, stay, with_borders=plan.with_borders, sharing=plan.sharing)
        if _stops(model, part, example_inputs):
            found += _culprits(model, part, example_inputs, stay)
    if not found:
        raise VerificationError(
            "The folded model fails on the example inputs, though neither half of its norms alone makes it fail. It is "
            "not returned; the original is unchanged."
        )
    return found


def _touched(model: Module, plan: Plan) -> list[Tensor]:
    """Return every tensor that goes into a new parameter, each once."""
    names = list(plan.parameters.changed)
    for use in (*(step.use for step in plan.steps), *(item.use for item in plan.leftovers)):
        values = (use.calls[0].args[key] for key in ("running_mean", "running_var", "weight", "bias"))
        names += [value.names[0] for value in values if isinstance(value, Value)]
    tensors = (find_tensor(model, name) for name in dict.fromkeys(names))
    return [tensor for tensor in tensors if tensor is not None]


def _in_float64(
    model: Module, example_inputs: Any, plan: Plan, reference: Reference, touched: Sequence[Tensor]
) -> Agreement | None:
    """Fold a float64 copy by the same plan and compare."""
    wide = _copy(model).double()
    roundoff = max(spacing(tensor) / 2 for tensor in touched)
    return verify_float64(
        wide,
        example_inputs,
        reference,
        lambda: Rewrite().apply(wide, plan, round_parameters(wide, plan.parameters)),
        roundoff,
    )


@contextmanager
def _all_or_nothing() -> Iterator[Rewrite]:
    rewrite = Rewrite()
    try:
        yield rewrite
    except BaseException:
        rewrite.roll_back()
        raise
