"""Recalibration measures the exact moments of what each norm meets, on any model, and changes nothing else."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.nn import BatchNorm1d as OurBatchNorm1d
from batchnorm.nn import freeze
from batchnorm.statistics import recalibrate

EPS32 = torch.finfo(torch.float32).eps


def concatenation(model: nn.Module, batches: list[Any], names: list[str] | None = None) -> dict[str, Tensor]:
    """What each norm of a copy meets when its norms train and everything else evaluates: read by forward hooks."""
    twin = copy.deepcopy(model).eval()
    met: dict[str, list[Tensor]] = {}
    for name, module in twin.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (names is None or name in names):
            module.train()
            module.register_forward_pre_hook(lambda m, args, name=name: met.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    return {name: torch.cat([x.movedim(1, -1).flatten(0, -2) for x in parts]).double() for name, parts in met.items()}


def assert_population(model: nn.Module, met: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    for name, values in met.items():
        norm: Any = model.get_submodule(name)
        torch.testing.assert_close(norm.running_mean.double(), values.mean(0), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(norm.running_var.double(), values.var(0), rtol=tolerance, atol=tolerance)


def network(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4, **options),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3, **options),
        nn.Flatten(),
        nn.Linear(3 * 16, 5),
        nn.BatchNorm1d(5, **options),
    )
    return model.double()


def images(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 2, 8, 8, dtype=torch.float64, generator=generator) + i for i, n in enumerate(sizes)]


# -- the numbers -----------------------------------------------------------------------------------------------------


@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=8), seed=st.integers(0, 2**16))
def test_the_first_norm_holds_the_moments_of_the_stream_whatever_the_cut(cuts: list[int], seed: int) -> None:
    if sum(cuts) < 2:
        cuts = [*cuts, 1]
    x = torch.randn(sum(cuts), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3 + 2
    model = nn.Sequential(nn.BatchNorm1d(3)).double()
    recalibrate(model, x.split(cuts))
    assert_population(model, {"0": x})
    assert model[0].num_batches_tracked == len(cuts)


def test_every_norm_holds_the_moments_of_what_it_met() -> None:
    model, batches = network(), images(6, 6, 3)
    met = concatenation(model, batches)
    result = recalibrate(model, batches, order="parallel")
    assert_population(model, met)
    assert [(layer.name, layer.batches, layer.values) for layer in result.layers] == [
        ("1", 3, 15 * 36),
        ("5", 3, 15 * 16),
        ("8", 3, 15),
    ]


def test_a_small_last_batch_weighs_what_it_holds() -> None:
    torch.manual_seed(0)
    x = torch.randn(130, 1)
    x[128:] += 50
    model = nn.Sequential(nn.BatchNorm1d(1, momentum=None))
    recalibrate(model, x.split([64, 64, 2]))
    torch.testing.assert_close(model[0].running_mean, x.double().mean(0).float())
    assert model[0].running_mean < 1  # equal weights of batches would say 17
    assert model[0].num_batches_tracked == 3


def test_a_large_mean_keeps_the_digits_of_the_variance() -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 2) * 0.1 + 1e4
    model = nn.Sequential(nn.BatchNorm1d(2))
    recalibrate(model, x.split(100))
    assert_population(model, {"0": x.double()}, tolerance=4 * EPS32)


def test_large_activations_are_measured_in_parts() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 300, 300, dtype=torch.float64) + torch.arange(5.0).view(5, 1, 1, 1)
    model = nn.Sequential(nn.BatchNorm2d(3)).double()
    recalibrate(model, [x])
    assert_population(model, {"0": x.movedim(1, -1).flatten(0, -2)})


def test_within_is_the_papers_algorithm_2() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(n, 2, dtype=torch.float64) + shift for shift, n in enumerate([8, 8, 4, 1])]
    model = nn.Sequential(nn.BatchNorm1d(2)).double()
    result = recalibrate(model, batches, estimator="within")
    with_variance = batches[:3]
    expected_mean = torch.stack([b.mean(0) for b in with_variance]).mean(0)
    expected_var = torch.stack([len(b) / (len(b) - 1) * b.var(0, correction=0) for b in with_variance]).mean(0)
    torch.testing.assert_close(model[0].running_mean, expected_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[0].running_var, expected_var, rtol=1e-12, atol=1e-12)
    assert (result.layers[0].single_calls, result.layers[0].batches) == (1, 4)


def test_single_samples_at_a_fully_connected_norm_count_as_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 3, dtype=torch.float64)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    result = recalibrate(model, x.split([8, 1]), order="parallel")
    assert_population(model, {"0": x})
    # the tail is normalized by the moments of all nine
    head = F.batch_norm(x[:8], None, None, model[0].weight, model[0].bias, training=True)
    tail = F.batch_norm(x[8:], x.mean(0), x.var(0), model[0].weight, model[0].bias)
    assert_population(model, {"2": model[1](torch.cat([head, tail])).detach()})
    assert [layer.single_calls for layer in result.layers] == [1, 1]


def test_the_very_first_sample_alone_meets_the_stored_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).double()
    model[0].running_mean.fill_(5)
    model[0].running_var.fill_(4)
    x = torch.randn(3, 2, dtype=torch.float64)
    first = F.batch_norm(x[:1], model[0].running_mean.clone(), model[0].running_var.clone())
    rest = F.batch_norm(x[1:], None, None, training=True)
    recalibrate(model, x.split([1, 2]), order="parallel")
    assert_population(model, {"0": x, "1": torch.cat([first, rest])})


@pytest.mark.parametrize("cut", [[4, 8], [12], [3, 3, 3, 3]])
def test_norms_that_do_not_feed_each_other_do_not_depend_on_the_cut(cut: list[int]) -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) + self.right(x.square())

    x = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Parallel().double()
    recalibrate(model, x.split(cut))
    assert_population(model, {"left": x, "right": x.square()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_buffers_are_computed_in_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)).to(dtype)
    x = (torch.randn(64, 4) * 3 + 7).to(dtype)
    recalibrate(model, x.split(10))
    assert model[0].running_mean.dtype == dtype
    assert torch.equal(model[0].running_mean, x.double().mean(0).to(dtype))
    assert torch.equal(model[0].running_var, x.double().var(0).to(dtype))
    assert model[1].running_var.float().allclose(torch.ones(4), atol=0.05)


def test_a_half_precision_norm_normalizes_by_more_than_half_precision() -> None:
    x = torch.tensor([1000.0, 1000.0, 1000.0, 1000.5]).view(4, 1).half()  # their mean, 1000.125, is no float16
    model = nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.BatchNorm1d(1)).half()
    recalibrate(model, [x], order="parallel")
    assert model[1].running_mean.abs() < 4 * torch.finfo(torch.float16).eps


def test_float32_buffers_of_a_half_precision_input() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4).bfloat16()
    model = nn.Sequential(nn.BatchNorm1d(4))
    recalibrate(model, [x])
    assert torch.equal(model[0].running_var, x.double().var(0).float())


def test_masked_positions_do_not_count() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = OurBatchNorm1d(3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            result: Tensor = self.norm(x, mask=mask)
            return result

    torch.manual_seed(0)
    model = Sequence().double()
    batches = []
    for lengths in ([5, 2], [1, 3], [4, 5]):
        mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
        x = torch.randn(2, 3, 5, dtype=torch.float64)
        x.masked_fill_(~mask.unsqueeze(1), torch.nan)
        batches.append({"x": x, "mask": mask})
    result = recalibrate(model, batches)
    valid = torch.cat([b["x"].movedim(1, -1)[b["mask"]] for b in batches])
    assert_population(model, {"norm": valid})
    assert result.layers[0].values == 20


# -- which norms -----------------------------------------------------------------------------------------------------


def test_frozen_norms_are_left_and_run_on_their_stored_statistics() -> None:
    model, batches = network().train(), images(6, 6)
    freeze(model, "1")
    model[5].eval()  # by hand
    held = {k: v.clone() for k, v in model.state_dict().items() if k.startswith(("1.", "5."))}
    met = concatenation(model, batches, names=["8"])
    result = recalibrate(model, batches)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in held.items())
    assert_population(model, met)
    assert {left.name: left.reason.split(":")[0] for left in result.left} == {"1": "frozen", "5": "frozen by hand"}


def test_frozen_norms_are_measured_if_named_and_stay_frozen() -> None:
    model, batches = network().train(), images(6, 6)
    freeze(model, "1")
    met = concatenation(model, batches, names=["1"])
    result = recalibrate(model, batches, names="1")
    assert_population(model, met)
    assert [layer.name for layer in result.layers] == ["1"]
    assert not model.train()[1].training


def test_a_model_in_eval_mode_has_no_norms_frozen_by_hand() -> None:
    assert len(recalibrate(network().eval(), images(6)).layers) == 3


def test_only_named_norms_are_measured() -> None:
    model, batches = network(), images(6, 6)
    met = concatenation(model, batches, names=["5", "8"])
    before = model[1].running_mean.clone()
    recalibrate(model, batches, order="parallel", names=["5", "8"])
    assert_population(model, met)
    assert torch.equal(model[1].running_mean, before)


def test_norms_without_statistics_and_norms_never_called_are_listed() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
            self.free = nn.BatchNorm1d(2, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.free(self.used(x))

    model = Partial()
    before = copy.deepcopy(model.unused.state_dict())
    result = recalibrate(model, [torch.randn(8, 2)])
    assert {left.name for left in result.left} == {"unused", "free"}
    assert "never called" in str(result)
    assert all(torch.equal(model.unused.state_dict()[k], v) for k, v in before.items())


def test_instance_norm_is_untouched() -> None:
    model = nn.Sequential(nn.InstanceNorm1d(2, track_running_stats=True), nn.BatchNorm1d(2))
    before = copy.deepcopy(model[0].state_dict())
    result = recalibrate(model, [torch.randn(8, 2, 5)])
    assert [layer.name for layer in result.layers] == ["1"]
    assert all(torch.equal(model[0].state_dict()[k], v) for k, v in before.items())


# -- which models ----------------------------------------------------------------------------------------------------


def test_a_norm_called_twice_merges_both_calls() -> None:
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(norm, nn.ReLU(), norm).double()
    batches = [torch.randn(6, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64) + 1]
    met = concatenation(model, batches)
    result = recalibrate(model, batches, order="parallel")
    assert len(met["0"]) == 20
    assert_population(model, met)
    assert (result.layers[0].batches, result.layers[0].calls) == (2, 4)
    assert norm.num_batches_tracked == 2


def test_norms_called_in_another_order_than_registered() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu())

    model, batches = Backwards().double(), [torch.randn(6, 2, dtype=torch.float64) for _ in range(3)]
    met = concatenation(model, batches)
    assert [layer.name for layer in recalibrate(model, batches, order="parallel").layers] == ["first", "last"]
    assert_population(model, met)


class Functional(nn.Module):
    """Batch norm as a function, on buffers of the model's own; ``always`` as some write it, training come what may."""

    def __init__(self, mean: str = "running_mean", var: str = "running_var", always: bool = False) -> None:
        super().__init__()
        self.names, self.always = (mean, var), always
        self.register_buffer(mean, torch.zeros(2, dtype=torch.float64))
        self.register_buffer(var, torch.ones(2, dtype=torch.float64))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = (getattr(self, name) for name in self.names)
        return F.batch_norm(x, mean, var, training=self.always or self.training)


