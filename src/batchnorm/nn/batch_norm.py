"""Batch normalization layers: torch's, with activation, residual and mask, and with errors that name the layer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.errors import ArgumentTypeError, ShapeError
from batchnorm.functional.batch_norm import normalize
from batchnorm.functional.validation import HALF, check_activation
from batchnorm.kernels.contract import NO_COUNTERS, Counters
from batchnorm.nn.guarded import Guarded, asked_for_class
from batchnorm.nn.pending import defer
from batchnorm.observers import recomputing

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

_STATISTICS = ("running_mean", "running_var")


class _Layer(Guarded, torch.nn.modules.batchnorm._BatchNorm):
    """What the three layers share; each of them also inherits the layer of torch that it stands in for."""

    # Class attributes, so that a layer of torch becomes one of ours by its class alone. They have no annotation:
    # torch.jit reads those of a module and does not understand postponed ones.
    fused = False  # set by convert(fuse=True): the output waits for the activation that follows
    activation = None  # type: str | None
    layer_name = None  # type: str | None
    inplace = False  # type: bool
    skip_nonfinite = True  # type: bool
    _refused = None  # type: Tensor | None

    __jit_unused_properties__ = ("center", "scale", *Guarded.__jit_unused_properties__)
    # for torch.jit.script: converted layers have it by their class only
    __constants__ = [*torch.nn.BatchNorm2d.__constants__, "activation"]  # noqa: RUF012  as torch has it

    _dims = ()  # type: tuple[int, ...]
    _shapes = ""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        center: bool = True,
        scale: bool = True,
        activation: str | None = None,
        inplace: bool = False,
        skip_nonfinite: bool = True,
    ) -> None:
        if activation is not None:
            check_activation(type(self).__name__, activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        # torch's `affine` says whether there is a weight: its own code reads it so
        self.affine = affine and scale
        if affine and not scale:
            self.weight = None  # type: ignore[assignment]
        if affine and not (center and bias):
            self.bias = None  # type: ignore[assignment]
        self.activation = activation
        if self.num_batches_tracked is not None:
            self._refusals(self.num_batches_tracked)
        if inplace:
            self.inplace = True
        if not skip_nonfinite:
            self.skip_nonfinite = False

    @property
    def center(self) -> bool:
        """Whether the layer has a shift β (its ``bias``)."""
        return self.bias is not None

    @property
    def scale(self) -> bool:
        """Whether the layer has a scale γ (its ``weight``)."""
        return self.weight is not None

    def reset_parameters(self) -> None:
        """Set γ to 1, β to 0, and the running statistics to mean 0 and variance 1."""
        super().reset_parameters()
        if not self.affine and self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Show what torch's layer shows, and what differs from it."""
        parts: list[str] = [super().extra_repr()]  # type: ignore[no-untyped-call]
        if self.bias is not None and self.weight is None:
            parts.append("center=True, scale=False")
        if self.fused:
            parts.append("fused=True")
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        if self.inplace:
            parts.append("inplace=True")
        if not self.skip_nonfinite:
            parts.append("skip_nonfinite=False")
        return ", ".join(parts)

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the normalized input.

        Args:
            input: of the shape that the layer's documentation states.
            residual: added before the activation; shape and dtype of the input.
            mask: bool, True where a position is valid, shape (N, *space) or one that broadcasts to the input's; see
                :func:`batchnorm.functional.batch_norm`.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            # A script knows neither our errors nor our operator; what it can hold is torch's own layer.
            if residual is not None or mask is not None or self.activation is not None:
                raise RuntimeError("a scripted batch norm takes no residual, mask or activation; use torch.export")
            return self._scripted(input)
        else:  # noqa: RET505  only a branch of its own is left out of a script
            return (
                self._deferred(input) if residual is None and mask is None else self._normalize(input, residual, mask)
            )

    def _scripted(self, input: Tensor) -> Tensor:
        """Normalize in a script, which takes only finite steps too."""
        factor = 0.0
        if self.momentum is not None:
            factor = self.momentum
        keep = not self.training or self.track_running_stats
        mean = self.running_mean if keep else None
        var = self.running_var if keep else None
        batches = self.num_batches_tracked
        if not self.training or mean is None or var is None:
            if self.training and self.track_running_stats and batches is not None:
                batches.add_(1)
            batch = self.training or (mean is None and var is None)
            return F.batch_norm(input, mean, var, self.weight, self.bias, batch, factor, self.eps)
        if self.momentum is None and batches is not None:
            factor = 1.0 / (float(batches) + 1.0)
        new_mean, new_var = mean.clone(), var.clone()
        y = F.batch_norm(input, new_mean, new_var, self.weight, self.bias, True, factor, self.eps)
        finite = torch.isfinite(new_mean) & torch.isfinite(new_var)
        mean.copy_(torch.where(finite, new_mean, mean))
        var.copy_(torch.where(finite, new_var, var))
        if batches is not None:
            batches.add_(finite.all().to(batches.dtype))
        return y

    def _deferred(self, input: Tensor) -> Tensor:
        """Normalize; of a layer that is fused, return a tensor that waits for what follows."""
        if self.fused:
            pending = defer(self, input)
            if pending is not None:
                return pending
        return self._normalize(input, None, None)

    def _normalize(
        self, input: Tensor, residual: Tensor | None, mask: Tensor | None, update: bool | None = None
    ) -> Tensor:
        """Normalize. ``update``: whether the batch may enter the running statistics; None: if it has not before."""
        if isinstance(input, torch.fx.Proxy):
            return self._record(input, residual, mask)
        self._check_input_dim(input)
        training = self.training
        keep = not training or self.track_running_stats
        mean = self.running_mean if keep else None
        var = self.running_var if keep else None
        batches = self.num_batches_tracked if training and self.track_running_stats else None
        if self.momentum is not None:
            factor = self.momentum
        else:
            factor = 0.0 if batches is None else 1.0 / (float(batches) + 1.0)
        counters = NO_COUNTERS
        if training and (update is False or (update is None and recomputing())):
            # Copies take the step, so that the same operators run and keep the same for the backward pass: a
            # checkpoint counts on it.
            mean, var = (None if t is None else t.clone() for t in (mean, var))
        elif batches is not None:
            counters = Counters(batches, self._refusals(batches), self.skip_nonfinite)
        return normalize(
            self._where,
            input,
            mean,
            var,
            self.weight,
            self.bias,
            training or (mean is None and var is None),
            factor,
            self.__dict__["eps"],  # past the property, which looks for converters
            self.activation,
            residual,
            mask,
            self.inplace,
            counters,
        )

    def _refusals(self, batches: Tensor) -> Tensor | None:
        """Return the counter of refused batches, beside that of the others.

        It is no buffer, for torch's layers have none of the kind. Layers of older pickles get theirs here, as do
        replicas on another device. A compiler is given what there is, and fake tensors are not counted in a real one.
        """
        counter = self._refused
        if torch.compiler.is_compiling():
            return None if torch.compiler.is_exporting() else counter
        if type(batches) is not Tensor:
            return None
        if counter is None or (counter.is_meta and not batches.is_meta):
            counter = self.__dict__["_refused"] = torch.zeros((), dtype=torch.int64, device=batches.device)
        elif counter.device != batches.device:
            counter = self.__dict__["_refused"] = counter.to(batches.device)
        return counter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the layer; running statistics stay in float32 where parameters become narrower.

        They are sums over many batches, with steps that half precision would round away.
        """
        before = {name: self._buffers.get(name) for name in _STATISTICS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers.get(name)
            if new is not None and new.dtype in HALF:
                exact = new if old is None or old.is_meta else old.detach().to(new.device)
                self._buffers[name] = exact.to(torch.float32)
        if self._refused is not None and self.num_batches_tracked is not None:
            counter = self._refusals(self.num_batches_tracked)
            if counter is not None and self.num_batches_tracked.is_shared() and not counter.is_shared():
                counter.share_memory_()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load; statistics that ``assign=True`` has put in as they lie in the file are kept in float32 all the same."""
        super()._load_from_state_dict(*args, **kwargs)
        for name in _STATISTICS:
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.dtype in HALF:
                self._buffers[name] = buffer.float()

    def _record(self, input: Any, residual: Any, mask: Any) -> Any:
        """Stay one node in a graph that torch.fx traces, as torch's own layers do."""
        asked_for_class(self, sys._getframe(1))
        extras = {"residual": residual, "mask": mask}
        given = {name: value for name, value in extras.items() if value is not None}
        return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), given)

    def _check_input_dim(self, input: Tensor) -> None:
        if not isinstance(input, Tensor):
            raise ArgumentTypeError(f"{self._where()}: input must be a tensor; got {type(input).__name__}.")
        if input.dim() not in self._dims:
            wanted = " or ".join(f"{d}D" for d in self._dims)
            raise ShapeError(
                f"{self._where()}: expected {wanted} input of shape {self._shapes}; got {input.dim()}D input of shape "
                f"{tuple(input.shape)}. BatchNorm1d takes 2D and 3D, BatchNorm2d 4D, BatchNorm3d 5D."
            )

    def _where(self) -> str:
        """Return what an error message opens with: the layer's name in its model, else its class and size."""
        return self.layer_name or f"{type(self).__name__}({self.num_features})"


