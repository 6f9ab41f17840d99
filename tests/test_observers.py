"""Who observes a thread is asked in one file, and each answer is right; recomputed forwards update nothing."""

from __future__ import annotations

import ast
import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import batchnorm
from batchnorm import observers
from batchnorm.functional import use_backend
from batchnorm.nn import BatchNorm1d, BatchNorm2d
from batchnorm.observers import OperatorMode, recomputing

BACKENDS = ["torch", "native", "reference"]

NO_QUESTIONS = {
    # classes and functions that have no other home
    "torch.nn.modules.batchnorm._BatchNorm": "the class of all norms",
    "torch.nn.modules.batchnorm._NormBase": "the class of all norms",
    "torch.nn.modules.conv._ConvNd": "the class of all convolutions",
    "torch._ops": "classes of operators",
    "torch.ops.aten.": "operators",
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": "whether a class of tensors wraps others",
    "torch.utils._pytree.": "nested containers",
    "torch.export.pt2_archive._package.load_pt2": "a reader of files",
    "torch._C.PyTorchFileReader": "a reader of files",
    "torch._C._dispatch_get_all_op_names": "names of operators",
    "torch._C._nn": "a namespace of functions",
    # memory
    "torch.UntypedStorage._new_with_weak_ptr": "memory that may be gone",
    "torch._C._storage_Use_Count": "how many hold a gradient's memory",
    "torch._debug_has_internal_overlap": "whether elements share memory",
    # what is done, not asked
    "torch.Tensor._make_wrapper_subclass": "makes a tensor without memory",
    "torch._C.DisableTorchFunctionSubclass": "calls past a tensor's own function protocol",
    "torch._C._AutoDispatchBelowAutograd": "runs operators below autograd",
    "torch.nn.modules.module._global_forward_hooks_with_kwargs": "is tidied after a hook",
}
"""What of torch's private names other files may use, for it does not say who observes; with what it is."""


def private_names(source: str) -> Iterator[str]:
    """Return the names within torch that a file uses and of which a part is private."""
    tree = ast.parse(source)
    homes = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            homes |= {a.asname: a.name for a in node.names if a.asname and a.name.split(".")[0] == "torch"}
            yield from (a.name for a in node.names if is_private(a.name) and not a.asname)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            homes |= names
            yield from filter(is_private, names.values())
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in homes:
            name = ".".join([homes[node.id], *reversed(parts)])
            if is_private(name):
                yield name


def is_private(name: str) -> bool:
    of_torch = name.split(".")[0] == "torch"
    return of_torch and any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def asks(name: str) -> bool:
    """Return whether a private name may say who observes."""
    pure_prefix = any(f"{allowed}.".startswith(f"{name}.") for allowed in NO_QUESTIONS)
    return not pure_prefix and not any(name == a or name.startswith(f"{a.rstrip('.')}.") for a in NO_QUESTIONS)


def test_one_file_asks_torchs_private_state():
    package = Path(batchnorm.__file__).parent
    files = {path: set(filter(asks, private_names(path.read_text()))) for path in package.rglob("*.py")}
    asking = {str(path.relative_to(package)): names for path, names in files.items() if names}
    assert list(asking) == ["observers.py"], asking


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nif torch._C._len_torch_dispatch_stack(): pass",
        "from torch import _C\n_C._is_tracing()",
        "from torch._C import _get_tracing_state as tracing",
        "import torch._dynamo.eval_frame",
        "import torch._functorch as f\nf.config",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "from torch.utils._python_dispatch import _pop_mode",
        "import torch\ntorch.nn.modules.module._global_forward_hooks",
    ],
)
def test_every_way_to_ask_is_found(source):
    assert any(map(asks, private_names(source)))


def test_every_exception_is_in_use():
    used = {n for path in Path(batchnorm.__file__).parent.rglob("*.py") for n in private_names(path.read_text())}
    assert all(any(f"{name}.".startswith(allowed) for name in used) for allowed in NO_QUESTIONS)


WITHOUT_A_COMPILER = """
import sys, torch, batchnorm
from torch import nn
torch.manual_seed(0)
model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(5, 3, 8, 8)
model(x)
model.eval()
batchnorm.fold(model, x)
batchnorm.check(model, x)
batchnorm.diagnose(model, [x])
batchnorm.recalibrate(model, [x])
with batchnorm.watch(model) as watching:
    model(x)
print(*{"torch._dynamo", "sympy"} & set(sys.modules))
"""


