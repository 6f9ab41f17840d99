from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.dataflow.trace import trace
from batchnorm.errors import InputError
from batchnorm.models.calling import fresh_inputs


def ops(graph):
    return [(call.module, call.name) for call in graph.calls]


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))


def test_operators_arrive_whole_with_their_modules():
    net = Net().eval()
    graph = trace(net, randn(2, 3, 6, 6))
    assert ops(graph) == [
        ("stem.0", "conv2d"),
        ("stem.1", "batch_norm"),
        ("stem.2", "relu"),
        ("", "mean"),
        ("head", "linear"),
    ]
    conv, norm = graph.calls[:2]
    assert conv.args["weight"].names == ("stem.0.weight",)
    assert conv.args["bias"] is None
    assert conv.args["padding"] == [0, 0]
    assert norm.args["input"] is conv.output
    assert norm.args["running_var"].names == ("stem.1.running_var",)
    assert norm.args["training"] is False
    assert [v.kind for v in graph.inputs] == ["input"]
    assert graph.is_output(graph.calls[-1].output)


@pytest.mark.parametrize("example", [randn(2, 3), (randn(2, 3),), [randn(2, 3)], {"input": randn(2, 3)}])
def test_inputs_are_given_as_to_export(example):
    graph = trace(nn.Linear(3, 4), example)
    assert graph.calls[0].args["input"] is graph.inputs[0]


def test_functional_norm_and_keyword_call_are_seen():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            y = self.bn(input=x)
            return F.batch_norm(y, self.bn.running_mean, self.bn.running_var, eps=0.5)

    graph = trace(Functional().eval(), randn(4, 3))
    assert ops(graph) == [("bn", "batch_norm"), ("", "batch_norm")]
    assert graph.calls[1].args["eps"] == 0.5
    assert graph.calls[1].args["weight"] is None
    (run,) = graph.runs_of("bn")
    assert run.plain
    assert run.inputs == (graph.inputs[0],)
    assert run.calls == [graph.calls[0]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_scripted_and_composite_code_calls_the_same_operators():
    block = torch.jit.script(nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)).eval())
    graph = trace(nn.Sequential(block), randn(1, 2, 5))
    assert ops(graph) == [("0", "conv1d"), ("0", "batch_norm")]
    assert graph.calls[1].args["running_mean"].names == ("0.1.running_mean",)


def test_module_called_twice_has_two_runs():
    layer = nn.Linear(3, 3)
    graph = trace(nn.Sequential(layer, nn.ReLU(), layer), randn(2, 3))
    assert [call.args["weight"] is graph.calls[0].args["weight"] for call in graph.calls if call.name == "linear"]
    assert len(graph.runs_of("0")) == 2
    assert graph.calls[0].args["weight"].names == ("0.weight", "2.weight")


@pytest.mark.parametrize(("call", "plain"), [
    (lambda bn, x: bn(x), True),
    (lambda bn, x: bn(input=x), True),
    (lambda bn, x: bn(x, None), False),
    (lambda bn, x: bn(x, extra=None), False),
    (lambda bn, x: bn(x, extra=1)[0], False),
])  # fmt: skip
def test_plain_runs_take_and_return_one_tensor(call, plain):
    class Norm(nn.BatchNorm1d):
        def forward(self, input, extra=None):
            out = super().forward(input)
            return out if extra is None else (out,)

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = Norm(3)

        def forward(self, x):
            return call(self.bn, x)

    (run,) = trace(Caller().eval(), randn(2, 3)).runs_of("bn")
    assert run.plain is plain


def test_in_place_operator_renews_the_value_and_all_views_of_its_memory():
    class InPlace(nn.Module):
        def forward(self, x):
            y = x + 1
            view = y[0]
            y.mul_(2)
            return view + 1

    graph = trace(InPlace(), randn(2, 3))
    add, _, mul, last = graph.calls
    assert mul.args["self"] is add.output
    assert last.args["self"].producer is mul


def test_written_inputs_are_a_copy():
    x = randn(3)
    kept = x.clone()

    class Writer(nn.Module):
        def forward(self, x, y):
            assert x is y  # one tensor given twice stays one
            return x.zero_()

    trace(Writer(), (x, x))
    assert torch.equal(x, kept)
    a, b = fresh_inputs((x, {"again": x}))
    assert a is b["again"]