class BatchNorm1d(_Layer, torch.nn.BatchNorm1d):
    r"""Batch normalization of (N, C) or (N, C, L).

    .. math::

        y = \gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    per channel. In training μ and σ² are those of the batch, over N or N·L values, σ² with divisor n (biased), and the
    running statistics move towards them by ``momentum``, the variance with divisor n − 1 (unbiased). In evaluation they
    are the running statistics.

    It is a ``torch.nn.BatchNorm1d``: same constructor, same state-dict keys, same numbers. It adds:

    Args:
        num_features: C.
        eps: added to the variance; same unit.
        momentum: weight of a new batch in the running statistics; None averages all batches alike.
        affine: whether there are γ and β at all.
        track_running_stats: whether running statistics are kept; without them evaluation uses the batch's.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: torch's name for ``center``; both must be True for a β.
        center: learn a shift β, the parameter ``bias``.
        scale: learn a scale γ, the parameter ``weight``; the attribute ``affine`` says whether there is one.
        activation: applied last, see :func:`batchnorm.functional.batch_norm`.
        inplace: the input may be overwritten, see there too.
        skip_nonfinite: keep batches with NaN or infinity out of the running statistics, see
            :func:`batchnorm.nonfinite_batches`. False calls torch's own kernel on accelerators just as torch's layer
            does, which saves ten small operators a step; on the CPU they are kept out all the same.

    Raises:
        ShapeError: the input has another number of dimensions, or a single value per channel in training (a
            ``ValueError``).
        InputError: another number of channels, dtype or device (a ``RuntimeError``).

    Example:
        >>> import torch
        >>> from batchnorm.nn import BatchNorm1d
        >>> norm = BatchNorm1d(2, scale=False, activation="relu")
        >>> list(norm.state_dict())
        ['bias', 'running_mean', 'running_var', 'num_batches_tracked']
        >>> norm(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).detach().round(decimals=3)
        tensor([[0., 0.],
                [1., 0.]])

    Source: Ioffe & Szegedy 2015, algorithm 1 and section 3.1.
    """

    _dims = (2, 3)
    _shapes = "(N, C) or (N, C, L)"