def test_no_verb_loads_the_compiler_where_nothing_is_compiled():
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_COMPILER], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_compiler_that_is_loaded_treats_a_mode_as_it_treats_one_of_torch():
    met = []
    for base in (TorchDispatchMode, OperatorMode):

        class Adding(base):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {})) + 1

        torch._dynamo.reset()
        graphs = []
        negated = torch.compile(lambda x: -x, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)  # noqa: B023
        with Adding():
            values = negated(torch.ones(3)).tolist()
        met.append((values, len(graphs), negated(torch.ones(3)).tolist(), len(graphs)))
    assert met[0] == met[1]


class Quiet(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def nobody(ask):
    return ask()


def a_dispatch_mode(ask):
    with Quiet():
        return ask()


def a_function_mode(ask):
    with TorchFunctionMode():
        return ask()


def a_transform(ask):
    answers = []
    torch.func.vmap(lambda x: answers.append(ask()) or x)(torch.ones(2))
    return answers[0]


def forward_mode(ask):
    with torch.autograd.forward_ad.dual_level():
        return ask()


def a_tracer(ask):
    answers = []
    torch.jit.trace(lambda x: answers.append(ask()) or x + 1, torch.ones(2), check_trace=False)
    return answers[0]


def a_custom_function(ask):
    answers = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            answers.append(ask())
            return x.clone()

    Function.apply(torch.ones(2, requires_grad=True))
    return answers[0]


def inference_mode(ask):
    with torch.inference_mode():
        return ask()


def our_observer(ask):
    def look(*call):
        pass

    observers.attach(look)
    try:
        return ask()
    finally:
        observers.detach(look)


FOLLOWING = [a_dispatch_mode, a_transform, forward_mode, a_tracer]


@pytest.mark.parametrize(
    ("question", "who"),
    [
        (observers.followed, FOLLOWING),
        (observers.observed, [*FOLLOWING, our_observer]),
        (observers.intercepted, [*FOLLOWING, a_function_mode, a_custom_function, inference_mode]),
        (observers.transformed, [a_transform]),
        (observers.recorded, [a_tracer]),
        (observers.has_dispatch_modes, [a_dispatch_mode]),
        (observers.by_forward_mode, [forward_mode]),
        (observers.unreachable_by_gradients, [a_custom_function]),
    ],
)
def test_each_question_is_answered_for_whom_it_names(question, who):
    everybody = [nobody, *FOLLOWING, a_function_mode, a_custom_function, inference_mode, our_observer]
    assert [observer for observer in everybody if observer(question)] == [o for o in everybody if o in who]


def test_a_compiler_follows_and_records_nothing():
    def ask(x):
        return x + observers.followed() + 10 * observers.recorded() + 100 * observers.intercepted()

    assert torch.compile(ask, backend="eager", fullgraph=True)(torch.zeros(1)) == 101


def test_an_exporter_records():
    class Asks(torch.nn.Module):
        def forward(self, x):
            return x * 2 if observers.recorded() else x

    assert torch.export.export(Asks(), (torch.ones(1),)).module()(torch.ones(1)) == 2
    assert Asks()(torch.ones(1)) == 1


@pytest.mark.parametrize("kind", ["forward_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_on_the_output_are_found_on_the_module_and_on_all(kind):
    module = torch.nn.Identity()
    everywhere = getattr(torch.nn.modules.module, f"register_module_{kind}")
    for register in (getattr(module, f"register_{kind}"), everywhere):
        handle = register(lambda *_: None)
        assert observers.output_hooked(module)
        handle.remove()
        assert not observers.output_hooked(module)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def block(fused: bool = False, momentum: float | None = 0.1) -> torch.nn.Sequential:
    torch.manual_seed(0)
    norms = [BatchNorm2d(4, momentum=momentum) for _ in range(2)]
    for norm in norms:
        norm.fused = fused
    conv = torch.nn.Conv2d(4, 4, 3, padding=1)
    return torch.nn.Sequential(norms[0], torch.nn.ReLU(), conv, norms[1], torch.nn.ReLU(inplace=True))


def run(model, x, wrapped):
    x = x.clone().requires_grad_()
    y = wrapped(model, x)
    y.square().sum().backward()
    refused = [int(m._refused) for m in model if isinstance(m, BatchNorm2d)]
    return [y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()], refused


def kinds():
    def plain(f, x):
        return checkpoint(f, x, use_reentrant=False)

    def reentrant(f, x):
        return checkpoint(f, x, use_reentrant=True)

    return {
        "plain": plain,
        "reentrant": reentrant,
        "plain in plain": lambda f, x: plain(lambda h: plain(f, h), x),
        "reentrant in reentrant": lambda f, x: reentrant(lambda h: reentrant(f, h), x),
        "plain in reentrant": lambda f, x: reentrant(lambda h: plain(f, h), x),
        "reentrant in plain": lambda f, x: plain(lambda h: reentrant(f, h), x),
        "sequential": lambda f, x: checkpoint_sequential(f, 2, x, use_reentrant=False),
        "sequential, reentrant": lambda f, x: checkpoint_sequential(f, 2, x, use_reentrant=True),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", list(kinds()))
def test_a_checkpoint_updates_once_and_is_the_same_to_the_last_bit(kind, momentum, backend):
    x = torch.randn(8, 4, 5, 5)
    with use_backend(backend):
        expected, _ = run(block(momentum=momentum), x, lambda f, h: f(h))
        got, _ = run(block(momentum=momentum), x, kinds()[kind])
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("kind", list(kinds()))
def test_fused_layers_too(kind):
    """Large enough for the kernels, so that outputs do wait."""
    x = torch.randn(16, 4, 32, 32)
    expected, _ = run(block(fused=True), x, lambda f, h: f(h))
    got, _ = run(block(fused=True), x, kinds()[kind])
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_batch_that_is_not_finite_is_counted_once(reentrant):
    x = torch.randn(8, 4, 5, 5)
    x[0, 2, 0, 0] = float("inf")
    _, refused = run(block(), x, lambda f, h: checkpoint(f, h, use_reentrant=reentrant))
    assert refused == [1, 1]  # the convolution spreads it over all channels


def test_torchs_layers_do_update_twice():
    """What is compared with; should torch mend it, this tells."""
    norm = torch.nn.BatchNorm1d(2)
    checkpoint(norm, torch.randn(4, 2, requires_grad=True), use_reentrant=False).sum().backward()
    assert norm.num_batches_tracked == 2


def test_an_output_that_waits_until_the_backward_pass_is_taken_in_all_the_same():
    norm, plain = BatchNorm2d(4), BatchNorm2d(4)
    norm.fused = True
    x = torch.randn(16, 4, 32, 32)
    waiting = norm(x)
    y = torch.ones(1, requires_grad=True) * 2
    y.register_hook(lambda grad: grad + 0 * waiting.sum())
    y.backward()
    plain(x)
    assert norm.num_batches_tracked == 1
    assert torch.equal(norm.running_mean, plain.running_mean)


def test_it_is_told_in_the_backward_pass_alone():
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda grad: seen.append(recomputing()))
    seen.append(recomputing())
    (x * 2).backward()
    seen.append(recomputing())
    assert seen == [False, True, False]


def test_two_training_forwards_and_checkpoints_before_one_backward():
    norm = BatchNorm1d(3)
    twin = copy.deepcopy(norm)
    x, z = (torch.randn(6, 3, requires_grad=True) for _ in range(2))
    results = []
    for layer, wrap in ((norm, lambda f, h: checkpoint(f, h, use_reentrant=False)), (twin, lambda f, h: f(h))):
        a, b = wrap(layer, x), wrap(layer, z)
        layer.running_mean.copy_(layer.running_mean.clone())  # a broadcast of buffers
        results.append([*torch.autograd.grad((a * b).sin().sum(), (x, z, layer.weight)), *layer.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_compiled_checkpoint_updates_once():
    """Through AOTAutograd, which runs no module again; torch's own eager backend fails on any buffer written inside."""
    x, expected, got = torch.randn(8, 4, 5, 5), block(), block()
    step = torch.compile(lambda x: checkpoint(got, x, use_reentrant=False), backend="aot_eager")
    for model, call in ((expected, expected), (got, step)):
        call(x.clone().requires_grad_()).sum().backward()
        assert model[0].num_batches_tracked == 1
    torch.testing.assert_close(list(got.buffers()), list(expected.buffers()))
