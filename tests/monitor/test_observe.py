"""A watch sees everything, changes nothing and leaves nothing behind."""

import copy
import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

import batchnorm.functional
import batchnorm.nn
from batchnorm import observers as observing
from batchnorm.monitor import watch


class Block(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = norm(4)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = self.relu(x - 0.1)
        return torch.sigmoid(self.head(self.drop(x.mean((2, 3)))))


def trained(model: nn.Module, shape: tuple[int, ...] = (3, 8, 8)) -> nn.Module:
    model.train()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, *shape, generator=g))
    return model


def images(n: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def left_behind() -> list[object]:
    return [
        list(hooks._global_forward_hooks),
        list(hooks._global_forward_pre_hooks),
        dict(hooks._global_forward_hooks_always_called),
        _get_current_dispatch_mode_stack(),
        observing._observers.all,
        torch._dynamo.eval_frame._stance.stance,
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_outputs_buffers_and_gradients_are_bit_identical(training: bool, grad: bool) -> None:
    plain = trained(Block()).train(training)
    twin = copy.deepcopy(plain)
    results = []
    for model, context in ((plain, None), (twin, watch(twin))):
        torch.manual_seed(3)
        with torch.set_grad_enabled(grad):
            x = images().requires_grad_(grad)
            if context is None:
                y = model(x)
            else:
                with context:
                    y = model(x)
            if grad:
                y.square().sum().backward()
        gradients = [p.grad for p in model.parameters()] + [x.grad]
        results.append([y.detach(), *model.buffers(), *(g for g in gradients if g is not None)])
    assert len(results[0]) == len(results[1]) == 4 + (7 if grad else 0)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert context.result().layers[0].samples == 16


def test_encoder_fast_path_stays_the_one_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    # hooks on modules, or a function mode, would send torch.nn.TransformerEncoderLayer another way
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.norm(x).transpose(1, 2))

    model = trained(Model(), (8, 5)).eval()
    x = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(0))
    fast, calls = torch._transformer_encoder_layer_fwd, 0

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return fast(*args, **kwargs)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    with torch.inference_mode():
        plain = model(x)
        assert calls == 1
        with watch(model):
            watched = model(x)
    assert calls == 2
    torch.testing.assert_close(plain, watched)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(error: type[BaseException]) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error("in the middle")

    model = nn.Sequential(nn.BatchNorm2d(3), Fails())
    model[0].running_mean.fill_(1.0)
    before = left_behind()
    state = {k: v.clone() for k, v in model.eval().state_dict().items()}
    w = watch(model)
    with pytest.raises(error), w:
        model(images())
    assert left_behind() == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert w.result().samples == 16  # what was seen until then


def test_a_forward_that_fails_inside_the_block_does_not_confuse_the_next() -> None:
    model = trained(Block()).eval()
    with watch(model) as w:
        for _ in range(2):
            with pytest.raises(RuntimeError):
                model(torch.randn(2, 7, 8, 8))
            model(images())
    result = w.result()
    assert [use.name for use in result.saturation] == ["relu", "relu #2", ""]
    assert result.samples == 32


