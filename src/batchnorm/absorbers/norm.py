"""Norms with fixed statistics: a map of the channels is absorbed into γ and β."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import Module
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.absorbers.operator import AbsorbingOperator, Constant, Hold, LayerParameters
from batchnorm.dataflow.graph import Call, Value
from batchnorm.dataflow.refusal import Refusal
from batchnorm.nn.operators import bound_arguments
from batchnorm.travel.maps import Map
from batchnorm.travel.rules import Absorbed, Knowledge

__all__ = ["Norm", "NormLayer"]


class NormLayer(_BatchNorm):
    """A batch norm of inputs of any number of dimensions, as the function is."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Take all."""


class Norm(AbsorbingOperator):
    """``batch_norm`` with fixed statistics, γ (x − μ)/σ + β."""

    name = "batch_norm"
    kind: ClassVar[str] = "norm"
    forms = ("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
    functions: Mapping[Any, Any] = MappingProxyType({torch.batch_norm: torch.ops.aten.batch_norm.default})

    def channel_axis(self, dim: int) -> int:
        """Return the axis of the channels."""
        return 1

    def backward(self, call: Call, wanted: Sequence[Map], known: Knowledge) -> Absorbed:
        """Absorb a map of the output."""
        _require_fixed_statistics(call)
        return super().backward(call, wanted, known)

    def forward(self, call: Call, given: Mapping[Value, Map], known: Knowledge) -> Absorbed:
        """Absorb a map of the input."""
        _require_fixed_statistics(call)
        return super().forward(call, given, known)

    def merge(self, call: Call, absorbed: Absorbed, now: LayerParameters, known: Knowledge) -> LayerParameters:
        r"""Return the γ and β that compute a map, too.

        .. math::

            s \Big(\gamma \frac{x - \mu}\sigma + \beta\Big) + t = s \gamma \frac{x - \mu}\sigma + (s \beta + t) \qquad
            \gamma \frac{s x + t - \mu}\sigma + \beta = s \gamma \frac{x - \mu}\sigma
            + \Big(\beta + \gamma \frac{t - \mu + s \mu}\sigma\Big)
        """
        scale, shift = self.channels_of(call, absorbed)
        gamma, beta = now.weight, now.bias
        assert beta is not None
        if absorbed.side == "output":
            return LayerParameters(scale * gamma, scale * beta + shift)
        mean, var = (known.tensor(call.args[key]) for key in ("running_mean", "running_var"))
        deviation = torch.sqrt(var + call.args["eps"])
        return LayerParameters(scale * gamma, beta + gamma * (shift - mean + scale * mean) / deviation)

    def factor(self, call: Call, known: Knowledge) -> Tensor | None:
        """Return what a call multiplies its input by, γ/σ, as a tensor of as many axes; None if that is not fixed."""
        var, weight = call.args["running_var"], call.args["weight"]
        if call.args["training"] or var is None:
            return None
        scale = torch.rsqrt(known.tensor(var) + call.args["eps"])
        scale = scale if weight is None else scale * known.tensor(weight)
        return scale.reshape([1, -1] + [1] * (len(call.output.shape) - 2))

    def by_channel(self, weight: Tensor, groups: int) -> Tensor:
        """Return γ as (C, 1)."""
        return weight.reshape(-1, 1)

    def settings(self, args: Mapping[str, Any]) -> Module:
        """Return the layer with its settings and statistics."""
        mean, var = args["running_mean"], args["running_var"]
        if args["training"] or mean is None or var is None:
            raise Refusal("It is in batch mode, so its output depends on the batch.")
        norm = NormLayer(len(mean), eps=args["eps"], affine=False, device="meta")
        norm.momentum, norm.num_batches_tracked = args["momentum"], None
        norm.running_mean, norm.running_var = mean.detach().clone(), var.detach().clone()
        return norm

    def arguments(
        self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], constant: Constant
    ) -> Mapping[str, Any] | None:
        """Return the operator's arguments, if that is what a node of a program computes; else None."""
        if target is F.batch_norm:
            return {"cudnn_enabled": True, **bound_arguments(target, args, kwargs)}
        return super().arguments(target, args, kwargs, constant)

    def in_own_form(self, form: str, args: Mapping[str, Any], constant: Constant) -> Mapping[str, Any] | None:
        """Return the arguments of one of the forms as those of the operator."""
        return {"training": False, "cudnn_enabled": True, **args}

    def written(self, layer: Any, node: Node, hold: Hold) -> tuple[Any, tuple[Any, ...]]:
        """Return the target and the arguments with which a node of a program computes a layer."""
        state = [None if (t := getattr(layer, key)) is None else hold(key, t) for key in _STATE]
        fixed = (False, layer.momentum, layer.eps, True)
        return torch.ops.aten.batch_norm.default, (node.args[0], *state, *fixed)


_STATE = ("weight", "bias", "running_mean", "running_var")


def _require_fixed_statistics(call: Call) -> None:
    if call.args["training"] or call.args["running_mean"] is None or call.args["running_var"] is None:
        raise Refusal("A norm in batch mode stands between.")
