"""A merge averages what can be averaged, mixes statistics as populations are mixed, and refuses the rest by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from batchnorm.errors import (
    ArgumentTypeError,
    BatchNormError,
    InputError,
    NonFiniteError,
    ShapeError,
    StateError,
    UnknownNameError,
)
from batchnorm.nn import BatchNorm1d as OurBatchNorm1d
from batchnorm.nn import freeze, is_frozen
from batchnorm.statistics import merge, recalibrate

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


def network(seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A network whose numbers all depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    model.append(nn.BatchNorm1d(4, affine=False))
    model(torch.zeros(2, 2, 5, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for norm in (model[1], model[5]):
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) * 3)
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.1)
            norm.num_batches_tracked.fill_(seed + 10)
    return model.to(dtype)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


class Holder(nn.Module):
    """Holds one buffer, and a norm so that there is something to merge."""

    def __init__(self, value: Tensor, *, persistent: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("held", value, persistent=persistent)


class Without(nn.Module):
    """Is as a Holder, and holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight


# -- the numbers -----------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
    offset=st.sampled_from([0.0, 1e3]),
)
def test_exact_moments_of_disjoint_sets_merge_into_those_of_their_union(
    sizes: list[int], seed: int, offset: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sets = [
        torch.randn(n, 3, dtype=torch.float64, generator=generator) * (k + 1) + k + offset for k, n in enumerate(sizes)
    ]
    models = [nn.Sequential(nn.BatchNorm1d(3)).double() for _ in sets]
    for model, x in zip(models, sets, strict=True):
        recalibrate(model, [x])
    union = torch.cat(sets)
    n = len(union)
    norm: Any = merge(models, sizes).model[0]
    # n · merged = (n − 1) · s² + Σ σ²_k, with s² and σ²_k unbiased: how one divisor becomes K of them
    expected = ((n - 1) * union.var(0) + torch.stack([x.var(0) for x in sets]).sum(0)) / n
    # each of the n deviations carries the rounding of its value, relative to which the variance is at least 1/20
    tolerance = 100 * n * EPS64 * max(offset, 1.0)
    torch.testing.assert_close(norm.running_mean, union.mean(0), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(norm.running_var, expected, rtol=tolerance, atol=tolerance)


def test_the_variance_between_the_models_is_part_of_it() -> None:
    one, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    one.running_mean, one.running_var = torch.tensor([-2.0, 5.0]), torch.tensor([1.0, 0.0])
    other.running_mean, other.running_var = torch.tensor([6.0, 5.0]), torch.tensor([3.0, 0.0])
    result = merge([one, other], [3, 1])
    assert result.model.running_mean.tolist() == [0, 5]
    assert result.model.running_var.tolist() == [1.5 + (3 * 4 + 36) / 4, 0]
    (layer,) = result.layers
    assert layer.within.tolist() == [1.5, 0]
    assert layer.between.tolist() == [12, 0]
    assert layer.between_share.tolist() == [12 / 13.5, 0]
    assert layer.distance.tolist() == [8 / (1.5 + 1e-5) ** 0.5, 0]


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=5),
    order=st.randoms(use_true_random=False),
    scale=st.sampled_from([1.0, 3.0, 1e-300, 1e300]),
)
def test_neither_the_order_nor_the_scale_of_the_weights_matters(weights: list[float], order: Any, scale: float) -> None:
    models = [network(k, torch.float64) for k in range(len(weights))]
    pairs = list(zip(models, weights, strict=True))
    order.shuffle(pairs)
    straight = merge(models, weights).model.state_dict()
    shuffled = merge([m for m, _ in pairs], [w * scale for _, w in pairs]).model.state_dict()
    for name, value in straight.items():
        # values of order 10, a few roundings for each model
        torch.testing.assert_close(shuffled[name], value, rtol=100 * EPS64, atol=1000 * EPS64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_model_with_all_the_weight_is_returned_bit_for_bit(dtype: torch.dtype) -> None:
    models = [network(k, dtype) for k in range(3)]
    with torch.no_grad():
        models[1][0].bias[0] = -0.0
    merged = merge(models, [0, 0.3, 0]).model
    for name, value in models[1].state_dict().items():
        assert torch.equal(merged.state_dict()[name], value)
    assert torch.signbit(merged[0].bias[0])


def test_equal_models_merge_into_themselves_bit_for_bit() -> None:
    models = [network(7) for _ in range(3)]
    assert bits(merge(models, [0.1, 0.2, 0.7]).model) == bits(models[0])


def test_parameters_are_averaged_in_double_precision() -> None:
    models = [network(k) for k in range(3)]
    weights = [0.5, 0.2, 0.3]
    merged = merge(models, weights).model
    for name, value in merged.named_parameters():
        exact = sum(w * dict(m.named_parameters())[name].double() for w, m in zip(weights, models, strict=True))
        torch.testing.assert_close(value.double(), exact, rtol=EPS32 / 2, atol=1e-12)  # one rounding, to float32


def test_without_weights_all_weigh_alike() -> None:
    models = [network(k) for k in range(4)]
    assert bits(merge(models).model) == bits(merge(models, [5, 5, 5, 5]).model)
    assert merge(models).weights == (0.25, 0.25, 0.25, 0.25)
    assert merge(models, torch.tensor([1.0, 1.0, 2.0, 4.0])).weights == (0.125, 0.125, 0.25, 0.5)
    assert merge(models, [1e308] * 4).weights == (0.25, 0.25, 0.25, 0.25)  # whose sum is no number


def test_half_precision_statistics_are_mixed_in_double_precision() -> None:
    models = [nn.BatchNorm1d(1).half() for _ in range(2)]
    models[0].running_mean.fill_(100)
    models[1].running_mean.fill_(-100)
    merged = merge(models).model
    assert merged.running_var.item() == torch.tensor(10001.0).half().item()
    assert merged.running_var.dtype == torch.float16
    models[0].running_mean.fill_(60000)
    models[1].running_mean.fill_(-60000)
    with pytest.raises(NonFiniteError, match=r"running_var reaches 3\.6e\+09, more than torch\.float16 can hold"):
        merge(models)


# -- what it makes of the rest ---------------------------------------------------------------------------------------


def test_the_models_are_untouched_and_the_result_is_of_the_first() -> None:
    models = [network(k) for k in range(2)]
    models[0][1].eval()
    models[0][0].weight.grad = torch.ones_like(models[0][0].weight)
    before = [bits(m) for m in models]
    merged = merge(models).model
    assert [bits(m) for m in models] == before
    assert models[0][0].weight.grad is not None
    assert type(merged) is nn.Sequential
    assert [m.training for m in merged.modules()] == [m.training for m in models[0].modules()]
    assert merged[0].weight.grad is None
    assert merged[0].weight.requires_grad


def test_counters_become_the_largest() -> None:
    models = [network(5), network(1), network(8)]
    assert merge(models).model[1].num_batches_tracked == 18
    assert merge(models, [1, 1, 0]).model[1].num_batches_tracked == 15


def test_averages_count_what_the_longest_counted() -> None:
    averages = [AveragedModel(network(k)) for k in range(3)]
    for k, average in enumerate(averages):
        for _ in range(k + 1):
            average.update_parameters(network(k))
    assert merge(averages).model.n_averaged == 3
    inside = [nn.Sequential(average) for average in averages]
    assert merge(inside, [1, 1, 0]).model[0].n_averaged == 2


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrapped_models_are_read_without_the_prefix(prefix: str) -> None:
    models = [network(k) for k in range(3)]
    expected = bits(merge(models).model)
    states = [{f"{prefix}{name}": value for name, value in m.state_dict().items()} for m in models]
    assert bits(merge(states, model=models[0]).model) == expected
    assert bits(merge([models[0], *states[1:]]).model) == expected
    wrapped = {"module.": nn.DataParallel, "_orig_mod.": torch.compile}.get(prefix)
    if wrapped is not None:
        assert bits(merge([models[0], *map(wrapped, models[1:])]).model) == expected  # type: ignore[arg-type]
        models[1][1].eps = 0.1
        with pytest.raises(StateError, match=r"1: eps is 0\.1 in models\[1\]"):
            merge([models[0], wrapped(models[1])])
    with pytest.raises(UnknownNameError, match=r"holds 'module\.0\.weight'"):  # one name without it: it is none
        merge([models[0], {"module.0.weight": torch.zeros(1), "x": torch.zeros(1)}])


def test_a_model_with_weight_zero_has_no_part() -> None:
    models = [network(k) for k in range(3)]
    without = bits(merge(models[:2]).model)
    with torch.no_grad():
        models[2][0].weight.fill_(torch.nan)
        models[2][1].running_var.fill_(-1)
    assert bits(merge(models, [1, 1, 0]).model) == without


def test_tied_parameters_stay_tied() -> None:
    models = [Tied(), Tied()]
    merged = merge(models).model
    assert merged.head.weight is merged.embed.weight
    expected = (models[0].embed.weight.double() + models[1].embed.weight.double()) / 2
    torch.testing.assert_close(merged.head.weight.double(), expected, rtol=EPS32 / 2, atol=1e-12)
    # a file may hold a tied tensor under one of its names
    states = [{"head.weight": m.head.weight.detach()} for m in models]
    assert torch.equal(merge(states, model=models[0]).model.embed.weight, merged.embed.weight)


def test_tied_parameters_with_two_values_are_refused() -> None:
    untied = Tied()
    untied.head.weight = nn.Parameter(untied.embed.weight.detach() + 1)
    with pytest.raises(StateError, match=r"embed\.weight and head\.weight are one tensor .* two values in models\[1\]"):
        merge([Tied(), untied])
    assert merge([untied, Tied()]).model.head.weight is not None


def test_a_mask_of_infinities_is_kept() -> None:
    mask = torch.tensor([0.0, -torch.inf])
    assert torch.equal(merge([Holder(mask), Holder(mask.clone())]).model.held, mask)
    with pytest.raises(NonFiniteError, match=r"models\[0\]: held holds NaN or infinity in 1 of its 2 values"):
        merge([Holder(mask), Holder(torch.zeros(2))])


def test_other_buffers_are_averaged_or_must_agree() -> None:
    assert merge([Holder(torch.tensor([1.0])), Holder(torch.tensor([2.0]))], [3, 1]).model.held.item() == 1.25
    complex_ = merge([Holder(torch.tensor([1j])), Holder(torch.tensor([1.0 + 0j]))]).model.held
    assert complex_.item() == 0.5 + 0.5j
    assert merge([Holder(torch.tensor([3, 4]))] * 2).model.held.tolist() == [3, 4]
    with pytest.raises(StateError, match=r"held \(int64\) differs between models\[0\] and models\[1\]"):
        merge([Holder(torch.tensor([3, 4])), Holder(torch.tensor([3, 5]))])
    with pytest.raises(StateError, match=r"held \(bool\) differs"):
        merge([Holder(torch.tensor([True])), Holder(torch.tensor([False]))])


def test_frozen_norms_stay_frozen_and_are_mixed() -> None:
    models = [network(k) for k in range(2)]
    freeze(models[0])
    merged = merge(models).model
    assert is_frozen(merged[1])
    assert bits(merged) == bits(merge([network(0), network(1)]).model)


class Functional(nn.Module):
    """A norm that is a function, on buffers with a name of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("stem_running_mean", torch.zeros(2))
        self.register_buffer("stem_running_var", torch.ones(2))
        self.register_buffer("stem_num_batches_tracked", torch.tensor(0))
        self.register_buffer("other_running_mean", torch.zeros(2))  # has no variance beside it


@pytest.mark.parametrize(
    ("make", "prefix", "name"),
    [
        (lambda: OurBatchNorm1d(2), "", ""),
        (lambda: nn.SyncBatchNorm(2), "", ""),
        (lambda: nn.InstanceNorm1d(2, track_running_stats=True), "", ""),
        (Functional, "stem_", "stem"),
    ],
)
def test_every_kind_of_running_statistics_is_mixed(make: Callable[[], nn.Module], prefix: str, name: str) -> None:
    models = [make(), make()]
    getattr(models[0], f"{prefix}running_mean").fill_(2)
    getattr(models[0], f"{prefix}num_batches_tracked").fill_(9)
    result = merge(models)
    assert [layer.name for layer in result.layers] == [name]
    assert getattr(result.model, f"{prefix}running_mean").tolist() == [1, 1]
    assert getattr(result.model, f"{prefix}running_var").tolist() == [2, 2]
    assert getattr(result.model, f"{prefix}num_batches_tracked") == 9


def test_a_name_alone_makes_no_statistics_of_buffers_that_cannot_be() -> None:
    def make(value: float) -> nn.Module:
        module = nn.Module()
        module.register_buffer("running_mean", torch.full((2,), value))
        module.register_buffer("running_var", torch.full((3,), value))
        return module

    result = merge([make(0.0), make(2.0)])
    assert result.layers == ()
    assert result.model.running_var.tolist() == [1, 1, 1]


def test_a_shared_norm_is_mixed_once() -> None:
    def make(mean: float) -> nn.Sequential:
        norm = nn.BatchNorm1d(2)
        norm.running_mean.fill_(mean)
        return nn.Sequential(norm, nn.ReLU(), norm)

    result = merge([make(0), make(2)])
    assert len(result.layers) == 1
    assert result.model[0] is result.model[2]
    assert result.model[0].running_var.tolist() == [2, 2]


def test_scripted_models_merge() -> None:
    models = [network(k) for k in range(2)]
    scripted = [torch.jit.script(model) for model in models]
    before = [bits(model) for model in scripted]
    assert bits(merge(scripted).model) == bits(merge(models).model)
    assert [bits(model) for model in scripted] == before


def test_a_norm_without_statistics_has_none() -> None:
    result = merge([nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))] * 2)
    assert result.layers == ()
    assert "keeps no running statistics" in result.advice


# -- state dicts -----------------------------------------------------------------------------------------------------


def test_state_dicts_merge_as_the_models_they_are_of() -> None:
    models = [network(k) for k in range(3)]
    template = network(99)
    result = merge([m.state_dict() for m in models], [1, 2, 3], model=template)
    assert bits(result.model) == bits(merge(models, [1, 2, 3]).model)
    assert bits(template) == bits(network(99))
    mixed = merge([models[0], models[1].state_dict(), models[2]], [1, 2, 3])
    assert bits(mixed.model) == bits(result.model)


def test_state_dicts_do_not_hold_what_the_model_does_not_save() -> None:
    template = Holder(torch.tensor([4.0]), persistent=False)
    assert merge([template.state_dict()] * 2, model=template).model.held.item() == 4
    others = [Holder(torch.tensor([v]), persistent=False) for v in (1.0, 3.0)]
    assert merge(others, model=template).model.held.item() == 2
    with pytest.raises(UnknownNameError, match=r"models\[0\] has no 'held'"):
        merge([Without()], model=template)


# -- refusals --------------------------------------------------------------------------------------------------------


def changed(change: Callable[[Any], object]) -> nn.Module:
    model = network(1)
    with torch.no_grad():
        change(model)
    return model


def renamed() -> dict[str, Tensor]:
    state = dict(network(1).state_dict())
    state["1.runing_var"] = state.pop("1.running_var")
    return state


def without(key: str) -> dict[str, Tensor]:
    return {name: value for name, value in network(1).state_dict().items() if name != key}


@pytest.mark.parametrize(
    ("other", "error", "said"),
    [
        (
            lambda: changed(lambda m: setattr(m[1], "eps", 0.1)),
            StateError,
            r"1: eps is 0\.1 in models\[1\] and 1e-05 in",
        ),
        (lambda: changed(lambda m: setattr(m[5], "momentum", None)), StateError, r"5: momentum is None in models\[1\]"),
        (lambda: changed(lambda m: m[0].weight.fill_(torch.nan)), NonFiniteError, r"models\[1\]: 0\.weight holds NaN"),
        (
            lambda: changed(lambda m: m[1].running_mean.fill_(torch.inf)),
            NonFiniteError,
            r"1\.running_mean holds NaN or inf",
        ),
        (
            lambda: changed(lambda m: m[1].running_var.fill_(-24)),
            StateError,
            r"models\[1\]: 1\.running_var reaches -24",
        ),
        (lambda: network(1).double(), InputError, r"0\.weight is torch\.float64 in models\[1\] and torch\.float32 in"),
        (
            lambda: changed(lambda m: m.__setitem__(0, nn.Conv2d(2, 3, 1))),
            InputError,
            r"0\.weight has shape \(3, 2, 1, 1\)",
        ),
        (renamed, UnknownNameError, r"models\[1\] holds '1\.runing_var'.*did you mean '1\.running_var'\?"),
        (lambda: without("1.running_var"), UnknownNameError, r"models\[1\] has no '1\.running_var'"),
        (lambda: network(1)[:5], UnknownNameError, r"models\[1\] has no '5\.running_mean'"),
        (lambda: 3, ArgumentTypeError, r"models\[1\]: expected a module or a state dict; got int"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), StateError, r"0\.weight has no value yet"),
        (lambda: network(1).to("meta"), StateError, r"0\.weight is on the meta device"),
        (lambda: network(1).to("meta").state_dict(), StateError, r"0\.weight of models\[1\] is on the meta device"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(
    other: Callable[[], Any], error: type[BatchNormError], said: str
) -> None:
    first, second = network(0), other()
    before = bits(first)
    with pytest.raises(error, match=said):
        merge([first, second])
    assert bits(first) == before


def test_what_is_broken_in_every_model_is_refused_too() -> None:
    with pytest.raises(NonFiniteError, match=r"models\[0\]: 0\.bias holds NaN or infinity in 3 of its 3 values"):
        merge([changed(lambda m: m[0].bias.fill_(torch.inf)) for _ in range(2)])


@pytest.mark.parametrize(
    ("weights", "error", "said"),
    [
        ([1], ShapeError, "expected 2, one a model; got 1"),
        ([1, -1], ShapeError, r"weights\[1\] is -1; expected a finite number, 0 or more"),
        ([1, float("nan")], ShapeError, r"weights\[1\] is nan"),
        ([float("inf"), 1], ShapeError, r"weights\[0\] is inf"),
        ([0, 0], ShapeError, "all are 0"),
        (["a", "b"], ArgumentTypeError, "expected numbers"),
        (3, ArgumentTypeError, "expected numbers"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights: Any, error: type[BatchNormError], said: str) -> None:
    with pytest.raises(error, match=said):
        merge([network(0), network(1)], weights)


@pytest.mark.parametrize(
    ("models", "error", "said"),
    [
        (lambda: network(0), ArgumentTypeError, "got one Sequential"),
        (lambda: network(0).state_dict(), ArgumentTypeError, "got one OrderedDict"),
        (list, StateError, "no model to merge"),
        (lambda: None, ArgumentTypeError, "got one NoneType"),
        (lambda: [network(0).state_dict()], ArgumentTypeError, "Pass a model of the architecture too"),
    ],
)
def test_models_that_are_none_are_refused(models: Callable[[], Any], error: type[BatchNormError], said: str) -> None:
    with pytest.raises(error, match=said):
        merge(models())


def test_a_generator_of_models_will_do() -> None:
    assert bits(merge(network(k) for k in range(2)).model) == bits(merge([network(0), network(1)]).model)


# -- what it is for --------------------------------------------------------------------------------------------------


def test_recalibrating_the_merged_model_replaces_the_mixture() -> None:
    models = [network(k, torch.float64) for k in range(2)]
    x = torch.randn(64, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for model in models:
        recalibrate(model, [x])
    merged = merge(models).model
    met = merged[0](x).movedim(1, -1).flatten(0, -2)
    mixed = copy.deepcopy(merged[1])
    recalibrate(merged, [x])
    torch.testing.assert_close(merged[1].running_var, met.var(0), rtol=1e-12, atol=1e-12)
    # the mean of a linear layer's output is linear in its weights: averaging got it right, and the variance wrong
    torch.testing.assert_close(mixed.running_mean, met.mean(0), rtol=1e-12, atol=1e-12)
    assert (mixed.running_var / met.var(0)).max() > 1.5