def test_no_tensor_is_kept_alive() -> None:
    model = trained(Block())
    alive = []

    class Notes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            alive.extend(weakref.ref(t) for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    w = watch(model)
    with w, Notes():
        x = images()
        y = model(x)
        del x, y
    gc.collect()
    # the memory that numbers of each sample wait in is the watch's own
    mine = {b.data_ptr() for b in model.buffers()}
    mine |= {layer._memory.untyped_storage().data_ptr() for layer in w._seen.layers.values()}
    living = [t for r in alive if (t := r()) is not None and t.numel() > 16 * 5]
    big = [t for t in living if t.data_ptr() not in mine and t.untyped_storage().data_ptr() not in mine]
    assert big == []
    assert w.result().samples == 16


def same_numbers(model: nn.Module, x: Tensor, reference: nn.Module, *, context=torch.no_grad) -> None:
    """Assert that a watch sees in ``model`` what it sees in ``reference``."""
    results = []
    for m in (model, reference):
        with context(), watch(m) as w:
            m(x)
        results.append(w.result())
    assert len(results[0].layers) == len(results[1].layers) == 1
    for a, b in zip(results[0].layers, results[1].layers, strict=True):
        assert (a.samples, a.status, a.distance) == (b.samples, b.status, pytest.approx(b.distance, rel=1e-6))
        torch.testing.assert_close(a.shift, b.shift)
        torch.testing.assert_close(a.variance_ratio, b.variance_ratio)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
def test_modes(context, training: bool) -> None:
    reference = trained(Block()).eval()
    same_numbers(copy.deepcopy(reference).train(training), images(64), reference, context=context)


class ByFunction(Block):
    """The norm is a call of a function with buffers of the model."""

    def __init__(self) -> None:
        super().__init__(nn.Identity)
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.relu(F.batch_norm(x, self.running_mean, self.running_var, training=self.training)).mean((2, 3))


class OwnForward(nn.BatchNorm2d):
    """A norm with arithmetic of its own."""

    def forward(self, input: Tensor) -> Tensor:
        column = (None, slice(None), None, None)
        return (input - self.running_mean[column]) / (self.running_var[column] + self.eps).sqrt()


class Cast(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.double().float())


def like(reference: nn.Module, other: nn.Module) -> nn.Module:
    other.load_state_dict(reference.state_dict(), strict=False)
    return other.eval()


@pytest.mark.parametrize("norm", [batchnorm.nn.BatchNorm2d, nn.SyncBatchNorm, Cast, OwnForward])
def test_norm_classes(norm: type[nn.Module]) -> None:
    reference = trained(Block()).eval()
    same_numbers(like(reference, Block(norm)), images(64), reference)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_other_backend_of_our_own_norms(context) -> None:
    reference = trained(Block()).eval()
    with batchnorm.functional.use_backend("reference"):
        same_numbers(like(reference, Block(batchnorm.nn.BatchNorm2d)), images(64), reference, context=context)


@pytest.mark.parametrize("training", [True, False])
def test_functional_norms(training: bool) -> None:
    reference = trained(Block()).eval()
    model = like(reference, ByFunction())
    model.running_mean.copy_(reference.bn.running_mean)
    model.running_var.copy_(reference.bn.running_var)
    same_numbers(model.train(training), images(64), reference)


def test_masked_positions_are_left_out() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("running_var", torch.full((3,), 2.0))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return batchnorm.functional.batch_norm(x, self.running_mean, self.running_var, mask=mask)

    x = torch.randn(32, 3, 6, generator=torch.Generator().manual_seed(0))
    x[:, :, 4:] = 1e9
    mask = (torch.arange(6) < 4).expand(32, 6)
    for context in (torch.inference_mode, torch.enable_grad):
        model = Masked()
        with context(), watch(model) as w:
            model(x, mask)
        (layer,) = w.result().layers
        expected = x[:, :, :4].double().mean((0, 2)) / (2 + 1e-5) ** 0.5
        torch.testing.assert_close(layer.shift, expected, rtol=1e-5, atol=1e-6)


def test_scripted_modules() -> None:
    reference = trained(Block()).eval()
    same_numbers(torch.jit.script(copy.deepcopy(reference)), images(64), reference)


def test_compiled_models_run_eagerly() -> None:
    reference = trained(Block()).eval()
    x = images(64)
    compiled = torch.compile(copy.deepcopy(reference), backend="eager")
    with torch.no_grad():
        compiled(x)
    same_numbers(compiled, x, reference)
    with torch.no_grad(), watch(compiled) as w:
        compiled(x)
    assert w.result().layers[0].name == "_orig_mod.bn"


def test_batch_mode_is_compared_with_what_was_stored_before() -> None:
    model = trained(Block())
    model.bn.momentum = 1.0
    before = copy.deepcopy(model).eval()
    with torch.no_grad():
        model.conv.bias += 5
        before.conv.bias += 5
        with watch(model) as w:
            model(images(64))
            model(images(64, seed=2))
    assert w.result().drifted
    assert not torch.equal(model.bn.running_mean, before.bn.running_mean)
    with torch.no_grad(), watch(before) as fixed:
        before(images(64))
        before(images(64, seed=2))
    torch.testing.assert_close(w.result().layers[0].shift, fixed.result().layers[0].shift)


def test_recomputation_by_checkpoints_is_not_seen_twice() -> None:
    for reentrant in (True, False):
        model = trained(Block()).eval()
        outer = nn.Sequential(model)
        outer.forward = lambda x, f=model, r=reentrant: checkpoint(f, x, use_reentrant=r)
        with watch(outer) as w:
            outer(images().requires_grad_()).sum().backward()
        result = w.result()
        assert (result.layers[0].samples, result.saturation[0].values) == (16, 16 * 4 * 36)


def test_a_norm_called_twice_in_one_forward_meets_each_sample_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) + self.bn(-x)

    model = trained(Twice(), (3,)).eval()
    with watch(model) as w:
        for _ in range(2):
            model(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))
    assert w.result().samples == 32


