"""Statistics that depend on themselves, brought to rest: those of norms that are called several times in a pass."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import inf

import torch
from torch import Tensor

from batchnorm.statistics.sites import Site
from batchnorm.statistics.values import Statistics, rounded

__all__ = ["Settling", "distance", "distances"]

_WINDOW = 5
"""So many earlier passes are looked back at."""
_WORSE = 2.0
"""A pass that ends this many times further from rest than the best one is thrown away, and a shorter step taken."""
_SMALLEST_STEP = 2.0**-6
_TINY = torch.finfo(torch.float64).tiny


def distance(old: Statistics, new: Statistics, eps: float) -> float:
    """Return how far statistics have moved: the mean in standard deviations, the variance as the log of the ratio."""
    return max(distances(old, new, eps))


def distances(old: Statistics, new: Statistics, eps: float) -> tuple[float, float]:
    """Return how far the mean has moved, in the smaller standard deviation, and the logarithm of variance + ε."""
    before, after = ((t.double() + eps).clamp(min=_TINY) for t in (old[1], new[1]))
    mean = (new[0].double() - old[0].double()).abs() / before.minimum(after).sqrt()
    return float(mean.max()), float((after.log() - before.log()).abs().max())


class Settling:
    r"""Looks for statistics that a model brings about when its norms normalize by them: a fixed point x = F(x).

    A pass over the stream evaluates F. With x the means and the logarithms of variance + ε of all norms concerned, in
    float64, and r = F(x) − x, the next x is that of Anderson's mixing,

    .. math::

        x_{k+1} = x_k + \beta r_k - \sum_j \gamma_j (\Delta x_j + \beta \Delta r_j), \qquad
        \gamma = \arg\min \lVert r_k - \sum_j \gamma_j \Delta r_j \rVert

    over the last differences; with none it is a step of length β towards F(x). Plain steps (β = 1) come to rest only
    where F contracts: a norm that is applied to its own output overshoots, for what is large makes the next statistics
    small. So after a pass that ends further from rest than the best one, the search goes on from there with half the
    step.

    Args:
        eps: what each norm adds to the variance.

    Source: Anderson 1965, "Iterative procedures for nonlinear integral equations"; Walker & Ni 2011, "Anderson
    acceleration for fixed-point iterations", equation 2.1.
    """

    def __init__(self, eps: Mapping[Site, float]) -> None:
        self._eps = dict(eps)
        self._step = 1.0
        self._best = inf
        self._best_pair: tuple[Tensor, Tensor] | None = None
        self._xs: list[Tensor] = []
        self._rs: list[Tensor] = []

    @property
    def sites(self) -> set[Site]:
        """The norms concerned."""
        return set(self._eps)

    def next(self, used: Mapping[Site, Statistics], met: Mapping[Site, Statistics]) -> dict[Site, Statistics]:
        """Return what to normalize by in the next pass, rounded as the buffers round.

        Args:
            used: what the norms normalized by in this pass.
            met: the statistics of what they met.
        """
        x, target = self._vector(used), self._vector(met)
        residual, scale = target - x, self._scale(met)
        size = float((residual * scale).square().mean().sqrt())
        if size < self._best:
            self._best, self._best_pair = size, (x, residual)
        elif size > _WORSE * self._best:
            return self.retreat(used)
        self._xs, self._rs = [*self._xs[-_WINDOW:], x], [*self._rs[-_WINDOW:], residual]
        return self._statistics(self._mixed(scale), used)

    def retreat(self, like: Mapping[Site, Statistics]) -> dict[Site, Statistics]:
        """Return what to normalize by after a pass that led astray: half a step from the best one."""
        assert self._best_pair is not None
        self._step = max(self._step / 2, _SMALLEST_STEP)
        x, residual = self._best_pair
        self._xs, self._rs = [x], [residual]
        return self._statistics(x + self._step * residual, like)

    def _mixed(self, scale: Tensor) -> Tensor:
        x, residual, step = self._xs[-1], self._rs[-1], self._step
        if len(self._xs) < 2:
            return x + step * residual
        dx, dr = (torch.stack([b - a for a, b in pairwise(v)], 1) for v in (self._xs, self._rs))
        solved = torch.linalg.lstsq(dr * scale[:, None], (residual * scale)[:, None], rcond=1e-10, driver="gelsd")
        gamma: Tensor = solved.solution
        return x + step * residual - ((dx + step * dr) @ gamma).flatten()

    # -- a vector for all norms together -------------------------------------------------------------------------------

    def _vector(self, statistics: Mapping[Site, Statistics]) -> Tensor:
        parts = []
        for site, eps in self._eps.items():
            mean, variance = (t.detach().cpu().double() for t in statistics[site])
            parts += [mean, (variance + eps).clamp(min=_TINY).log()]
        return torch.cat(parts)

    def _scale(self, statistics: Mapping[Site, Statistics]) -> Tensor:
        """Return what a difference is multiplied by to be one in standard deviations, or relative."""
        parts = []
        for site, eps in self._eps.items():
            variance = statistics[site][1].detach().cpu().double()
            parts += [(variance + eps).clamp(min=_TINY).rsqrt(), torch.ones_like(variance)]
        return torch.cat(parts)

    def _statistics(self, x: Tensor, like: Mapping[Site, Statistics]) -> dict[Site, Statistics]:
        found, start = {}, 0
        for site, eps in self._eps.items():
            size = like[site][0].numel()
            mean, logarithm = x[start : start + size], x[start + size : start + 2 * size]
            most = torch.finfo(site.running_var.dtype).max
            mean, variance = mean.clamp(-most, most), (logarithm.exp() - eps).clamp(0, most)
            found[site] = rounded(site, mean, variance)
            start += 2 * size
        return found
