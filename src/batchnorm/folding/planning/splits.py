"""The map that a norm is, and the ways in which it can be cut into a part to go back and one to go on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from batchnorm.dataflow.refusal import Refusal
from batchnorm.folding.planning.merged_parameters import Parameters
from batchnorm.folding.planning.removable_norm import NormState
from batchnorm.travel.maps import Map

__all__ = ["Split", "norm_map", "splits"]


class Split(NamedTuple):
    """A norm's map as two parts, of which one may be missing.

    Attributes:
        before: what layers before the norm are to absorb; None for nothing.
        after: what layers after it are to absorb.
        with_borders: whether convolutions may be made to pad with other values than zeros for that.
    """

    before: Map | None
    after: Map | None
    with_borders: bool = False


def norm_map(parameters: Parameters, state: NormState) -> Map:
    """Return what a norm computes with its parameters as they are now.

    Raises:
        Refusal: its statistics are unusable.
    """
    mean, var, weight, bias = (
        None if name is None else parameters.named(name)
        for name in (state.running_mean, state.running_var, state.weight, state.bias)
    )
    for name, tensor in (("running_mean", mean), ("running_var", var), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.is_meta:
            raise Refusal(f"Its {name} is on the meta device, where tensors have no values.")
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise Refusal(f"Its {name} is not finite.")
    assert mean is not None
    assert var is not None
    lowest = float(var.min()) if var.numel() else 1.0
    if lowest < 0:
        raise Refusal(f"Its running_var is negative ({lowest:.3g}).")
    if lowest + state.eps <= 0:
        raise Refusal("Its running_var and eps are both 0, so it divides by zero.")
    return Map.of_norm(mean, var, weight, bias, state.eps).each(lambda values: values.cpu())


def splits(map_: Map, with_borders: bool) -> Iterator[Split]:
    """Yield all splits without borders, and after that, as they cost something, those with them."""
    yield from (Split(*parts) for parts in _parts(map_))
    if with_borders:
        yield from (Split(*parts, with_borders=True) for parts in _parts(map_))


def _parts(map_: Map) -> Iterator[tuple[Map | None, Map | None]]:
    r"""Yield how a map can be cut into a part for the operators before the norm and one for those after it.

    All of it before; all of it after. Then, with s ≠ 0, the parts

    .. math::

        s x + t = s \left(x + \tfrac ts\right) = |s| \left(\operatorname{sign}(s)\, x + \tfrac t{|s|}\right)
        = (s x) + t

    of which a positive scale crosses a ReLU, and a shift crosses an addition. Both parts have to be absorbed: one that
    stays is a pass over memory as the whole is, and is none only if it is the identity, which is one of the first two.
    """
    scale, shift = map_.scale, map_.shift
    one, zero = torch.ones_like(scale), torch.zeros_like(shift)
    yield map_, None
    yield None, map_
    if map_.only_scales or map_.only_shifts:
        return
    if bool((scale != 0).all()):
        yield Map(one, shift / scale), Map(scale, zero)
        if bool((scale < 0).any()):
            yield Map(scale.sign(), shift / scale.abs()), Map(scale.abs(), zero)
    yield Map(scale, zero), Map(one, shift)