def test_layers_come_in_the_order_of_their_calls_and_uncalled_ones_last() -> None:
    class Order(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.second, self.first = (nn.BatchNorm1d(3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) + 1)

    model = trained(Order(), (3,)).eval()
    with watch(model) as w:
        model(torch.randn(20, 3))
    assert [(layer.name, layer.status == "not called") for layer in w.result().layers] == [
        ("first", False),
        ("second", False),
        ("unused", True),
    ]


def test_rows_of_one_sample_are_known_from_the_input_of_the_model() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x.flatten(0, 1))

    model = trained(Steps(), (7, 3)).eval()
    with watch(model) as w:
        model(torch.randn(5, 7, 3))
    assert w.result().samples == 5


def test_only_this_model_but_in_all_threads() -> None:
    model, other = trained(Block()).eval(), trained(Block()).eval()
    with watch(model) as w, watch(other) as v:
        model(images(4))
        other(images(8))
        torch.sigmoid(torch.randn(3, 3))  # belongs to no model
        thread = threading.Thread(target=lambda: model(images(32)))
        thread.start()
        thread.join()
    assert (w.result().samples, v.result().samples) == (36, 8)
    assert len(w.result().saturation) == len(v.result().saturation) == 3


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_server_with_worker_threads_is_seen_as_one_stream(context) -> None:
    model = trained(Block()).eval()
    batches = [images(8, seed) for seed in range(40)]

    def serve(x: Tensor) -> None:
        with context():
            model(x)

    before = left_behind()
    with watch(model) as w, ThreadPoolExecutor(8) as pool:
        list(pool.map(serve, batches))
        assert list(pool.map(lambda _: left_behind(), range(16))) == [left_behind()] * 16  # no mode stays on
    assert left_behind() == before
    with torch.no_grad(), watch(model) as one:
        for x in batches:
            model(x)
    ours, reference = w.result(), one.result()
    assert ours.samples == reference.samples == 320
    assert ours.verdict == reference.verdict
    for a, b in zip(ours.layers, reference.layers, strict=True):
        # all samples are in, each once; which group of the jackknife one falls into is left to the threads
        torch.testing.assert_close(a.shift, b.shift)
        torch.testing.assert_close(a.variance_ratio, b.variance_ratio)
    assert [use.values for use in ours.saturation] == [use.values for use in reference.saturation]
    assert ours.saturation == reference.saturation


