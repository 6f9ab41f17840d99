"""What can be wrong with a call, found once, above every kernel.

On the plain path torch checks its arguments itself, so nothing is checked twice: when it raises, :func:`first_problem`
finds the words. Everywhere else it runs before anything is computed or written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from batchnorm.errors import (
    ArgumentTypeError,
    BatchNormError,
    InputError,
    ShapeError,
    UnknownNameError,
    UnsupportedDtypeError,
    closest,
)
from batchnorm.kernels.activation import ACTIVATIONS, activation_called
from batchnorm.moments import expand_mask
from batchnorm.observers import is_transformed, recorded

__all__ = ["HALF", "check_activation", "check_extras", "check_valid_counts", "first_problem", "too_few_values"]

HALF = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, torch.float64, *HALF)


def first_problem(
    where: str,
    input: Tensor,
    state: Mapping[str, Tensor | None],
    training: bool,
    momentum: float,
    eps: float,
) -> BatchNormError | None:
    """Return the error that a call deserves, of the type that torch raises there; None if nothing is wrong.

    Args:
        where: what the message opens with: the layer, or the function.
        input: what is to be normalized.
        state: ``running_mean``, ``running_var``, ``weight`` and ``bias``, by name.
        training: whether statistics are taken from the batch.
        momentum: weight of the new batch.
        eps: what is added to the variance.
    """
    return next(_problems(where, input, state, training, momentum, eps), None)


def _problems(
    where: str, input: Tensor, state: Mapping[str, Tensor | None], training: bool, momentum: float, eps: float
) -> Iterator[BatchNormError]:
    for name, value in {"input": input, **state}.items():
        if not isinstance(value, Tensor) and not (value is None and name != "input"):
            yield ArgumentTypeError(f"{where}: {name} must be a tensor; got {type(value).__name__}.")
    if not isinstance(momentum, float | int):
        yield ArgumentTypeError(
            f"{where}: momentum must be a number; got {type(momentum).__name__}. The cumulative average that a layer "
            "with momentum=None keeps is momentum=1/(number of batches)."
        )
    if not isinstance(eps, float | int):
        yield ArgumentTypeError(f"{where}: eps must be a number; got {type(eps).__name__}.")
    if input.dim() < 2 and not (input.dim() == 1 and input.numel() == 0):
        yield InputError(
            f"{where}: expected an input of shape (N, C) or (N, C, *space); got {_shape(input)}. "
            "Add the missing dimension with input.unsqueeze(...)."
        )
    if input.dim() >= 2 and input.shape[1] == 0:
        yield InputError(f"{where}: expected an input with at least one channel; got {_shape(input)}.")
    yield from _state_problems(where, input, state, training)
    if eps < 0 or (training and eps == 0):
        sign = "positive during training" if training else "non-negative"
        yield ShapeError(f"{where}: eps must be {sign}; got {eps}. The usual value is 1e-5.")
    if training and input.dim() >= 2 and input.numel() == input.shape[1] != 0:
        yield too_few_values(where, input)
    yield from _dtype_problems(where, input, state)


def _state_problems(
    where: str, input: Tensor, state: Mapping[str, Tensor | None], training: bool
) -> Iterator[BatchNormError]:
    mean, var = state["running_mean"], state["running_var"]
    if training and (mean is None) != (var is None):
        missing = "running_mean" if mean is None else "running_var"
        yield ShapeError(
            f"{where}: running_mean and running_var must both be given or both be None; {missing} is None."
        )
    if not training and (mean is None or var is None):
        missing = "running_mean" if mean is None else "running_var"
        yield InputError(
            f"{where}: evaluation needs the stored statistics, but {missing} is None. Give both, or pass training=True "
            "to normalize with those of the batch."
        )
    channels = input.shape[1] if input.dim() > 1 else 0
    for name, tensor in state.items():
        if tensor is None:
            continue
        if tensor.numel() != channels:
            yield InputError(
                f"{where}: expected {tensor.numel()} channels, for {name} holds one value each; got {channels} in an "
                f"input of shape {_shape(input)}. Channels come second: (N, C) or (N, C, *space)."
            )
        if tensor.device != input.device:
            yield InputError(
                f"{where}: input is on {input.device}, {name} on {tensor.device}. Move one with .to(device)."
            )
        if name.startswith("running_") and tensor.requires_grad:
            yield InputError(f"{where}: {name} is a buffer and cannot require gradients. Pass {name}.detach().")


def _dtype_problems(where: str, input: Tensor, state: Mapping[str, Tensor | None]) -> Iterator[BatchNormError]:
    if input.dtype not in _DTYPES:
        yield UnsupportedDtypeError(
            f"{where}: expected a floating-point input (float32, float64, float16 or bfloat16); got {input.dtype}. "
            "Convert it with input.float()."
        )
    given = {name: tensor.dtype for name, tensor in state.items() if tensor is not None}
    allowed = {input.dtype, torch.float32} if input.dtype in HALF else {input.dtype}
    if len(set(given.values())) > 1 or not allowed.issuperset(given.values()):
        listed = ", ".join(f"{name} {dtype}" for name, dtype in given.items())
        wanted = " or ".join(sorted(map(str, allowed)))
        yield InputError(
            f"{where}: an input of {input.dtype} needs parameters and statistics all of {wanted}; got {listed}. "
            "Convert the input with .to(dtype), or the layer."
        )


def too_few_values(where: str, input: Tensor, valid: int | None = None) -> ShapeError:
    """Return the error for a channel with a single value, whose variance is 0 and whose output says nothing.

    Args:
        where: what the message opens with.
        input: what was to be normalized.
        valid: how many values the mask leaves, if there is one.
    """
    batch, space = input.shape[0], tuple(input.shape[2:])
    size = f"batch {batch}" + (f" × space {'×'.join(map(str, space))}" if space else "")
    got = f"got 1 ({size})" if valid is None else f"the mask leaves {valid} of {batch * math.prod(space)} ({size})"
    if where == "batch_norm":
        cure = "pass training=False with stored statistics."
    else:
        name = "name" if "(" in where else f'"{where}"'  # a layer that does not know its name says its class and size
        cure = f"freeze the layer: batchnorm.freeze(model, {name})."
    return ShapeError(f"{where}: training needs at least 2 values per channel; {got}.\nUse a larger batch, or {cure}")


def check_extras(
    where: str, input: Tensor, activation: str | None, residual: Tensor | None, mask: Tensor | None
) -> None:
    """Check what torch's batch_norm does not have.

    Raises:
        ArgumentTypeError: residual or mask is no tensor, or activation no string.
        UnknownNameError: there is no such activation.
        InputError: the residual's dtype or device, or the mask's, does not fit.
        ShapeError: their shape does not.
    """
    if activation is not None:
        check_activation(where, activation)
    if not isinstance(input, Tensor):
        raise ArgumentTypeError(f"{where}: input must be a tensor; got {type(input).__name__}.")
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise ArgumentTypeError(f"{where}: residual must be a tensor; got {type(residual).__name__}.")
        if residual.shape != input.shape:
            raise ShapeError(
                f"{where}: residual must have the shape of the input, {_shape(input)}; got {_shape(residual)}."
            )
        if residual.dtype != input.dtype or residual.device != input.device:
            raise InputError(
                f"{where}: residual must be {input.dtype} on {input.device} like the input; got {residual.dtype} on "
                f"{residual.device}. Convert it with residual.to(input)."
            )
    if mask is not None:
        _check_mask(where, input, mask)


def check_activation(where: str, activation: str) -> None:
    """Check that there is such an activation.

    Raises:
        ArgumentTypeError: it is no string.
        UnknownNameError: there is none of that name.
    """
    if not isinstance(activation, str):
        raise ArgumentTypeError(
            f"{where}: activation must be one of {', '.join(ACTIVATIONS)} or None; got {type(activation).__name__}."
        )
    if activation_called(activation) is None:
        raise UnknownNameError(
            f"{where}: activation {activation!r} is unknown; there are {', '.join(ACTIVATIONS)}, and leaky_relu(slope)"
            f"{closest(activation, ACTIVATIONS) or '.'}"
        )


def _check_mask(where: str, input: Tensor, mask: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise ArgumentTypeError(f"{where}: mask must be a boolean tensor; got {type(mask).__name__}.")
    if mask.device != input.device:
        raise InputError(
            f"{where}: input is on {input.device}, mask on {mask.device}. Move the mask with mask.to(input.device)."
        )
    if input.dim() < 2 or (mask.dtype == torch.bool and _fits(mask, input)):
        return
    try:
        expand_mask(mask, input, 1)
    except (InputError, ShapeError) as error:
        raise type(error)(f"{where}: {error}") from None


def _fits(mask: Tensor, input: Tensor) -> bool:
    """Return what :func:`expand_mask` would find, from the shapes alone: it leaves nothing in a captured graph."""
    shape = (*mask.shape[:1], 1, *mask.shape[1:]) if mask.dim() == input.dim() - 1 else tuple(mask.shape)
    pairs = zip(reversed(shape), reversed(input.shape), strict=False)
    return len(shape) <= input.dim() and all(m in (1, size) for m, size in pairs)


def check_valid_counts(where: str, input: Tensor, mask: Tensor) -> None:
    """Check that the mask leaves no channel with exactly one value to take statistics of.

    It reads the mask's values, so it waits for an accelerator, and is left out where there are none to read: while a
    graph is captured, on fake tensors and under ``vmap``. There such a channel is normalized to 0 and its running
    statistics stay as they are.

    Raises:
        ShapeError: it does.
    """
    if input.dim() < 2 or not _has_values(mask):
        return
    full = expand_mask(mask, input, 1)
    if mask.dim() < input.dim() or mask.shape[1] == 1:  # the same for every channel: count in one
        full = full[:, :1]
    if bool((full.sum([0, *range(2, full.dim())]) == 1).any()):
        raise too_few_values(where, input, valid=1)


def _has_values(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling() or recorded():
        return False
    return type(tensor) is Tensor and not is_transformed(tensor) and tensor.device.type != "meta"


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))}{',' if tensor.dim() == 1 else ''})"
