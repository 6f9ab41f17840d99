"""Whether a norm can be taken out once others have absorbed it, and its state."""

from __future__ import annotations

from dataclasses import dataclass

from torch.jit import ScriptModule
from torch.nn import Module

from batchnorm.dataflow.graph import Graph
from batchnorm.dataflow.norms import _STATE, NormUse
from batchnorm.dataflow.refusal import Refusal
from batchnorm.folding.planning.replacement import Replacement, find_replacement
from batchnorm.models.hooks import hooks_of

__all__ = ["NormState", "check_norm"]


@dataclass(frozen=True)
class NormState:
    """Qualified names of the tensors that a norm applies, None where it has none, and its ε."""

    running_mean: str
    running_var: str
    weight: str | None
    bias: str | None
    eps: float


def check_norm(graph: Graph, use: NormUse) -> tuple[NormState, Replacement]:
    """Return the state of a norm that can be taken away once others have absorbed it, and what stays of its module.

    What counts is what the module's run did, not its class: this operator, and perhaps activations after it.

    Raises:
        Refusal: the norm has to stay; says why.
    """
    _require_fixed_statistics(use)
    if use.owner is None:
        raise Refusal("Its statistics are not held by any module of the model.")
    if isinstance(use.owner, ScriptModule):
        raise Refusal("It is part of a scripted module, which cannot be edited.")
    name = next((run.name for run in graph.module_calls if run.module is use.owner), use.calls[0].module)
    stays = find_replacement(graph, use.owner, name, use.calls)
    _require_no_hooks(use.owner)
    state = _state_of(use)
    _require_no_other_readers(graph, use)
    return state, stays


def _require_fixed_statistics(use: NormUse) -> None:
    for call in use.calls:
        if str(call.op) != "aten.batch_norm.default":
            called = f"{call.op.namespace}::{call.name}"
            raise Refusal(f"It is called as {called}, which may do more (a mask, a residual, an activation).")
        if call.args["running_mean"] is None or call.args["running_var"] is None:
            raise Refusal("It keeps no running statistics, so its output depends on the batch.")
        if call.args["training"]:
            raise Refusal("It is in batch mode, so its output depends on the batch; call model.eval() first.")


def _require_no_hooks(owner: Module) -> None:
    of_state = (
        owner._state_dict_hooks,
        owner._state_dict_pre_hooks,
        owner._load_state_dict_pre_hooks,
        owner._load_state_dict_post_hooks,
    )
    for kind in (*hooks_of(owner), *(["state-dict"] if any(of_state) else [])):
        raise Refusal(f"It has a {kind} hook, which would be lost with it.")


def _state_of(use: NormUse) -> NormState:
    first = use.calls[0].args
    if any(call.args[key] is not first[key] for call in use.calls for key in _STATE) or any(
        call.args["eps"] != first["eps"] for call in use.calls
    ):
        raise Refusal("Its calls do not all apply the same statistics and parameters.")
    names: dict[str, str | None] = {}
    for key in _STATE:
        value = first[key]
        if value is not None and value.names and value.producer is not None:
            raise Refusal(f"Its {key} is written to by {value.producer.name} before it runs.")
        if value is not None and not (value.kind == "state" and value.names):
            raise Refusal(f"Its {key} is not a parameter or buffer of the model.")
        names[key] = None if value is None else value.names[0]
    mean, var = names["running_mean"], names["running_var"]
    assert mean is not None
    assert var is not None
    return NormState(mean, var, names["weight"], names["bias"], float(first["eps"]))


def _require_no_other_readers(graph: Graph, use: NormUse) -> None:
    """Refuse if an operator outside the norm reads its tensors, which vanish; modules that share them keep them."""
    for key in _STATE:
        value = use.calls[0].args[key]
        if value is None:
            continue
        owners = {name.rpartition(".")[0] for name in value.names}
        strangers = [c for c in graph.readers(value) if c not in use.calls and c.module not in owners]
        if strangers:
            call = strangers[0]
            raise Refusal(f"Its {key} is also read by {call.name} in {call.module or 'the model'}.")
        if graph.is_output(value):
            raise Refusal(f"Its {key} is also an output of the model.")
