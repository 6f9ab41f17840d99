"""Norms with fixed statistics, absorbed by the operators before and after them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from batchnorm.errors import InputError, StateError, VerificationError
from batchnorm.graph.account import tell
from batchnorm.graph.cost import Cost
from batchnorm.graph.dataflow import Graph, Value
from batchnorm.graph.fold_result import Costs, FoldResult, LeftNorm, Pictures
from batchnorm.graph.input_norm import INNER, NORMALIZATION, WithNormalizedInput, outer_name
from batchnorm.graph.norms import norm_uses
from batchnorm.graph.own_weights import ComputedWeights, untie
from batchnorm.graph.parameters import find_tensor
from batchnorm.graph.pictures import draw_folded, draw_left, renamed
from batchnorm.graph.plan import Plan, describe_source, make_plan
from batchnorm.graph.program.fold_program import fold_program
from batchnorm.graph.proof import Proof
from batchnorm.graph.quantization import folded_weights
from batchnorm.graph.ranges import lost_ranges, norms_that_shrink
from batchnorm.graph.refusal import Refusal
from batchnorm.graph.rewrite import Rewrite, round_parameters
from batchnorm.graph.stand_in import StandIn
from batchnorm.graph.threads import threads_for_float64
from batchnorm.graph.trace import trace
from batchnorm.graph.unfold import Pairs
from batchnorm.graph.verify import Agreement, Reference, as_float64, run, spacing, verify, verify_float64
from batchnorm.nn.copying import copy_model
from batchnorm.nn.require import require_readable

__all__ = ["fold"]


def fold(
    model: Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    inplace: bool = False,
    input_mean: float | Sequence[float] | Tensor | None = None,
    input_std: float | Sequence[float] | Tensor | None = None,
    borders: bool = False,
    keep_range: bool = False,
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
    value is compared in float64 with what it was, and the folded model with the original end to end (about thirteen
    forward passes in all, five of them in float64).

    Args:
        model: any model that runs; call ``model.eval()`` first. Or a program, ``torch.fx.GraphModule`` or
            ``torch.export.ExportedProgram``: functions in it fold like modules, shared weights are copied where they
            become different ones, and a folded program is returned.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. An exported program has its own.
        inplace: fold ``model`` itself, once all is verified, instead of a copy.
        input_mean: mean of the data set's normalization, one number a channel or one for all: it is folded too, so that
            the folded model takes what is not normalized. ``example_inputs`` are such inputs then.
        input_std: its standard deviation, likewise; inputs were divided by it.
        borders: let convolutions that pad with zeros absorb a shift before them: they pad with −t/s then, in a class of
            this library. That reads the input once more, as the norm did. For the normalization of the input it is
            always done where needed.
        keep_range: leave a norm that would make a channel of weights too small for its type, in which the result warns
            of it otherwise (see :mod:`batchnorm.graph.ranges`). One that would make a parameter overflow always stays.

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
        1 → 0: folded. Its scale goes back into the convolution 0.
        >>> print(result.left[0].reason)  # doctest: +ELLIPSIS
        It reads the output of tanh in 2, which is no linear operator. Nor can it go on: ...
        >>> [type(module).__name__ for module in result.model]
        ['Conv2d', 'Identity', 'Tanh', 'BatchNorm2d']
        >>> result.error <= result.bound
        True
    """

    def fold_model(module: Module, inputs: Any, inplace: bool = False) -> FoldResult:
        require_readable("fold", module)
        if input_mean is None and input_std is None:
            return _fold(module, inputs, inplace, borders, keep_range)
        outer = WithNormalizedInput(module, inputs, input_mean, input_std)
        return _of_inner(_fold(outer, inputs, inplace, True, keep_range))

    if isinstance(model, GraphModule | ExportedProgram):
        return fold_program(model, example_inputs, inplace, fold_model)
    if example_inputs is None:
        raise InputError("fold: expected example_inputs, to run the model on; only exported programs hold their own.")
    if isinstance(model, DistributedDataParallel):
        raise StateError("fold: DistributedDataParallel writes into the buffers before each pass. Fold model.module.")
    return fold_model(model, example_inputs, inplace)