@pytest.mark.parametrize("always", [True, False])
def test_functional_norms_are_named_by_their_buffers(always: bool) -> None:
    model = nn.Sequential(nn.Identity(), Functional(always=always))
    x = torch.randn(9, 2, dtype=torch.float64) + 3
    result = recalibrate(model, x.split([5, 4]))
    assert_population(model, {"1": x})
    assert [layer.name for layer in result.layers] == ["1"]
    assert model[1].num_batches_tracked == 2


def test_functional_norms_can_be_named_and_left() -> None:
    model = nn.Sequential(Functional("mu", "sigma2", always=True), nn.BatchNorm1d(2).double())
    x = torch.randn(9, 2, dtype=torch.float64) + 3
    recalibrate(model, [x], names="1")
    assert model[0].mu.tolist() == [0, 0]
    assert model[0].sigma2.tolist() == [1, 1]
    assert [layer.name for layer in recalibrate(model, [x], names="0.mu").layers] == ["0.mu"]
    torch.testing.assert_close(model[0].mu, x.mean(0), rtol=1e-12, atol=0)


def test_functional_norms_frozen_by_hand_are_left() -> None:
    model = nn.Sequential(Functional(), nn.BatchNorm1d(2).double()).train()
    model[0].eval()
    result = recalibrate(model, [torch.randn(9, 2, dtype=torch.float64)])
    assert [(left.name, left.reason[:14]) for left in result.left] == [("0", "frozen by hand")]


