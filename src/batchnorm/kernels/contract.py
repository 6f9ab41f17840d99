r"""What a backend offers: the phases of batch normalization, split so that others can work between them.

Activations ``x`` are (N, C) or (N, C, \*space) with any strides; a 2-D input is rows. Data are float32, bfloat16 or
float16 with float32 parameters, or of one dtype throughout; statistics pass between the phases in float64, shape (C,).

A masked norm, a norm synchronized across processes and recalibration all take :meth:`Backend.moments`, do something to
the result, and go on with :meth:`Backend.normalize`; a plain training step may take both in one trip through memory,
:meth:`Backend.train_forward`, which a backend overrides where it can.

How exact a backend must be is written in :mod:`batchnorm.kernels.accuracy`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

from torch import Tensor

from batchnorm.moments import Moments

__all__ = [
    "NO_COUNTERS",
    "Backend",
    "Candidate",
    "Counters",
    "Gradients",
    "Reduced",
    "Request",
    "Transform",
    "WholeCall",
    "normalizers",
]


class Counters(NamedTuple):
    """What is counted beside the running statistics: int64 tensors of no dimensions, or None; and what enters these.

    Attributes:
        batches: those that entered in every channel; a layer's ``num_batches_tracked``.
        refused: those that did not, in one channel or more.
        skip_nonfinite: whether steps that are not finite have to be kept out; else a backend keeps them out where that
            costs nothing.
    """

    batches: Tensor | None = None
    refused: Tensor | None = None
    skip_nonfinite: bool = True


NO_COUNTERS = Counters()

_Optional: TypeAlias = Tensor | None
WholeCall: TypeAlias = tuple[
    Tensor, _Optional, _Optional, _Optional, _Optional, bool, float, float, str | None, _Optional, bool
]
"""input, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual and inplace, as
:func:`batchnorm.functional.batch_norm` takes them: a plain tuple, for every layer makes one a call."""


@dataclass(frozen=True)
class Request:
    """A call that some backend is to serve; dtype, layout and device are those of its tensors."""

    input: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    activation: str | None = None
    residual: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Transform:
    """What happens to the values once the statistics are known.

    y = activation(weight · (x − mean) · rstd + bias + residual), and y = 0 where the mask is False.

    Attributes:
        mean: float64, (C,).
        rstd: 1/√(variance + eps), float64, (C,).
        weight: γ, (C,); None means 1.
        bias: β, (C,); None means 0.
        residual: of the shape and dtype of x; None means 0.
        activation: a key of ``ACTIVATIONS``; None is the identity.
        mask: bool, expanded (not copied) to the shape of x: its stride over the channels is 0 where it masks positions.
    """

    mean: Tensor
    rstd: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: str | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Reduced:
    """What the backward pass sums per channel, over the ``count`` valid values; g = dy · activation′.

    Attributes:
        count: number of values, float64, (C,); the divisor of both means in the input gradient.
        sum_dy: Σ g, float64, (C,): the gradient of the bias.
        sum_dy_xhat: Σ g·x̂, float64, (C,): the gradient of the weight.
    """

    count: Tensor
    sum_dy: Tensor
    sum_dy_xhat: Tensor


class Gradients(NamedTuple):
    """What :meth:`Backend.backward_input` gives: both of the shape and dtype of x."""

    input: Tensor
    residual: Tensor | None


class Candidate(ABC):
    """What may serve calls: whole ones, or those that :class:`Backend` splits into phases."""

    name: str

    @abstractmethod
    def refusal(self, request: Request) -> str | None:
        """Return None if this backend can serve the call, else why not, as the end of a sentence."""

    def prefers_not(self, request: Request) -> str | None:
        """Return why another had better serve a call that this one could, or None; not asked of a forced backend."""
        return None

    def serve(self, call: WholeCall, counters: Counters, forced: bool) -> Tensor | None:
        """Serve a whole call without mask, with gradients, running statistics and counters, if that is possible.

        Beside the call come ``counters`` to count the batch of a training step in, and whether this backend is
        ``forced``, so that no other may take the call. Nothing has been checked: what does not fit together makes it
        raise whatever it raises, or return None.

        Returns:
            y; None, with nothing done, if the call has to be served otherwise.
        """
        return None


class Backend(Candidate):
    """One way to compute batch normalization, phase by phase.

    None of the methods validates: shapes, dtypes and devices have been checked above. None writes into its arguments,
    but for what :meth:`Candidate.serve` updates.
    """

    @abstractmethod
    def moments(self, x: Tensor, mask: Tensor | None = None) -> Moments:
        """Return count, mean and M2 of the valid values, per channel."""

    @abstractmethod
    def normalize(self, x: Tensor, transform: Transform) -> Tensor:
        """Return y, of the dtype and memory layout of x; 0 where the mask is False, whatever x holds there."""

    @abstractmethod
    def backward_reduce(self, dy: Tensor, x: Tensor, transform: Transform) -> Reduced:
        """Return the two sums over the batch; positions outside the mask add nothing."""

    @abstractmethod
    def backward_input(self, dy: Tensor, x: Tensor, transform: Transform, reduced: Reduced | None) -> Gradients:
        """Return the gradients of x and of the residual.

        With g = dy · activation′ and the sums of the whole batch in ``reduced``,
        dx = weight · rstd · (g − Σg/n − x̂ · Σ(g·x̂)/n). None for ``reduced`` means that mean and rstd do not depend on
        x (evaluation): dx = weight · rstd · g. The residual's gradient is g; None if there is no residual.
        """

    def train_forward(self, x: Tensor, transform: Transform, eps: float) -> tuple[Tensor, Moments]:
        """Return y and the moments of x that normalized it; ``mean`` and ``rstd`` of the transform are not read.

        Made of the split phases; a fused backend overrides it.
        """
        moments = self.moments(x, transform.mask)
        mean, rstd = normalizers(moments, eps)
        return self.normalize(x, replace(transform, mean=mean, rstd=rstd)), moments

    def train_backward(self, dy: Tensor, x: Tensor, transform: Transform) -> tuple[Gradients, Reduced]:
        """Return the input gradients and the two sums; made of the split phases, a fused backend overrides it."""
        reduced = self.backward_reduce(dy, x, transform)
        return self.backward_input(dy, x, transform, reduced), reduced


def normalizers(moments: Moments, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and rstd = 1/√(M2/n + eps): the variance with divisor n (biased), 0 for a channel without values."""
    return moments.mean, (moments.m2 / moments.count.clamp(min=1) + eps).rsqrt()
