"""The dataflow of a model, read by running it once.

Symbolic tracing stops at Python control flow and needs a model that it understands; running needs a model that runs.
The forward pass is executed below autograd under a dispatch mode. There, operators arrive whole (``conv2d``,
``batch_norm``, ``linear``, not what they decompose into), with the very parameters of the model as arguments, and none
can be missed: functional norms, norm subclasses with a forward of their own and scripted modules call the same ones.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.dataflow.conditionals import COND, run_both
from batchnorm.dataflow.example_error import example_error
from batchnorm.dataflow.graph import Call, Graph, ModuleCall, Value
from batchnorm.errors import BatchNormError
from batchnorm.functional.validation import HALF
from batchnorm.models.calling import below_autograd, call_on_example, fresh_inputs
from batchnorm.models.module_hooks import module_hooks
from batchnorm.models.several import draw_for, labelled
from batchnorm.models.snapshot import untouched
from batchnorm.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.operators import named_arguments
from batchnorm.observers import OperatorMode

__all__ = ["CallObserver", "trace"]

CallObserver: TypeAlias = Callable[[Call, Sequence[Any], dict[str, Any], Any], None]
"""Called after each operator with its record and with its real positional and keyword arguments and result."""


def trace(
    model: Module,
    example_inputs: Any,
    *,
    observer: CallObserver | None = None,
    returned: Callable[[Any], None] | None = None,
) -> Graph:
    """Run ``model`` once, in the modes it is in, and return the dataflow.

    The model is left as it was: buffers that the pass updates and the random generators are restored. It runs on a copy
    of the inputs, which it may write into.

    Args:
        model: any model that runs.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. Or several of these
            (:class:`batchnorm.models.several.Several`): the dataflow is that of the runs one after the other, which
            share the model's state and nothing else; each begins with the model as it is.
        observer: looks at the tensors that pass by; it must not keep or change them.
        returned: is called with what the model returned, after each run, before buffers are restored; likewise.

    Raises:
        InputError: the model fails on the inputs.
    """
    tracer = _Tracer(model, observer)
    for number, (inputs, label) in enumerate(labelled(example_inputs)):
        with untouched(model):
            draw_for(number)
            outputs = tracer.follow(model, fresh_inputs(inputs), label)
            if returned is not None:
                returned(outputs)
            del outputs  # what is held when the next run is over was kept by the model
    return Graph(tracer.calls, tracer.module_calls, tuple(tracer.inputs), tuple(tracer.outputs))


class _Tracer(OperatorMode):
    """Records every operator call, and which module's forward it happened in."""

    supports_higher_order_operators = True

    def __init__(self, model: Module, observer: CallObserver | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.module_calls: list[ModuleCall] = []
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self._run = -1
        self._observer = observer
        self._thread = threading.get_ident()  # module hooks are global: other threads run them too
        self._running: list[ModuleCall] = []
        self._names = {id(m): name for name, m in model.named_modules()}
        # Weak keys: a value whose tensor outlives the pass is held by something. The model's own tensors live on, and
        # are many: they are known by their ids.
        self._values = WeakTensorKeyDictionary()
        self._state_values: dict[int, Value] = {}
        state: dict[int, tuple[Tensor, list[str]]] = {}
        for get in (model.named_parameters, model.named_buffers):
            for name, tensor in get(remove_duplicate=False):
                state.setdefault(id(tensor), (tensor, []))[1].append(name)
        self._state = [
            (tensor, Value(_shape(tensor), tensor.dtype, "state", names=tuple(names)))
            for tensor, names in state.values()
        ]

    def follow(self, model: Module, inputs: Any, label: str) -> Any:
        """Run the model, record what it does behind what it did in the runs before, and return what it returned."""
        self._run += 1
        self._running.clear()
        for tensor, value in self._state:  # which the run before may have written into
            self._state_values[id(tensor)] = value
        self.inputs += [self.value_of(leaf, "input") for leaf in _tensors_in(inputs)]
        try:
            with (
                _young_cycles() as collect,
                below_autograd(),
                module_hooks(self._enter, self._leave, kwargs=True),
                self,
            ):
                outputs = call_on_example(model, inputs)
        except BatchNormError:
            raise
        except Exception as error:
            raise example_error(model, error, label) from error
        returned = tuple(self.value_of(leaf) for leaf in _tensors_in(outputs))
        self.outputs += returned
        self.mark_kept(returned, collect)
        return outputs

    # -- operators ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            result, branches = run_both(self, func, args, kwargs)
            call = self._new_call(COND, {"branches": [self.value_of(leaf) for leaf in _tensors_in(branches)]})
            self._note(call, args, kwargs, result)
            return result
        given = named_arguments(func, args, kwargs)
        read = {name: self._as_read(value) for name, value in given.items()}
        result = func(*args, **kwargs)
        if func.namespace in ("prim", "profiler"):  # a question about a tensor, or a time mark: no computation
            return result
        if self._widens_own_parameter(func, given, result):
            self._set_value(result, self.value_of(given["self"]))
            return result
        call = self._new_call(func, read)
        for tensor in _written(func._schema, given):
            self._renew(tensor, call)
        self._note(call, args, kwargs, result)
        return result

    def _widens_own_parameter(self, func: Any, given: dict[str, Any], result: Any) -> bool:
        """Whether a layer of this library takes γ or β of half precision to the float32 of its statistics.

        That is no operator of the model's: it normalizes by the parameter, and in float64 there is no such cast.
        """
        if func not in _CASTS or not self._running or not isinstance(self._running[-1].module, _LAYERS):
            return False
        parameter = given.get("self")
        own = any(parameter is p for p in self._running[-1].module._parameters.values())
        return own and parameter is not None and parameter.dtype in HALF and result.dtype == torch.float32

    def _new_call(self, func: Any, read: dict[str, Any]) -> Call:
        module = self._running[-1].name if self._running else ""
        return Call(len(self.calls), func, read, (), module, self._run)

    def _note(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        call.outputs = tuple(self._new_value(leaf, call) for leaf in _tensors_in(result))
        self.calls.append(call)
        for running in self._running:
            running.calls.append(call)
        if self._observer is not None:
            self._observer(call, args, kwargs, result)

    def value_of(self, tensor: Tensor, kind: Any = "constant") -> Value:
        """Return the value that ``tensor`` holds now; one never seen before is new, of the given kind."""
        value = self._known(tensor)
        if value is None:
            value = Value(_shape(tensor), tensor.dtype, kind)
            self._set_value(tensor, value)
        return value

    def _known(self, tensor: Tensor) -> Value | None:
        value = self._state_values.get(id(tensor)) or self._values.get(tensor)
        assert value is None or isinstance(value, Value)
        return value

    def _set_value(self, tensor: Tensor, value: Value) -> None:
        if id(tensor) in self._state_values:
            self._state_values[id(tensor)] = value
        else:
            self._values[tensor] = value

    def _as_read(self, argument: Any) -> Any:
        """Return an argument with its tensors as the values that they hold."""
        if isinstance(argument, Tensor):
            return self.value_of(argument)
        return argument if _holds_no_tensor(argument) else tree_map(self._as_value, argument)

    def _as_value(self, leaf: Any) -> Any:
        return self.value_of(leaf) if isinstance(leaf, Tensor) else leaf

    def _new_value(self, tensor: Tensor, call: Call) -> Value:
        known = self._known(tensor)
        if known is not None and known.producer is call:  # renewed by this in-place call already
            return known
        value = Value(_shape(tensor), tensor.dtype, "computed", call)
        self._set_value(tensor, value)
        return value

    def _renew(self, written: Tensor, call: Call) -> None:
        """Give a new value to a tensor that ``call`` wrote into, and to all that share its memory."""
        memory = written.untyped_storage()._cdata
        for tensor in [*(tensor for tensor, _ in self._state), *self._values.keys()]:
            if tensor is not None and _storage(tensor) == memory:
                names = self.value_of(tensor).names
                self._set_value(tensor, Value(_shape(tensor), tensor.dtype, "computed", call, names=names))

    # -- modules -----------------------------------------------------------------------------------------------------

    def _enter(self, module: Module, args: Any) -> None:
        if id(module) not in self._names or threading.get_ident() != self._thread:
            return
        name = self._names[id(module)]
        inputs = tuple(self.value_of(leaf) for leaf in _tensors_in(args))
        if module._forward_pre_hooks:
            _hold(inputs, name)
        run = ModuleCall(name, module, inputs, run=self._run)
        self._running.append(run)
        self.module_calls.append(run)

    def _leave(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if id(module) not in self._names or threading.get_ident() != self._thread:
            return
        run = self._running.pop()
        while run.module is not module:  # a forward that raised, and whose error the model caught, was never left
            run = self._running.pop()
        # Keywords are shown on leaving only: what has been written into since is no longer what went in.
        by_keyword = (self.value_of(leaf) for leaf in _tensors_in(kwargs))
        run.inputs += tuple(value for value in by_keyword if value.producer not in run.calls)
        run.outputs = tuple(self.value_of(leaf) for leaf in _tensors_in(output))
        given = [*args, *kwargs.values()]
        by_name = set(kwargs) <= {"input"}
        run.plain = by_name and len(given) == 1 and isinstance(given[0], Tensor) and isinstance(output, Tensor)
        if module._forward_hooks:
            _hold((*run.inputs, *run.outputs), run.name)

    # -- afterwards --------------------------------------------------------------------------------------------------

    def mark_kept(self, returned: tuple[Value, ...], collect: Callable[[], object]) -> None:
        """Mark the values whose tensors are still alive though the model did not return them.

        Args:
            returned: what the model returned.
            collect: frees the reference cycles that its forward has left, which are no readers.
        """

        def kept() -> list[Value]:
            known = (*self._values.values(), *self._state_values.values())
            live = [v for v in known if v.kind == "computed" and not v.names]
            return [v for v in live if not any(v is r for r in returned)]

        if kept():
            collect()
        holder = "something that keeps it after the forward (the model stores it)"
        for value in kept():
            if holder not in value.held_by:
                value.held_by.append(holder)


@contextmanager
def _young_cycles() -> Iterator[Callable[[], object]]:
    """Keep the garbage collector from running, and yield what frees the reference cycles that were made meanwhile.

    They are all in the youngest generation then. A collection of all generations would look at every object of the
    process, a million where a compiler has been imported, and takes longer than a small model.
    """
    enabled, oldest = gc.isenabled(), 2
    gc.disable()
    try:
        yield lambda: gc.collect(oldest)
        if not gc.isenabled():  # nor has the model, or another thread, switched it on
            oldest = 0
    finally:
        if enabled:
            gc.enable()


_LAYERS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
_CASTS = {torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default}


def _tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves; what an operator or a module takes and returns is mostly one."""
    if isinstance(tree, Tensor):
        return [tree]
    if type(tree) is tuple and all(isinstance(leaf, Tensor) for leaf in tree):
        return list(tree)
    if tree is None or (type(tree) in (tuple, dict) and not tree):
        return []
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


_SCALARS = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}


def _holds_no_tensor(argument: Any) -> bool:
    """Whether that can be told at once: of a scalar, and of a list of them."""
    kind = type(argument)
    return kind in _SCALARS or (kind in (list, tuple) and all(type(item) in _SCALARS for item in argument))


def _hold(values: Sequence[Value], name: str) -> None:
    holder = f"a hook of {name or 'the model'}"
    for value in values:
        if holder not in value.held_by:
            value.held_by.append(holder)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return () if is_lazy(tensor) else tuple(tensor.shape)


def _storage(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, ValueError):  # lazy and sparse tensors have none
        return None


def _written(schema: Any, given: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that the operator writes into."""
    if not schema.is_mutable:
        return []
    names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for name in names for leaf in _tensors_in(given[name])]
