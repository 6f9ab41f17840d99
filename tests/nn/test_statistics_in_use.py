"""Blocks that say which statistics normalize and whether they move, on every kind of norm and in every mode."""

from __future__ import annotations

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tests.interrupts import Interrupting
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.errors import ArgumentTypeError, StateError, UnknownNameError
from batchnorm.models.calling import compiled_modules_eager
from batchnorm.nn import BatchNorm1d


class WithActivation(torch.nn.BatchNorm1d):
    """As timm's: a forward of its own, a submodule, and a note that it makes on itself."""

    def __init__(self, features):
        super().__init__(features)
        self.act = torch.nn.ReLU()
        self.calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return self.act(super().forward(x))


class Ours(BatchNorm1d):
    pass


KINDS = [torch.nn.BatchNorm1d, BatchNorm1d, WithActivation, Ours, torch.nn.LazyBatchNorm1d]
X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) * 2 + 1


def norm_of(kind, training=True):
    norm = kind() if kind is torch.nn.LazyBatchNorm1d else kind(3)
    norm(torch.randn(8, 3, generator=torch.Generator().manual_seed(1)) + 1)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    return norm.train(training)


def state(norm):
    return {k: v.clone() for k, v in norm.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def outcome(norm, x=X):
    h = x.clone().requires_grad_()
    y = norm(h)
    y.sin().sum().backward()
    grads = [p.grad.clone() for p in norm.parameters()]
    norm.zero_grad()
    return [y.detach(), h.grad, *grads]


def as_is(norm, training):
    """What the norm does in a mode, on a copy, so that it stays as it is."""
    return outcome(copy.deepcopy(norm).train(training))


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_update_changes_nothing_but_the_update(kind, training):
    norm = norm_of(kind, training)
    before, expected = state(norm), as_is(norm, training)
    with batchnorm.no_update(norm):
        assert equal(outcome(norm), expected)
    assert same(before, state(norm))
    assert "forward" not in norm.__dict__
    norm(X)
    assert same(before, state(norm)) != training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("kind", KINDS)
def test_use_decides_what_normalizes_and_not_the_mode(kind, statistics, training):
    norm = norm_of(kind, training)
    before, expected = state(norm), as_is(norm, statistics == "batch")
    moved = copy.deepcopy(norm)
    with batchnorm.use(statistics, norm):
        assert equal(outcome(norm), expected)
        assert norm.training == training
    if training and statistics == "batch":
        moved(X)
        assert same(state(moved), state(norm))
    else:
        assert same(before, state(norm))


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_eval_in_the_block_have_no_say(kind):
    norm = norm_of(kind)
    expected = as_is(norm, False)
    with batchnorm.use("running", norm):
        norm.eval()
        assert equal(outcome(norm), expected)
        norm.train()
        assert equal(outcome(norm), expected)
    assert norm.training


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, BatchNorm1d])
def test_blocks_nest_and_the_innermost_decides(kind):
    norm = norm_of(kind)
    batch, running, before = as_is(norm, True), as_is(norm, False), state(norm)
    with batchnorm.no_update(norm):
        with batchnorm.use("running", norm):
            assert equal(outcome(norm), running)
            with batchnorm.use("batch", norm):
                assert equal(outcome(norm), batch)
                assert same(before, state(norm))
            assert equal(outcome(norm), running)
        assert equal(outcome(norm), batch)
    with batchnorm.use("batch", norm), batchnorm.no_update(norm):
        norm(X)
    assert same(before, state(norm))


