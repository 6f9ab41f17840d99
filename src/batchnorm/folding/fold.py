"""Norms with fixed statistics, absorbed by the operators before and after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from batchnorm.dataflow.sizes import Accepts
from batchnorm.errors import ArgumentTypeError, InputError, StateError
from batchnorm.folding.fold_model import Folded, fold_model
from batchnorm.folding.planning.plan import Options
from batchnorm.folding.program.fold_program import fold_program
from batchnorm.folding.result import FoldResult
from batchnorm.models.modules import become
from batchnorm.models.preconditions import require_readable
from batchnorm.models.transaction import transaction
from batchnorm.nn.input_normalization import WithNormalizedInput
from batchnorm.nn.provenance import with_provenance

__all__ = ["fold"]


@transaction("fold")
@with_provenance("fold")
def fold(
    model: Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    inplace: bool = False,
    input_mean: float | Sequence[float] | Tensor | None = None,
    input_std: float | Sequence[float] | Tensor | None = None,
    borders: bool = False,
    keep_range: bool = False,
    fuse: bool = False,
    examples: Sequence[Any] = (),
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
    runs show, so the inputs must take the way through the model that matters. One run takes numbers, pads, slices and
    branches that depend on sizes or values for constants, so there are several (:mod:`batchnorm.dataflow.sizes`): on
    the example inputs, on random ones like them, on others of other sizes (batch, and each further axis) and with other
    numbers among the arguments, as far as the model runs there, and on ``examples``. What does not hold in all of them
    is not folded, and the reason says where it does not. Sizes at which the model stops, and ways through its code that
    no run took, are named in ``result.warnings``. Where a norm that no run reaches stands beside one that one does
    (``bns.0`` and ``bns.1``), neither is folded: other inputs may take the other. Every value of all runs is compared
    in float64 with what it was, and the folded model with the original end to end. That is fifteen passes on inputs of
    the example's shape, four of them in float64; two more for a model that keeps something of its calls. The other
    sizes are small.

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
            of it otherwise (see :mod:`batchnorm.folding.proving.lost_range`). One that would make a parameter overflow
            always stays.
        fuse: let each norm that is left, if its statistics are fixed, become one multiply-add per channel
            (:class:`batchnorm.nn.scale_shift.ScaleShift`), computed in one pass with the activation behind it where
            that is a module of torch's own and reads nothing else. Otherwise they stay the modules that they are. Not
            for programs: what runs those fuses by itself.
        examples: further example inputs, each as ``example_inputs``: ways through the model that those do not take, a
            flag that is set, say. What is folded holds for them too.

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
        >>> from batchnorm.folding.fold import fold
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
    others = _listed(examples)

    def fold_module(module: Module, inputs: Any, inplace: bool = False, accepts: Accepts | None = None) -> Folded:
        require_readable("fold", module)
        if input_mean is None and input_std is None:
            return fold_model(module, inputs, inplace, Options(borders, keep_range, fuse), others, accepts)
        outer = WithNormalizedInput(module, inputs, input_mean, input_std)
        folded, pairs, outcome = fold_model(outer, inputs, inplace, Options(True, keep_range, fuse), others, accepts)
        if inplace and folded.inner is not module:  # the model itself is what was replaced
            become(module, folded.inner)
        return Folded(module if inplace else folded.inner, pairs, outcome)

    if isinstance(model, GraphModule | ExportedProgram):
        if fuse:
            raise StateError("fold: fuse=True is for modules. What runs a program fuses by itself.")
        return fold_program(model, example_inputs, inplace, fold_module)
    if example_inputs is None:
        raise InputError("fold: expected example_inputs, to run the model on; only exported programs hold their own.")
    if isinstance(model, DistributedDataParallel):
        raise StateError("fold: DistributedDataParallel writes into the buffers before each pass. Fold model.module.")
    folded = fold_module(model, example_inputs, inplace)
    return FoldResult.of(folded.outcome, model=folded.model, pairs=folded.pairs)


def _listed(examples: Any) -> list[Any]:
    """Return further example inputs as a list.

    Raises:
        ArgumentTypeError: they are no sequence: one tensor, or one dict of keyword arguments.
    """
    if not isinstance(examples, list | tuple):
        raise ArgumentTypeError(
            f"fold: examples: expected a list of inputs, each a tensor, a tuple or a dict; got a "
            f"{type(examples).__name__}. Pass examples=[...]."
        )
    return list(examples)
