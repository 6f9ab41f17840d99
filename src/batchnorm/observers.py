"""Who observes what this thread computes: the one place that asks torch's private state.

Modes, tracers, compilers, transforms and custom autograd functions each need something else of a call than its numbers:
that it is torch's own operator, that it runs on the very tensors they handed out, that it can be differentiated in
forward mode. torch says who is there in private functions, which each have a name and a meaning here. Asked for each
layer's call, they are torch's C functions themselves where one of them is the answer: one more Python call would cost
as much as the rest of the question.

Whoever observes by this library's own means is here as well: above autograd the operator ``batchnorm::batch_norm`` is
taken apart before a dispatch mode could meet it, so it reports its calls to the observers of its thread.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack, _pop_mode
from torch.utils import _python_dispatch as dispatch

__all__ = [
    "Observer",
    "OperatorMode",
    "attach",
    "by_forward_mode",
    "compiler_stance",
    "detach",
    "detect_fake_mode",
    "dispatch_modes",
    "eager_stance",
    "followed",
    "function_modes",
    "global_forward_pre_hooks",
    "has_dispatch_modes",
    "in_backward",
    "intercepted",
    "is_transformed",
    "notify",
    "observed",
    "output_hooked",
    "pop_dispatch_mode",
    "pop_function_mode",
    "push_dispatch_mode",
    "recomputing",
    "recorded",
    "set_compiler_stance",
    "set_grad_enabled",
    "transformed",
    "unreachable_by_gradients",
]

# -- torch -------------------------------------------------------------------------------------------------------------

transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether a transform of ``torch.func``, such as ``vmap`` or ``grad``, is at work in this thread.

Not to be asked while a compiler captures the call: it can read no further.
"""

is_transformed: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
"""Whether a tensor stands for others: for a whole batch under ``vmap``, for a value with its derivative."""

set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
"""Set this thread's gradient mode, past the function modes that see ``torch.set_grad_enabled``."""

dispatch_modes: Callable[[], list[Any]] = dispatch._get_current_dispatch_mode_stack
"""Return the dispatch modes that are on in this thread, the innermost last."""

push_dispatch_mode: Callable[[Any], None] = dispatch._push_mode
"""Put a dispatch mode on without entering it, which would note in flags of the whole process that one is on."""

pop_dispatch_mode: Callable[[], Any] = dispatch._pop_mode
"""Take the innermost dispatch mode off, however it was put on, and return it."""

function_modes: Callable[[], list[Any]] = _get_current_function_mode_stack
"""Return the function modes that are on in this thread, the innermost last."""

pop_function_mode: Callable[[], Any] = _pop_mode
"""Take the innermost function mode off, and return it."""


def recorded() -> bool:
    """Whether the call becomes part of a program, which is to hold torch's operator and nothing else."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def followed() -> bool:
    """Whether torch itself follows the operators of this thread: a compiler, a tracer, a transform or a mode."""
    return bool(
        torch.compiler.is_compiling()  # asked first: a compiler can read no further
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd.forward_ad._current_level >= 0
    )


def observed() -> bool:
    """Whether anybody looks at the operators of this thread: torch, or an observer that is attached here."""
    return followed() or bool(_observers.all)


def intercepted() -> bool:
    """Whether anybody but torch's own operators may meet a tensor between two calls of this thread.

    Who follows operators does, a function mode does, and a custom autograd function or inference mode keeps tensors
    apart from the gradients outside.
    """
    return followed() or torch._C._len_torch_function_stack() > 0 or not torch._C._is_fwd_grad_enabled()


def has_dispatch_modes() -> bool:
    """Whether a dispatch mode that is no compiler's looks at the operators, and knows torch's."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def by_forward_mode() -> bool:
    """Whether derivatives are taken in forward mode."""
    return torch.autograd.forward_ad._current_level >= 0


def unreachable_by_gradients() -> bool:
    """Whether this runs inside a custom autograd function, so that no gradient of what it computes is recorded."""
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


def in_backward() -> bool:
    """Whether this thread is inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


def recomputing() -> bool:
    """Whether a forward pass of this thread is one that activation checkpointing runs again.

    Inside a backward pass forwards run only to compute something again. Both kinds of ``torch.utils.checkpoint`` do so:
    the reentrant one in the backward of its autograd function, the other when autograd asks for a tensor that it has
    not kept. The batch is in the running statistics already.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def output_hooked(module: torch.nn.Module) -> bool:
    """Whether hooks look at a module's output: its own, or those of all modules."""
    return bool(
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def global_forward_pre_hooks() -> int:
    """Return how many hooks may change what any module is given."""
    return len(torch_module._global_forward_pre_hooks)


def compiler_stance() -> Any:
    """Return how compiled functions of this process run now; None where nothing has been compiled.

    torch's compiler takes a second to import, so that it is not asked where nobody has imported it.
    """
    if "torch._dynamo" not in sys.modules:
        return None
    from torch._dynamo import eval_frame

    return eval_frame._stance


def set_compiler_stance(stance: Any) -> None:
    """Let compiled functions of this process run so from now on.

    Args:
        stance: what :func:`compiler_stance` or :func:`eager_stance` returned.

    Raises:
        RuntimeError: this runs in code that is being compiled, or was.
    """
    from torch._dynamo import eval_frame

    eval_frame._set_stance(stance)


def eager_stance() -> Any:
    """Return the stance in which compiled functions run eagerly."""
    from torch._dynamo import eval_frame

    return eval_frame.DynamoStance("force_eager")


class OperatorMode(dispatch.TorchDispatchMode):
    """A dispatch mode of this library: torch's, which keeps the compiler from compiling the mode's own code.

    torch's base class loads the compiler for that when the first operator is met: two seconds, also in a program that
    compiles nothing. This one sees whether it is loaded; a mode that asks for no guard has none.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        own = cls.__dict__.get("__torch_dispatch__")
        super().__init_subclass__(**options)  # type: ignore[no-untyped-call]
        if own is None or not cls._should_skip_dynamo():
            return
        never_compiled = cls.__torch_dispatch__

        def torch_dispatch(*call: Any) -> Any:
            return (never_compiled if "torch._dynamo" in sys.modules else own)(*call)

        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
        frames.set_code_exec_strategy(torch_dispatch.__code__, skip)
        cls.__torch_dispatch__ = torch_dispatch  # type: ignore[method-assign]


# -- this library ------------------------------------------------------------------------------------------------------

Observer: TypeAlias = Callable[[Tensor, Tensor | None, Tensor | None, float, Tensor | None], None]
"""Called with input, running_mean, running_var, eps and mask before the call is served; it must not change them."""


class _Observers(threading.local):
    def __init__(self) -> None:
        self.all: tuple[Observer, ...] = ()


_observers = _Observers()


def attach(observer: Observer) -> None:
    """Call ``observer`` before each call of the operator in this thread, until it is detached in this thread."""
    _observers.all = (*_observers.all, observer)


def detach(observer: Observer) -> None:
    """Call it no more in this thread; nothing happens if it is not attached."""
    _observers.all = tuple(o for o in _observers.all if o != observer)


def notify(x: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float, mask: Tensor | None) -> None:
    """Tell the observers of this thread about a call."""
    for observer in _observers.all:
        observer(x, mean, variance, eps, mask)