BLOCKS = {
    "use": lambda model, *names: batchnorm.use("batch", model, *names),
    "no_update": batchnorm.no_update,
    "accumulated_update": batchnorm.accumulated_update,
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_wrong_arguments_are_refused_in_the_call_itself(block) -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    with pytest.raises(ArgumentTypeError, match=r"expected a torch.nn.Module; got str"):
        block("model")
    with pytest.raises(UnknownNameError, match="no norm of that name"):
        block(model, "1")
    with pytest.raises(ArgumentTypeError, match="expected the names of norms"):
        block(model, 3)
    with pytest.raises(TypeError):
        block()
    block(model, "0")  # makes it, and does nothing
    assert "forward" not in vars(model[0])


def test_use_refuses_its_statistics_in_the_call_itself() -> None:
    model = torch.nn.BatchNorm1d(2)
    with pytest.raises(UnknownNameError, match='"batch" and "running"'):
        batchnorm.use("nonsense", model)
    with pytest.raises(ArgumentTypeError, match=r'Write use\("batch", model\)'):
        batchnorm.use(model, "batch")
    for name in ("nonsense", 3):
        with pytest.raises(UnknownNameError, match=str(name)):
            batchnorm.functional.use_backend(name)


def test_blocks_of_several_models_and_names_leave_the_others_alone():
    model = torch.nn.ModuleDict({n: torch.nn.Sequential(norm_of(BatchNorm1d), torch.nn.ReLU()) for n in "ab"})
    other = norm_of(BatchNorm1d)
    with batchnorm.no_update(model, "a"), batchnorm.use("running", other):
        for norm in (model["a"], model["b"], other):
            norm(X)
    assert [int(m.num_batches_tracked) for m in (model["a"][0], model["b"][0], other)] == [1, 2, 1]


def test_blocks_may_end_in_any_order():
    norm = norm_of(BatchNorm1d)
    first, second = batchnorm.no_update(norm), batchnorm.use("running", norm)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(norm(X), copy.deepcopy(norm).eval()(X))
    second.__exit__(None, None, None)
    assert "forward" not in norm.__dict__


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_behind_by_an_exception(failure):
    norm = norm_of(BatchNorm1d)
    before, attributes = state(norm), dict(norm.__dict__)
    with pytest.raises(failure), batchnorm.use("batch", norm), batchnorm.no_update(norm):  # noqa: PT012
        norm(X)
        raise failure
    assert same(before, state(norm))
    assert norm.__dict__ == attributes
    with batchnorm.no_update(norm), pytest.raises(ValueError, match="expected 2D or 3D"):
        norm(torch.zeros(1, 3, 1, 1))
    assert same(before, state(norm))


def test_what_a_forward_notes_on_its_layer_stays():
    norm = norm_of(WithActivation)
    with batchnorm.no_update(norm):
        norm(X)
        norm(X)
    assert norm.calls == 3


def test_a_norm_without_statistics_always_uses_the_batch():
    norm = torch.nn.BatchNorm1d(3, track_running_stats=False).eval()
    with batchnorm.no_update(norm), batchnorm.use("batch", norm):
        assert torch.equal(norm(X), F.batch_norm(X, None, None, norm.weight, norm.bias, training=True))
    with pytest.raises(StateError, match=r"BatchNorm1d keeps no running statistics .* to normalize by"):
        batchnorm.use("running", norm).__enter__()


def test_frozen_norms_stay_frozen():
    norm = norm_of(BatchNorm1d)
    expected, before = as_is(norm, False)[0], state(norm)
    batchnorm.freeze(norm)
    with batchnorm.use("batch", norm):
        assert torch.equal(norm(X), expected)
        batchnorm.unfreeze(norm)
        assert not torch.equal(norm(X), expected)
    assert not same(before, state(norm))


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, BatchNorm1d])
def test_gradients_by_running_statistics_survive_a_later_step(kind):
    norm = norm_of(kind)
    h, expected = X.clone().requires_grad_(), as_is(norm, False)[1]
    with batchnorm.use("running", norm):
        y = norm(h)
    norm(X * 9)
    y.sin().sum().backward()
    assert torch.equal(h.grad, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_run_again_as_they_were(reentrant):
    norm = norm_of(torch.nn.BatchNorm1d)
    before, expected = state(norm), as_is(norm, True)
    with batchnorm.no_update(norm):
        assert equal(outcome_of_checkpoint(norm, reentrant), expected)
    assert same(before, state(norm))


def outcome_of_checkpoint(norm, reentrant):
    h = X.clone().requires_grad_()
    y = checkpoint(norm, h, use_reentrant=reentrant)
    y.sin().sum().backward()
    return [y.detach(), h.grad, *(p.grad for p in norm.parameters())]


def test_fused_layers_under_no_update():
    layer = batchnorm.nn.BatchNorm2d(4)
    layer.fused = True
    x = torch.randn(16, 4, 32, 32)
    before, twin = state(layer), copy.deepcopy(layer)
    with batchnorm.no_update(layer):
        y = torch.relu(layer(x))
    assert same(before, state(layer))
    assert torch.equal(y, torch.relu(twin(x)))


def test_copies_made_in_a_block_are_ordinary():
    model = torch.nn.Sequential(norm_of(BatchNorm1d))
    with batchnorm.no_update(model):
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for made in copies:
            made(X)
            assert made[0].num_batches_tracked == 2
            assert "forward" not in made[0].__dict__
        model(X)
    assert model[0].num_batches_tracked == 1
    assert batchnorm.nn.BatchNorm1d is type(copies[0][0])


def test_it_holds_in_all_threads():
    norm = norm_of(BatchNorm1d)
    before = state(norm)
    with batchnorm.no_update(norm):
        threads = [threading.Thread(target=lambda: [norm(X) for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert same(before, state(norm))


def test_functional_calls_and_shared_norms():
    norm = norm_of(BatchNorm1d)
    buffers = {"running_mean": torch.full((3,), 5.0), "running_var": torch.full((3,), 4.0)}
    model = torch.nn.Sequential(norm, norm)
    with batchnorm.use("running", model):
        y = torch.func.functional_call(norm, buffers, (X,))
        model(X)
    torch.testing.assert_close(y, (X - 5) / (4 + norm.eps) ** 0.5 * norm.weight + norm.bias)
    assert norm.num_batches_tracked == 1


def test_a_compiled_model_follows():
    model = torch.nn.Sequential(norm_of(BatchNorm1d))
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    before = state(model)
    with batchnorm.no_update(compiled):
        compiled(X)
    assert same(before, state(model))
    compiled(X)
    assert not same(before, state(model))


def test_a_graph_traced_in_a_block_calls_the_module():
    model = torch.nn.Sequential(norm_of(BatchNorm1d))
    with batchnorm.no_update(model):
        graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0"]


def test_a_forward_replaced_on_the_instance_goes_along_if_it_is_a_method():
    norm = norm_of(torch.nn.BatchNorm1d)
    norm.forward = (lambda self, x: type(self).forward(self, x) * 2).__get__(norm)
    replaced, before = norm.forward, state(norm)
    expected = copy.deepcopy(norm)(X)
    with batchnorm.no_update(norm):
        assert torch.equal(norm(X), expected)
    assert same(before, state(norm))
    assert norm.forward == replaced
    norm.forward = lambda x: x
    with pytest.raises(StateError, match="forward of BatchNorm1d was replaced on the instance"):
        batchnorm.no_update(norm).__enter__()


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (3, ArgumentTypeError, r"no_update: expected a torch.nn.Module; got int"),
        (torch.nn.DataParallel(torch.nn.BatchNorm1d(3)), StateError, "is DataParallel"),
    ],
)
def test_refusals(model, error, words):
    with pytest.raises(error, match=words):
        batchnorm.no_update(model).__enter__()


def test_scripted_norms_and_wrong_names_are_refused():
    with pytest.raises(StateError, match="is scripted"):
        batchnorm.no_update(torch.nn.Sequential(torch.jit.script(torch.nn.BatchNorm1d(3)))).__enter__()
    with pytest.raises(UnknownNameError, match=r'statistics .*"batch" and "running"'):
        batchnorm.use("bathc", torch.nn.BatchNorm1d(3)).__enter__()
    with pytest.raises(UnknownNameError, match="no norm of that name"):
        batchnorm.no_update(torch.nn.BatchNorm1d(3), "bn").__enter__()


def test_compiled_code_cannot_enter():
    norm = BatchNorm1d(3)

    def step(x):
        with batchnorm.no_update(norm):
            return norm(x)

    before = state(norm)
    with pytest.raises(StateError, match="cannot be entered in compiled code"):
        torch.compile(step, backend="eager")(X)
    assert same(before, state(norm))
    assert "forward" not in norm.__dict__


def test_the_model_in_the_first_place_is_told():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    message = 'expected "batch" or "running" first and the model second; got Sequential'
    with pytest.raises(ArgumentTypeError, match=message), batchnorm.use(model, "batch"):
        pass


BLOCKS = {
    "no_update": batchnorm.no_update,
    "use running": partial(batchnorm.use, "running"),
    "use batch": partial(batchnorm.use, "batch"),
    "accumulated_update": batchnorm.accumulated_update,
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", BLOCKS)
def test_interrupted_anywhere_a_block_leaves_nothing_on_the_model(name):
    norms = torch.nn.Sequential(BatchNorm1d(2), BatchNorm1d(2))

    def enter_and_leave() -> None:
        with BLOCKS[name](norms):
            pass

    for n in range(1, 10_000):
        try:
            Interrupting(n).run(enter_and_leave)
        except KeyboardInterrupt:
            assert not any("forward" in norm.__dict__ for norm in norms), f"interrupted at {n}"
            assert compiled_modules_eager.depth() == 0, f"interrupted at {n}"
        else:
            break
    assert n > 10
    norms(torch.randn(4, 2))
    assert [int(norm.num_batches_tracked) for norm in norms] == [1, 1]