def _fold(model: Module, example_inputs: Any, inplace: bool, borders: bool, keep_range: bool) -> FoldResult:
    with torch.inference_mode(False):
        work = _copy(model)
        run(work, example_inputs)  # what a model keeps from its first call is there in all that follow
        graph, stored = _with_own_weights(work, example_inputs)
        plan, parameters = _plan_that_holds(work, graph, example_inputs, borders, keep_range)
        if isinstance(model, WithNormalizedInput):
            _require_normalization(plan)
        agreement, exact = Agreement(0.0, 0.0), None
        lost = lost_ranges(work, plan.parameters, parameters)
        told = tell(plan)
        left = sorted(plan.left, key=lambda item: plan.order[item.norm])
        running = {use.name: use.calls[0] for use in norm_uses(work, graph)}
        pictures = Pictures(draw_folded(plan, told), draw_left(plan, left, running))
        before = after = Cost.of(work, graph)
        if plan.steps:
            touched = _touched(work, plan)
            reference = Reference.of(work, example_inputs, touched)
            stored = {name: layer for name, layer in stored.items() if name in plan.parameters.hosts}
            if stored:
                verify(reference, run(_copy(model), example_inputs))
            with threads_for_float64(graph):
                exact = _in_float64(work, example_inputs, plan, reference, touched)
            rewrite = Rewrite()
            rewrite.apply(work, plan, parameters)
            agreement = verify(reference, run(work, example_inputs))
            after = Cost.of(work, trace(work, example_inputs))
        del work
        target = model if inplace else _copy(model)
        pairs, weights = None, []
        if plan.steps:
            going = [(target.get_submodule(step.module), step.stays) for step in plan.steps]
            going += [(target.get_submodule(name), StandIn((layer,))) for name, layer in stored.items()]
            pairs = Pairs.of(target, parameters, going, plan.parameters.borders)
            old = dict(pairs.parameters)
            old |= {f"{name}.weight": layer._parameters["weight"] for name, layer in stored.items()}
            weights = folded_weights(plan.parameters.hosts.values(), old, parameters)
            with _all_or_nothing() as rewrite:
                rewrite.replace(target, stored)
                rewrite.apply(target, plan, parameters)
    return FoldResult(
        target,
        told,
        left,
        agreement.error,
        agreement.bound,
        exact.error if exact is not None else None,
        pairs,
        costs=Costs(before, after),
        pictures=pictures,
        lost=lost,
        weights=weights,
    )


def _with_own_weights(work: Module, example_inputs: Any) -> tuple[Graph, dict[str, Module]]:
    """Give the layers weights of their own; return the dataflow, and the layers whose computed weights are stored."""
    untie(work)
    weights = ComputedWeights()
    graph = trace(work, example_inputs, observer=weights.observe)
    stored = weights.layers(graph)
    if not stored:
        return graph, {}
    Rewrite().replace(work, stored)
    return trace(work, example_inputs), {name: copy.deepcopy(layer) for name, layer in stored.items()}


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
    told = [
        replace(item, norm=outer_name(item.norm), into=outer_name(item.into), sentence=outer_name(item.sentence))
        for item in result.folded
    ]
    left = [
        LeftNorm(outer_name(item.norm), None if item.into is None else outer_name(item.into), outer_name(item.reason))
        for item in result.left
    ]
    lost = [replace(item, parameter=outer_name(item.parameter)) for item in result.lost]
    weights = [replace(item, name=outer_name(item.name)) for item in result.weights]
    assert result.pictures is not None
    pictures = Pictures(renamed(result.pictures.folded, outer_name), renamed(result.pictures.left, outer_name))
    return replace(
        result,
        model=result.model.get_submodule(INNER),
        folded=told,
        left=left,
        pairs=result.pairs.of_submodule(INNER),
        lost=lost,
        weights=weights,
        pictures=pictures,
    )


def _copy(model: Module) -> Module:
    remedy = "Folding is tried out on copies, with inplace=True too: take off the model what cannot be copied."
    return copy_model("fold", model, remedy)


def _plan_that_holds(
    model: Module, graph: Graph, example_inputs: Any, borders: bool, keep_range: bool
) -> tuple[Plan, dict[str, Parameter]]:
    """Return what can be done with ``model``, all of it proved, and its new parameters; it is not changed."""
    banned: dict[str, str] = {}
    while True:
        plan = make_plan(model, graph, banned, with_borders=borders)
        parameters, problems = _rounded(model, plan, keep_range)
        if plan.steps and not problems:
            with threads_for_float64(graph):
                problems = _problems(model, plan, example_inputs, banned)
        if not problems:
            sources = {use.name: describe_source(graph, use) for use in norm_uses(model, graph)}
            plan.left += [LeftNorm(name, sources.get(name), reason) for name, reason in banned.items()]
            return plan, parameters
        banned |= problems


def _rounded(model: Module, plan: Plan, keep_range: bool) -> tuple[dict[str, Parameter], dict[str, str]]:
    """Return the new parameters, and the norms that must stay because one does not fit into its type."""
    try:
        parameters = round_parameters(model, plan.parameters)
        lost = lost_ranges(model, plan.parameters, parameters) if keep_range else []
        return parameters, norms_that_shrink(plan.steps, lost)
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
        return dict.fromkeys(_culprits(model, plan, example_inputs, banned), reason)
    return proof.problems()


def _culprits(model: Module, plan: Plan, example_inputs: Any, banned: Collection[str]) -> list[str]:
    """Return the norms without which the model raises, found by halves."""
    names = [step.name for step in plan.steps]
    if len(names) == 1:
        return names
    found: list[str] = []
    for half in (names[: len(names) // 2], names[len(names) // 2 :]):
        stay = {*banned, *names} - set(half)
        part = make_plan(model, plan.graph, stay, with_borders=plan.with_borders)
        copied = _copy(model)
        Rewrite().apply(copied, part, round_parameters(copied, part.parameters))
        try:
            run(copied, example_inputs)
        except InputError:
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
    for step in plan.steps:
        values = (step.use.calls[0].args[key] for key in ("running_mean", "running_var", "weight", "bias"))
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
