"""Norms with fixed statistics, absorbed by the linear operators that they follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from batchnorm.errors import InputError, StateError, VerificationError
from batchnorm.graph.dataflow import Graph
from batchnorm.graph.fold_result import FoldedNorm, FoldResult, LeftNorm
from batchnorm.graph.merge import Merged, Rewrite, find_tensor, merge, norm_tensors
from batchnorm.graph.norms import norm_uses, require_no_alternative, unreached_norms
from batchnorm.graph.refusal import Refusal
from batchnorm.graph.site_check import SiteCheck
from batchnorm.graph.sites import Site, describe_source, find_site
from batchnorm.graph.threads import threads_for_float64
from batchnorm.graph.trace import trace
from batchnorm.graph.verify import Agreement, Reference, run, spacing, verify, verify_float64
from batchnorm.nn.copying import copy_model
from batchnorm.nn.require import require_readable

__all__ = ["fold"]


def fold(model: Module, example_inputs: Any, *, inplace: bool = False) -> FoldResult:
    r"""Absorb every norm that can be absorbed into the convolution or linear layer before it.

    With fixed statistics a norm is s·x + t per channel, and the operator before it can compute that itself:

    .. math::

        s = \frac{\gamma}{\sqrt{\mathrm{var} + \varepsilon}} \qquad W' = s W \qquad
        b' = s\,(b - \mathrm{mean}) + \beta

    (Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 2, line 11; ``var`` as it is stored.) Merged in float64, rounded
    once. Convolutions and transposed convolutions of 1 to 3 dimensions, with groups and any padding, and linear layers
    absorb a norm that is the only reader of their output; dropout that is off may be in between. Each norm that is left
    is listed with the reason.

    The model is run on copies, as it is: in the modes, dtypes and on the devices it is in. What is folded is what the
    pass shows, so the inputs must take the way through the model that matters. Where a norm that they do not reach
    stands beside one that they do (``bns.0`` and ``bns.1``), neither is folded: other inputs may take the other. Every
    site is proved in float64 on the input it meets, and the folded
    model is compared with the original end to end (about ten forward passes in all, two of them in float64).

    Args:
        model: any model that runs; call ``model.eval()`` first.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        inplace: fold ``model`` itself, once all is verified, instead of a copy.

    Returns:
        The folded model, of the same class: its norms are ``torch.nn.Identity``, their neighbours have new parameters,
        and a bias where they had none. The state dict changes accordingly.

    Raises:
        InputError: the model fails on the inputs.
        StateError: the model cannot be copied, is scripted, or has lazy parameters that have not been initialized.
        VerificationError: the outputs differ by more than rounding explains. As after every other exception, the model
            is as it was.

    Example:
        >>> import torch, batchnorm
        >>> from batchnorm.graph.fold import fold
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.BatchNorm2d(8)
        ... ).eval()
        >>> result = fold(net, torch.randn(1, 3, 16, 16))
        >>> for norm in [*result.folded, *result.left]:
        ...     print(norm)
        1 → 0: folded.
        3: not folded. It reads the output of relu in 2, which is no linear operator.
        >>> [type(module).__name__ for module in result.model]
        ['Conv2d', 'Identity', 'ReLU', 'BatchNorm2d']
        >>> result.error <= result.bound
        True
    """
    require_readable("fold", model)
    if isinstance(model, DistributedDataParallel):
        raise StateError("fold: DistributedDataParallel writes into the buffers before each pass. Fold model.module.")
    with torch.inference_mode(False):
        work = _copy(model)
        graph = trace(work, example_inputs)
        sites, left, order = _find_sites(work, graph)
        agreement, exact = Agreement(0.0, 0.0), None
        folds = _merge_all(work, sites, left)
        if folds:
            reference = Reference.of(work, example_inputs, _touched(work, folds))
            with threads_for_float64(graph):
                folds = _fold_those_that_hold(work, example_inputs, folds, left)
        if folds:
            agreement = verify(reference, run(work, example_inputs))
            with threads_for_float64(graph):
                exact = _in_float64(model, example_inputs, list(folds), reference)
        del work
        target = model if inplace else _copy(model)
        with _all_or_nothing() as rewrite:
            for site, merged in folds.items():
                rewrite.fold(target, site, merged)
    return FoldResult(
        target,
        [FoldedNorm(site.norm, site.into, site.kind) for site in folds],
        sorted(left, key=lambda item: order[item.norm]),
        agreement.error,
        agreement.bound,
        exact.error if exact is not None else None,
    )


def _copy(model: Module) -> Module:
    remedy = "Folding is tried out on copies, with inplace=True too: take off the model what cannot be copied."
    return copy_model("fold", model, remedy)


def _find_sites(model: Module, graph: Graph) -> tuple[list[Site], list[LeftNorm], dict[str, int]]:
    """Return the norms that can be folded, those that cannot, and the order of all of them."""
    uses = norm_uses(model, graph)
    unreached = unreached_norms(model, uses)
    sites: list[Site] = []
    left: list[LeftNorm] = []
    for use in uses:
        try:
            require_no_alternative(model, use.owner, unreached)
            sites.append(find_site(model, graph, use))
        except Refusal as refusal:
            left.append(LeftNorm(use.name, describe_source(graph, use), str(refusal)))
    left += [LeftNorm(name, None, "The example inputs do not reach it.") for name in unreached]
    order = {name: index for index, name in reversed(list(enumerate([*(use.name for use in uses), *unreached])))}
    return sites, left, order


def _merge_all(model: Module, sites: Sequence[Site], left: list[LeftNorm]) -> dict[Site, tuple[Merged, ...]]:
    folds = {}
    for site in sites:
        try:
            folds[site] = merge(model, site)
        except Refusal as refusal:
            left.append(LeftNorm(site.norm, site.into, str(refusal)))
    return folds


def _touched(model: Module, sites: Iterable[Site]) -> list[Tensor]:
    """Return every tensor that goes into a merged parameter, each once."""
    tensors: dict[int, Tensor] = {}
    for site in sites:
        names = [f"{host.name}.{slot}".removeprefix(".") for host in site.hosts for slot in (host.weight, host.bias)]
        for tensor in (*norm_tensors(model, site.state), *(find_tensor(model, name) for name in names)):
            if tensor is not None:
                tensors[id(tensor)] = tensor
    return list(tensors.values())


def _fold_those_that_hold(
    model: Module, example_inputs: Any, folds: dict[Site, tuple[Merged, ...]], left: list[LeftNorm]
) -> dict[Site, tuple[Merged, ...]]:
    """Fold ``model`` by the sites that are proved on a run of it, and return them; the others are added to ``left``."""
    holding = dict(folds)
    while holding:
        rewrite, problems = Rewrite(), {}
        try:
            problems = _problems(model, example_inputs, holding, rewrite)
        except InputError as error:
            reason = f"Without it the model stops: {error.__cause__}."
            problems = dict.fromkeys(_culprits(model, example_inputs, holding, rewrite), reason)
        if not problems:
            return holding
        rewrite.roll_back()
        for site, reason in problems.items():
            left.append(LeftNorm(site.norm, site.into, reason))
            del holding[site]
    return holding


def _problems(
    model: Module, example_inputs: Any, folds: dict[Site, tuple[Merged, ...]], rewrite: Rewrite
) -> dict[Site, str]:
    check = SiteCheck()
    for site, merged in folds.items():
        check.watch(model, site, merged)
    for site, merged in folds.items():
        rewrite.fold(model, site, merged)
    trace(model, example_inputs, observer=check)
    return check.problems()


def _culprits(
    model: Module, example_inputs: Any, folds: dict[Site, tuple[Merged, ...]], rewrite: Rewrite
) -> list[Site]:
    """Return the sites whose folding makes the model raise, found by halves; ``model`` is not folded afterwards."""
    rewrite.roll_back()
    if len(folds) == 1:
        return list(folds)
    items = list(folds.items())
    found: list[Site] = []
    for half in (dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])):
        try:
            _problems(model, example_inputs, half, rewrite)
        except InputError:
            found += _culprits(model, example_inputs, half, rewrite)
        rewrite.roll_back()
    if not found:
        raise VerificationError(
            "The folded model fails on the example inputs, though neither half of its norms alone makes it fail. It is "
            "not returned; the original is unchanged."
        )
    return found


def _in_float64(model: Module, example_inputs: Any, sites: Sequence[Site], reference: Reference) -> Agreement | None:
    """Fold a float64 copy by the same sites and compare."""
    wide = _copy(model).double()
    roundoff = max(spacing(tensor) / 2 for tensor in _touched(model, sites))

    def rewrite() -> None:
        changes = Rewrite()
        for site, merged in [(site, merge(wide, site)) for site in sites]:
            changes.fold(wide, site, merged)

    return verify_float64(wide, example_inputs, reference, rewrite, roundoff)


@contextmanager
def _all_or_nothing() -> Iterator[Rewrite]:
    rewrite = Rewrite()
    try:
        yield rewrite
    except BaseException:
        rewrite.roll_back()
        raise