def test_hooks_and_stored_tensors_hold_values():
    class Keeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            self.kept = self.a(x)
            return self.b(self.kept.relu())

    net = Keeper()
    net.b.register_forward_hook(lambda *_: None)
    graph = trace(net, randn(1, 2))
    first, relu, last = graph.calls
    assert "the model stores it" in first.output.held_by[0]
    assert relu.output.held_by == ["a hook of b"]
    assert last.output.held_by == ["a hook of b"]
    assert graph.only_reader(first.output) is None


@pytest.mark.parametrize("switches_on", [False, True])
def test_a_cycle_that_dies_holds_nothing(switches_on: bool):
    class Cycle(nn.Module):
        def forward(self, x):
            box = [x + 1]
            box.append(box)
            if switches_on:
                gc.enable()
                gc.collect()  # the box is no longer young
            return box[0] * 2

    graph = trace(Cycle(), randn(2))
    assert graph.only_reader(graph.calls[0].output) is graph.calls[1]
    assert gc.isenabled()


def test_what_a_model_keeps_does_not_make_the_collector_look_at_the_whole_process():
    class Keeper(nn.Module):
        def forward(self, x):
            self.kept = x + 1
            return self.kept * 2

    generations: list[int] = []

    def watch(phase, info):
        if phase == "start":
            generations.append(info["generation"])

    gc.collect()  # so that none is due
    gc.callbacks.append(watch)
    try:
        graph = trace(Keeper(), randn(2))
    finally:
        gc.callbacks.remove(watch)
    assert graph.calls[0].output.held_by
    assert 0 in generations
    assert 2 not in generations


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        trace(nn.Linear(2, 2), randn(1, 2))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_buffers_modes_and_generators_are_restored():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    trace(net, randn(8, 3))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training


def hooks_of_all_modules():
    kinds = vars(nn.modules.module).items()
    return {
        kind: len(hooks)
        for kind, hooks in kinds
        if kind.startswith("_global") and kind.endswith(("hooks", "called", "kwargs"))
    }


def test_nothing_is_left_behind_and_a_failure_names_the_model():
    before = hooks_of_all_modules()
    assert len(before) >= 4
    trace(Net(), randn(2, 3, 6, 6))
    assert hooks_of_all_modules() == before
    with pytest.raises(InputError, match=r"Net fails on the example inputs: RuntimeError"):
        trace(Net(), randn(2, 5, 6, 6))
    assert hooks_of_all_modules() == before


def test_error_caught_by_the_model_does_not_confuse_the_modules():
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.fails, self.after = nn.Sequential(Fails()), nn.ReLU()

        def forward(self, x):
            try:
                return self.fails(x)
            except ValueError:
                return self.after(x)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.outer = Outer()

        def forward(self, x):
            return self.outer(x) + 1

    graph = trace(Whole(), randn(2))
    assert ops(graph)[-1] == ("", "add")


def test_other_threads_running_the_same_model_are_not_recorded():
    net = Net().eval()
    x = randn(2, 3, 6, 6)
    expected = ops(trace(net, x))
    stop, failures = threading.Event(), []

    def elsewhere():
        while not stop.is_set():
            net(x)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    try:
        failures += [g for g in (ops(trace(net, x)) for _ in range(20)) if g != expected]
    finally:
        stop.set()
        thread.join()
    assert failures == []


def test_observer_sees_the_real_tensors():
    seen: list[tuple[str, bool]] = []
    net = Net().eval()

    def observer(call, args, kwargs, result):
        assert isinstance(result, Tensor)
        assert tuple(result.shape) == call.output.shape
        seen.append((call.name, any(a is net.stem[0].weight for a in args)))

    trace(net, randn(2, 3, 6, 6), observer=observer)
    assert ("conv2d", True) in seen
    assert [name for name, _ in seen] == ["conv2d", "batch_norm", "relu", "mean", "linear"]


def test_time_marks_of_a_parallel_wrapper_are_no_calls():
    net = Net().eval()
    x = randn(2, 3, 6, 6)
    assert [name for _, name in ops(trace(nn.DataParallel(net), x))] == [name for _, name in ops(trace(net, x))]