def test_a_watch_counts_what_happens_in_threads_whoever_opened_it() -> None:
    before = left_behind()
    model = trained(Block()).eval()
    start, open_, seen = threading.Barrier(3), threading.Barrier(3), {}

    def work(n: int) -> None:
        start.wait()
        with torch.no_grad(), watch(model) as w:
            open_.wait()  # all are open, and all see all
            for _ in range(5):
                model(images(n))
            open_.wait()
        seen[n] = (w.result().samples, len(w.result().saturation))

    threads = [threading.Thread(target=work, args=(n,)) for n in (4, 8, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == dict.fromkeys((4, 8, 12), (120, 3))
    assert left_behind() == before


class Gate(nn.Module):
    """Waits in the middle of a forward, and may fail there."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go, self.error = threading.Event(), threading.Event(), None

    def forward(self, x: Tensor) -> Tensor:
        self.reached.set()
        assert self.go.wait(200)
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize("error", [None, ValueError("in the middle")])
def test_a_watch_that_ends_while_a_thread_is_in_the_model(error) -> None:
    before = left_behind()
    block, gate = trained(Block()).eval(), Gate()
    model = nn.Sequential(nn.BatchNorm2d(3), gate, block)
    model[0].num_batches_tracked += 1
    model.eval()
    gate.error = error
    with ThreadPoolExecutor(1) as pool:
        with watch(model) as w:
            done = pool.submit(model, images(4))
            assert gate.reached.wait(200)
        gate.go.set()
        if error is None:
            done.result()
        else:
            with pytest.raises(ValueError, match="in the middle"):
                done.result()
        gate.error = None
        assert pool.submit(left_behind).result()[3:] == before[3:]
        pool.submit(model, images(4)).result()  # where it failed, this takes the hooks off
    assert left_behind() == before
    assert (w.result().samples, w.result().layers[0].name) == (4, "0")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_a_worker_leaves_nothing_behind_there(error) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.isnan().any():
                raise error("in the middle")
            return x

    model = nn.Sequential(nn.BatchNorm2d(3), Fails(), nn.Sigmoid()).eval()
    model[0].num_batches_tracked += 1
    before = left_behind()
    with ThreadPoolExecutor(1) as pool:
        clean = pool.submit(left_behind).result()
        with watch(model) as w:
            future = pool.submit(model, images(4) * torch.nan)
            assert isinstance(future.exception(), error)
            pool.submit(model, images(4)).result()
            assert pool.submit(left_behind).result()[3:5] == clean[3:5]
            future = pool.submit(model, images(4) * torch.nan)
            assert isinstance(future.exception(), error)
        pool.submit(model, images(4)).result()
        assert pool.submit(left_behind).result() == clean
    assert left_behind() == before
    assert w.result().samples == 12
    assert w.result().saturation[0].values == 4 * 3 * 64


def test_two_watches_on_one_model_see_the_same() -> None:
    model = trained(Block()).eval()
    before = left_behind()
    with torch.no_grad(), watch(model) as outer:
        model(images(16))
        with watch(model) as inner:
            model(images(16, seed=2))
        model(images(16, seed=3))
    assert (outer.result().samples, inner.result().samples) == (48, 16)
    assert [use.values for use in outer.result().saturation] == [3 * u.values for u in inner.result().saturation]
    assert [use.name for use in outer.result().saturation] == ["relu", "relu #2", ""]
    assert left_behind() == before


def test_copies_that_share_the_work_are_seen() -> None:
    # what torch.nn.DataParallel does with a model: shallow copies with buffers of their own, one a thread
    model = trained(Block()).eval()
    replica = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        copied = replica._modules[name] = child._replicate_for_data_parallel()
        copied._parameters = dict(child._parameters)
        copied._buffers = {key: buffer.clone() for key, buffer in child._buffers.items()}
    with torch.no_grad(), watch(model) as w:
        thread = threading.Thread(target=lambda: replica(images(16)))
        thread.start()
        thread.join()
        model(images(16, seed=2))
    assert w.result().samples == 32
    assert w.result().layers[0].status != "not called"


def test_a_model_moved_while_it_is_watched() -> None:
    model = trained(Block()).eval()
    with torch.no_grad(), watch(model) as w:
        model(images())
        model.double()
        model(images().double())
    assert w.result().samples == 32


def test_activations_are_named_by_module_and_call() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(6)
            self.act = nn.ReLU()
            self.rnn = nn.LSTM(6, 6, batch_first=True)
            self.features = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:  # (N, 6, 5)
            x = self.act(self.bn(x))
            x = self.act(x - 0.5).transpose(1, 2)
            x, _ = self.rnn(x)
            return torch.tanh(F.relu_(self.features(x)))

    model = trained(Model(), (6, 5)).eval()
    with torch.no_grad():
        model.features.weight.zero_()
        model.features.bias.copy_(torch.tensor([1.0, -1.0, 9.0, 0.0]))
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context(), watch(model) as w:
            model(torch.randn(16, 6, 5))
            model(torch.randn(16, 6, 5))
        uses = w.result().saturation
        assert [(use.name, use.kind, use.units) for use in uses] == [
            ("act", "relu", 6),
            ("act #2", "relu", 6),
            ("", "relu", 4),
            ("", "tanh", 4),
        ]
        assert uses[2].dead == (1, 3)
        assert (uses[3].saturated, uses[3].stuck) == (0.25, (2,))


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        lambda x: F.relu(x, inplace=True),
        lambda x: x.clamp(min=0),
        lambda x: x.clamp_min(0),
        lambda x: x.clamp_(0),
        F.relu6,
        nn.ReLU6(),
        nn.Threshold(0, 0),
    ],
)
@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad])
def test_every_spelling_of_relu_is_seen(function, context) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return function(self.bn(x) * torch.tensor([1.0, 0.0, 1.0]))

    model = trained(Model(), (3,)).eval()
    with context(), watch(model) as w:
        model(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))
    (use,) = w.result().saturation
    assert use.dead == (1,)


@pytest.mark.parametrize("where", ["_take_off", "ended", "detach"])
def test_an_interrupt_while_a_call_ends_leaves_nothing_on(where: str) -> None:
    model, left = trained(Block()), [1]
    before = [len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)]

    def interrupt(frame, event, argument):
        if event == "call" and frame.f_code.co_name == where and left:
            left.clear()
            raise KeyboardInterrupt

    def watched() -> None:
        traced = sys.gettrace()
        with watch(model):
            sys.settrace(interrupt)
            try:
                model(images())
            finally:
                sys.settrace(traced)

    with pytest.raises(KeyboardInterrupt):
        watched()
    assert not left
    assert _get_current_dispatch_mode_stack() == []
    assert [len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)] == before
