"""Torch's own layers, built from the arguments of an operator's call: what a function called, as a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import Module, Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.dataflow.refusal import Refusal

__all__ = ["PLAIN_LAYERS", "Norm", "plain_layer"]


class Norm(_BatchNorm):
    """A batch norm of inputs of any number of dimensions, as the function is."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Take all."""


def plain_layer(name: str, args: Mapping[str, Any]) -> Module:
    """Return the layer that computes what an operator does, with parameters that are copies of its own.

    Args:
        name: one of :data:`PLAIN_LAYERS`.
        args: its arguments by their names in the schema; the tensors among them except the input, which is not read.

    Raises:
        Refusal: no layer of torch's computes this.
    """
    layer = PLAIN_LAYERS[name](args)
    for key in ("weight", "bias"):
        tensor = args.get(key)
        layer.register_parameter(key, None if tensor is None else _parameter(tensor))
    return layer.eval()


def _parameter(tensor: Tensor) -> Parameter:
    trained = tensor.is_floating_point() and isinstance(tensor, Parameter) and tensor.requires_grad
    return Parameter(tensor.detach().clone(), requires_grad=trained)


def _convolution(n: int, args: Mapping[str, Any]) -> Module:
    weight, groups = args["weight"], args["groups"]
    padding = args["padding"] if isinstance(args["padding"], str) else _sizes(args["padding"], n)
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    conv: Module = kind(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=_sizes(args["stride"], n),
        padding=padding,
        dilation=_sizes(args["dilation"], n),
        groups=groups,
        bias=False,
        device="meta",
    )
    return conv


def _transposed(n: int, args: Mapping[str, Any]) -> Module:
    weight, groups = args["weight"], args["groups"]
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
    conv: Module = kind(
        weight.shape[0],
        weight.shape[1] * groups,
        tuple(weight.shape[2:]),
        stride=_sizes(args["stride"], n),
        padding=_sizes(args["padding"], n),
        output_padding=_sizes(args["output_padding"], n),
        dilation=_sizes(args["dilation"], n),
        groups=groups,
        bias=False,
        device="meta",
    )
    return conv


def _sizes(value: Any, n: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * n if len(values) == 1 else values)


def _linear(args: Mapping[str, Any]) -> Module:
    weight = args["weight"]
    if weight.dim() != 2:
        raise Refusal(f"The weight of linear has {weight.dim()} dimensions.")
    return nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")


def _embedding(args: Mapping[str, Any]) -> Module:
    rows, features = args["weight"].shape
    padding = args["padding_idx"]
    return nn.Embedding(
        rows,
        features,
        padding_idx=None if padding == -1 else padding,
        scale_grad_by_freq=args["scale_grad_by_freq"],
        sparse=args["sparse"],
        device="meta",
    )


def _norm(args: Mapping[str, Any]) -> Module:
    mean, var = args["running_mean"], args["running_var"]
    if args["training"] or mean is None or var is None:
        raise Refusal("It is in batch mode, so its output depends on the batch.")
    norm = Norm(len(mean), eps=args["eps"], affine=False, device="meta")
    norm.momentum, norm.num_batches_tracked = args["momentum"], None
    norm.running_mean, norm.running_var = mean.detach().clone(), var.detach().clone()
    return norm


def _layers() -> Mapping[str, Callable[[Mapping[str, Any]], Module]]:
    table: dict[str, Callable[[Mapping[str, Any]], Module]] = {
        "linear": _linear,
        "embedding": _embedding,
        "batch_norm": _norm,
    }
    for n in (1, 2, 3):
        table[f"conv{n}d"] = lambda args, n=n: _convolution(n, args)  # type: ignore[misc]
        table[f"conv_transpose{n}d"] = lambda args, n=n: _transposed(n, args)  # type: ignore[misc]
    return table


PLAIN_LAYERS = _layers()
"""What builds the layer of each operator, by the operator's name in the aten namespace."""