def test_statistics_that_are_no_buffers_are_reported_and_not_changed() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.statistics = [torch.zeros(2), torch.ones(2)]

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.norm(x), *self.statistics, training=True)

    model = Hidden()
    result = recalibrate(model, [torch.randn(8, 2)])
    assert [left.name for left in result.left] == ["(functional)"]
    assert [t.tolist() for t in model.statistics] == [[0, 0], [1, 1]]


class NormAct(nn.BatchNorm2d):
    """A subclass with a forward of its own, which calls no forward of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return y.relu()


def scripted(model: nn.Module) -> nn.Module:
    module: nn.Module = torch.jit.script(model)
    return module


def exported(model: nn.Module) -> nn.Module:
    return torch.export.export(model.eval(), (torch.zeros(6, 2, 8, 8),)).run_decompositions().module()


def compiled(model: nn.Module) -> nn.Module:
    module: nn.Module = torch.compile(model, backend="eager")
    return module


@pytest.mark.every(2)
@pytest.mark.parametrize("wrap", [scripted, exported, compiled, nn.DataParallel])
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    batches = [b.float() for b in images(6, 6, 6)]
    wrapped = wrap(copy.deepcopy(plain))
    expected = {layer.name: layer for layer in recalibrate(plain, batches).layers}
    result = recalibrate(wrapped, batches)
    assert len(result.layers) == 2
    for layer in result.layers:
        same = expected[layer.name.split(".")[-1]]
        assert torch.equal(layer.mean_after, same.mean_after)
        assert torch.equal(layer.variance_after, same.variance_after)
    result.undo()
    wrapped_buffers = dict(wrapped.named_buffers())
    assert all(not b.any() for name, b in wrapped_buffers.items() if "running_mean" in name)


@pytest.mark.parametrize("cls", [NormAct, nn.SyncBatchNorm])
def test_norm_subclasses(cls: type[nn.BatchNorm2d]) -> None:
    model = nn.Sequential(cls(2)).double()
    batches = images(4, 5)
    recalibrate(model, batches)
    assert_population(model, {"0": torch.cat(batches).movedim(1, -1).flatten(0, -2)})


def test_two_norms_that_share_buffers_are_measured_as_one() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    model[2].running_mean, model[2].running_var = model[0].running_mean, model[0].running_var
    batches = [torch.randn(8, 2, dtype=torch.float64)]
    met = concatenation(model, batches)
    recalibrate(model, batches, order="parallel")
    assert_population(model, {"0": torch.cat([met["0"], met["2"]])})


# -- how the model is called -----------------------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2).double()

    def forward(self, a: Tensor, scale: float = 1.0) -> Tensor:
        result: Tensor = self.norm(a * scale)
        return result


def test_tuples_lists_dicts_and_forward() -> None:
    x = torch.randn(6, 2, dtype=torch.float64)
    labels = torch.zeros(6)
    for batch in (x, (x, labels), [x, labels], {"a": x}, ({"a": x}, labels)):
        model = Named()
        recalibrate(model, [batch])
        assert_population(model, {"norm": x})
    recalibrate(model, [(labels, x)], forward=lambda m, batch: m(batch[1], scale=2.0))
    assert_population(model, {"norm": 2 * x})


def test_generators_are_taken() -> None:
    x = torch.randn(6, 2, dtype=torch.float64)
    model = Named()
    recalibrate(model, (part for part in x.split(2)))
    assert_population(model, {"norm": x})


def test_a_loader_may_need_gradients() -> None:
    """Adversarial examples are made with gradients: the loader runs outside of what the model runs in."""

    def loader() -> Any:
        x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
        yield (x + torch.autograd.grad(x.square().sum(), x)[0]).detach()

    recalibrate(Named(), loader())


def test_it_works_under_inference_mode() -> None:
    x = torch.randn(6, 2, dtype=torch.float64)
    model = Named()
    with torch.inference_mode():
        recalibrate(model, [x])
    assert_population(model, {"norm": x})


# -- what else it leaves alone ---------------------------------------------------------------------------------------


def test_dropout_is_off_and_random_numbers_are_as_before() -> None:
    model, batches = network().train(), images(6, 6)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = recalibrate(model, batches)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    second = recalibrate(model, batches)
    assert torch.equal(first.layers[2].mean_after, second.layers[2].mean_after)


def test_modes_parameters_and_other_buffers_are_as_before() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.register_buffer("seen", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += len(x)
            result: Tensor = self.norm(x)
            return result

    model = nn.Sequential(Counting(), nn.Dropout()).train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    recalibrate(model, [torch.randn(8, 2)])
    assert [m.training for m in model.modules()] == modes
    assert model[0].seen == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_backward_pass_that_is_still_to_come_is_not_disturbed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    freeze(model, "3", affine=False)
    loss = model[2:](torch.randn(4, 2)).sum()  # holds on to the buffers of the frozen norm
    recalibrate(model, [torch.randn(8, 2)])
    loss.backward()


def test_two_threads_recalibrate_two_models_at_once() -> None:
    models = [network() for _ in range(4)]
    batches = [images(*sizes) for sizes in ([6] * 10, [8, 9] * 5, [7] * 12, [10] * 6)]
    met = [concatenation(m, b) for m, b in zip(models, batches, strict=True)]
    errors: list[BaseException] = []

    def work(model: nn.Module, stream: list[Tensor]) -> None:
        try:
            recalibrate(model, stream, order="parallel", progress=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, batches, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for model, expected in zip(models, met, strict=True):
        assert_population(model, expected)
    calls = []
    torch.compile(lambda x: x + 1, backend=lambda graph, _: calls.append(graph) or graph.forward)(torch.ones(1))
    assert calls, "the compiler is left switched off"
