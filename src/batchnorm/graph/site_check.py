r"""The proof of each site: a folded operator against the operator and the norm it replaces, on the input it meets.

Both are computed in float64, the folded one from its parameters as they are stored. With unit roundoff u of the stored
dtype, v of float64, and K products a sum, element by element

.. math::

    |\mathrm{folded} - \mathrm{original}| \le
        (u + 2\gamma_{K+12})\,M + \eta\,(\mathbf 1 * |x| + 1)

    M = |s|\,(|W| * |x| + |b| + |\mathrm{mean}|) + |\beta|

where :math:`\gamma_n = n v / (1 - n v)` (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., §3.1).

*Where it comes from.* The merged weight is sW rounded once, an error of at most ``u|sW|``, and the merged bias is
s(b − mean) + β rounded once, at most ``u(|s|(|b| + |mean|) + |β|)``; through the operator the two add up to u·M. Below
the normal range rounding errs by less than the smallest subnormal number η instead, for each weight and for the bias.
Either side, in float64, sums K products and spends fewer than 12 further operations on s, the shift and the norm; each
errs by at most γ of that many times M, whatever the order of summation (§3.1, eq. 3.5). Float64 convolutions are sums
of products on every backend; the fast algorithms with other error bounds (Winograd, FFT) exist for shorter types only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from batchnorm.graph.dataflow import Call
from batchnorm.graph.merge import Merged, find_tensor, norm_tensors
from batchnorm.graph.norms import is_norm
from batchnorm.graph.rounding import float64_gamma, to_float64
from batchnorm.graph.sites import Site
from batchnorm.nn.operators import named_arguments

__all__ = ["SiteCheck"]

_SAMPLES = 2
"""Entries of the batch that are checked: the operators treat every entry alike."""

_SMALL_OPERATIONS = 12


@dataclass(eq=False)
class _Watched:
    """A host before and after, and what became of it."""

    site: Site
    merged: Merged
    weight: Tensor
    bias: Tensor | None
    norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    calls: int = 0
    problem: str | None = None


@dataclass(eq=False)
class SiteCheck:
    """An observer of one run of the folded model: does each host use its new parameters, and do they compute the same?

    :meth:`watch` takes a site before it is folded; after the run :meth:`problems` says what is wrong with which site.
    """

    _hosts: dict[int, _Watched] = field(default_factory=dict)  # by the identity of the new weight
    _replaced: dict[int, Site] = field(default_factory=dict)  # by the identity of the old weight, or the old statistics
    _still_used: dict[Site, str] = field(default_factory=dict)

    def watch(self, model: Module, site: Site, merged: Sequence[Merged]) -> None:
        """Remember what a site computes in ``model``, where it is not folded yet."""
        norm = norm_tensors(model, site.state)
        self._replaced[id(norm[0])] = site
        for host in merged:
            weight = find_tensor(model, _join(host.host.name, host.host.weight))
            bias = find_tensor(model, _join(host.host.name, host.host.bias))
            assert weight is not None
            self._hosts[id(host.weight)] = _Watched(site, host, weight, bias, norm)
            self._replaced[id(weight)] = site

    def __call__(self, call: Call, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Look at one operator call."""
        given = named_arguments(call.op._schema, args, kwargs)
        for key in ("weight", "running_mean"):
            site = self._replaced.get(id(given.get(key)))
            if site is not None and (key == "weight" or is_norm(call)):
                what = "the norm" if key == "running_mean" else f"{call.name} with the old weight"
                self._still_used[site] = f"The model still calls {what}, by a reference of its own."
        host = self._hosts.get(id(given.get("weight")))
        if host is None:
            return
        host.calls += 1
        if given["bias"] is not host.merged.bias:
            name, bias = host.merged.host.name, host.merged.host.bias
            host.problem = f"The forward of {name} does not use its parameter {bias!r}."
        elif host.problem is None:
            host.problem = _disagreement(call, given, host)

    def problems(self) -> dict[Site, str]:
        """Return the sites that must not be folded, with the reason."""
        found = dict(self._still_used)
        for host in self._hosts.values():
            expected = len(host.merged.host.calls)
            if host.problem is not None:
                found[host.site] = host.problem
            elif host.calls != expected:
                found.setdefault(
                    host.site, f"Folded, {host.merged.host.name} runs {host.calls} times instead of {expected}."
                )
        return found


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _disagreement(call: Call, given: dict[str, Any], host: _Watched) -> str | None:
    """Compute both sides and the bound; return a reason if the bound is exceeded."""
    x = to_float64(given["input"][:_SAMPLES])

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = call.op(**{**given, "input": x, "weight": weight, "bias": bias})
        assert isinstance(out, Tensor)
        return out

    mean, var, gamma, beta = (None if t is None else to_float64(t) for t in host.norm)
    assert mean is not None
    assert var is not None
    weight, bias = to_float64(host.weight), None if host.bias is None else to_float64(host.bias)
    eps = host.site.state.eps
    folded = apply(x, to_float64(host.merged.weight), to_float64(host.merged.bias))
    original = F.batch_norm(apply(x, weight, bias), mean, var, gamma, beta, False, 0.0, eps)
    magnitude = apply(x.abs(), weight.abs(), None if bias is None else bias.abs())
    scale = torch.rsqrt(var + eps) if gamma is None else gamma.abs() / torch.sqrt(var + eps)
    channels = (1, -1) + (1,) * (folded.dim() - 2)
    magnitude = scale.view(channels) * (magnitude + mean.abs().view(channels))
    if beta is not None:
        magnitude = magnitude + beta.abs().view(channels)
    finfo = torch.finfo(host.merged.weight.dtype)
    products = weight.numel() // max(mean.numel(), 1)
    bound = (finfo.eps / 2 + 2 * float64_gamma(products + _SMALL_OPERATIONS)) * magnitude
    underflow = finfo.smallest_normal * finfo.eps  # the smallest subnormal number
    bound = bound + underflow * (apply(x.abs(), torch.ones_like(weight), None) + 1)
    # Where x itself overflows there is nothing to compare: the end-to-end comparison looks at such places.
    excess = torch.where(torch.isfinite(bound), (folded - original).abs() / bound, 0.0)
    worst = float(excess.max()) if excess.numel() else 0.0
    if worst <= 1:  # NaN is not
        return None
    return f"Folded, {host.merged.host.name} errs by {worst:.3g} times the bound of its rounding."