class BatchNorm2d(_Layer, torch.nn.BatchNorm2d):
    r"""Batch normalization of (N, C, H, W), over N·H·W values per channel.

    Formula, arguments and errors are those of :class:`BatchNorm1d`; it is a ``torch.nn.BatchNorm2d``.

    Example:
        >>> import torch
        >>> from batchnorm.nn import BatchNorm2d
        >>> norm = BatchNorm2d(3, activation="relu")
        >>> x = torch.randn(4, 3, 8, 8)
        >>> norm(x, residual=x).shape
        torch.Size([4, 3, 8, 8])
        >>> isinstance(norm, torch.nn.BatchNorm2d)
        True

    Source: Ioffe & Szegedy 2015, section 3.2.
    """

    _dims = (4,)
    _shapes = "(N, C, H, W)"


class BatchNorm3d(_Layer, torch.nn.BatchNorm3d):
    r"""Batch normalization of (N, C, D, H, W), over N·D·H·W values per channel.

    Formula, arguments and errors are those of :class:`BatchNorm1d`; it is a ``torch.nn.BatchNorm3d``.

    Example:
        >>> import torch
        >>> from batchnorm.nn import BatchNorm3d
        >>> BatchNorm3d(2)(torch.randn(2, 2, 3, 3, 3)).shape
        torch.Size([2, 2, 3, 3, 3])

    Source: Ioffe & Szegedy 2015, section 3.2.
    """

    _dims = (5,)
    _shapes = "(N, C, D, H, W)"
