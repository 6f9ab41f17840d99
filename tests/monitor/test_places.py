"""Calls looked at by hooks alone: the same is seen, and whatever hooks cannot see brings operators back."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import batchnorm.nn
from batchnorm.monitor import WatchResult, watch
from batchnorm.monitor.places import LEARNED_ANEW, Traces


class Shared(nn.Module):
    """One ReLU for all, in place, and a residual."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(norm(3) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(75, 4), nn.ReLU(), nn.Linear(4, 4), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.relu(norm(conv(x)) + x)
        return self.head(x)


class Many(nn.Sequential):
    def __init__(self) -> None:
        kinds = [nn.ReLU6(), nn.Hardtanh(-2, 2), nn.Threshold(0, 0), nn.Hardsigmoid(), nn.Tanh(), nn.Identity()]
        layers = [layer for kind in kinds for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), kind)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(75, 5), nn.BatchNorm1d(5), nn.Tanh())


class Functional(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x) - 0.5)


class Branches(nn.Module):
    """Takes another way where the flag is set."""

    def __init__(self, there: Callable[["Branches", Tensor], Tensor]) -> None:
        super().__init__()
        self.flag, self.there = False, there
        self.first, self.second, self.third = (nn.BatchNorm2d(3) for _ in range(3))
        self.relu, self.sigmoid = nn.ReLU(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        if self.flag:
            x = self.there(self, x)
        return self.sigmoid(self.second(x))


def images(seed: int) -> Tensor:
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) + 0.3


def ready(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.num_batches_tracked += 1
    return model.eval()


def shown(result: WatchResult) -> list[str]:
    """Return all that a result says, exactly."""
    layers = [
        (x.name, x.status, x.samples, x.nonfinite, x.distance, x.bound, x.shift.tolist(), x.variance_ratio.tolist())
        for x in result.layers
    ]
    return [repr(each) for each in (*layers, *result.saturation)]


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether the operators of each call of a model were met, at its end."""
    found: list[bool] = []
    learn = Traces.learn

    def noted(self: Traces, *args: object, **options: object) -> None:
        found.append(bool(_get_current_dispatch_mode_stack()))
        learn(self, *args, **options)

    monkeypatch.setattr(Traces, "learn", noted)
    yield found
    assert not _get_current_dispatch_mode_stack()


def seen(model: nn.Module, calls: int, before: Callable[[nn.Module, int], None] = lambda *_: None) -> list[str]:
    with watch(model) as w:
        for index in range(calls):
            before(model, index)
            model(images(index))
    return shown(w.result())


def same_by_operators(
    make: Callable[[], nn.Module],
    calls: int,
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[nn.Module, int], None] = lambda *_: None,
) -> None:
    torch.manual_seed(0)
    by_hooks = seen(make(), calls, before)
    monkeypatch.setattr(Traces, "expected", lambda *_: None)
    torch.manual_seed(0)
    assert by_hooks == seen(make(), calls, before)


@pytest.mark.every(4)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("make", [Shared, Many, lambda: Shared(batchnorm.nn.BatchNorm2d)])
def test_the_same_is_seen_without_operators(make, context, training, met, monkeypatch) -> None:
    with context():
        same_by_operators(lambda: ready(make()).train(training), 6, monkeypatch)
    assert met == [True, True, False, False, False, False] + 6 * [True]


def test_now_and_then_operators_are_met_again(met) -> None:
    seen(ready(Shared()), 2 * LEARNED_ANEW + 2)
    assert [index for index, operators in enumerate(met) if operators] == [0, 1, LEARNED_ANEW + 1, 2 * LEARNED_ANEW + 1]


class Cast(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2)


class Arithmetic(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return (input - self.running_mean[:, None, None]) / self.running_var[:, None, None].sqrt()


def hooked() -> nn.Module:
    model = Shared()
    model.norms[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return model


def by_method() -> nn.Module:
    model = Shared()
    model.relu.forward = lambda x: torch.relu(x * 2)
    return model


def scripted() -> nn.Module:
    model = Shared()
    model.norms[1] = torch.jit.script(model.norms[1])
    return model


@pytest.mark.parametrize(
    "make", [Functional, lambda: Shared(Cast), lambda: Shared(Arithmetic), hooked, by_method, scripted]
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_operators_are_met_in_all_calls_where_hooks_do_not_see_all(make, met, monkeypatch) -> None:
    same_by_operators(lambda: ready(make()), 4, monkeypatch)
    assert met == 8 * [True]


def set_flag(model: nn.Module, index: int) -> None:
    model.flag = index in (3, 5)


@pytest.mark.parametrize(
    "there",
    [
        lambda m, x: m.third(x),
        lambda m, x: m.relu(x - 0.5),
        lambda m, x: m.relu(m.first(x)),
        lambda m, x: F.relu(m.third(x) - 0.5),
        lambda m, x: m.second(x),
    ],
    ids=["norm", "activation", "the same again", "a function after a module", "the one that comes next"],
)
def test_a_branch_of_modules_is_seen_when_it_is_taken_first(there, met, monkeypatch) -> None:
    same_by_operators(lambda: ready(Branches(there)), 7, monkeypatch, set_flag)
    assert met[:4] == [True, True, False, True]


def test_a_branch_that_leaves_modules_out() -> None:
    model = ready(Branches(lambda m, x: m.relu(m.third(x))))
    model.flag = True
    with watch(model) as w:
        for index in range(8):
            model.flag = index < 4
            model(images(index))
    samples = {layer.name: layer.samples for layer in w.result().layers}
    assert samples == {"first": 32, "second": 32, "third": 16}


def test_a_branch_of_functions_is_seen_some_calls_later_and_from_then_on(met) -> None:
    model = ready(Branches(lambda m, x: F.relu(x - 0.5)))
    with watch(model) as w:
        for index in range(2 * LEARNED_ANEW):
            model.flag = index >= 4
            model(images(index))
    functional = next(use for use in w.result().saturation if use.name == "")
    at = LEARNED_ANEW + 1  # the call in which it is met first
    assert functional.values == (2 * LEARNED_ANEW - at) * images(0).numel()
    assert met[at:] == (2 * LEARNED_ANEW - at) * [True]


def another_activation(model: nn.Module, index: int) -> None:
    if index == 3:
        model.head[2].__class__ = nn.Tanh


def no_activation(model: nn.Module, index: int) -> None:
    if index == 3:
        model.head[2] = nn.Identity()


def another_norm(model: nn.Module, index: int) -> None:
    if index == 3:
        model.norms[1].__class__ = Cast


def a_hook(model: nn.Module, index: int) -> None:
    if index == 3:
        model.norms[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def a_method(model: nn.Module, index: int) -> None:
    if index == 3:
        norm = model.norms[1]
        norm.forward = lambda x: type(norm).forward(norm, x * 2)


@pytest.mark.parametrize("change", [no_activation, another_norm, a_hook, a_method, another_activation])
def test_a_model_that_is_changed_while_it_is_watched(change, monkeypatch) -> None:
    same_by_operators(lambda: ready(Shared()), 6, monkeypatch, change)


def test_a_hook_of_all_modules_that_changes_what_norms_are_given(met) -> None:
    model = ready(nn.Sequential(nn.BatchNorm2d(3)))

    def doubled(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (args[0] * 2,) if isinstance(module, nn.BatchNorm2d) else None

    with torch.no_grad(), watch(model) as w:
        for _ in range(3):
            model(images(0))
        w.reset()
        handle = nn.modules.module.register_module_forward_pre_hook(doubled)
        try:
            model(images(0))
        finally:
            handle.remove()
    with torch.no_grad(), watch(model) as expected:
        model(images(0) * 2)
    assert met == [True, True, False, True, True]
    torch.testing.assert_close(w.result().layers[0].shift, expected.result().layers[0].shift)


def test_a_mask_that_is_given_later(monkeypatch) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask: Tensor | None = None
            self.bn = batchnorm.nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x, mask=self.mask)

    def set_mask(model: nn.Module, index: int) -> None:
        model.mask = (torch.arange(5) < 3).expand(4, 5, 5) if index == 4 else None

    same_by_operators(lambda: ready(Masked()), 6, monkeypatch, set_mask)


def test_calls_under_vmap_are_left_alone() -> None:
    model = ready(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))
    many = torch.randn(5, 8, 3, generator=torch.Generator().manual_seed(0))
    plain = torch.vmap(model)(many)
    with torch.no_grad(), watch(model) as w:
        for _ in range(3):
            assert torch.equal(torch.vmap(model)(many), plain)
            model(many[0])
    assert w.result().layers[0].samples == 24


def test_inputs_that_a_norm_refuses_do_not_count(met) -> None:
    model = ready(nn.Sequential(nn.Identity(), nn.BatchNorm2d(3)))
    with torch.no_grad(), watch(model) as w:
        for index in range(4):
            model(images(index))
        with pytest.raises(RuntimeError):
            model(torch.zeros(4, 5, 6, 6))
        model(images(4))
    assert met == [True, True, False, False, False]
    assert w.result().layers[0].samples == 20


def test_parts_of_a_model_have_ways_of_their_own(met) -> None:
    model = ready(Shared())
    features, results = torch.randn(4, 75, generator=torch.Generator().manual_seed(0)), []
    with torch.no_grad(), watch(model) as w:
        for index in range(4):
            results.append(model(images(index)))
            model.head(features)
    assert met == [True, True, True, True, False, False, False, False]
    assert {use.name: use.values for use in w.result().saturation}["head.2"] == 8 * 16


def test_threads_share_what_is_known(met) -> None:
    model = ready(Shared())
    batches = [images(index) for index in range(40)]
    with torch.no_grad(), watch(model) as w:
        model(batches[0])
        model(batches[1])
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda x: model(x), batches[2:]))
    assert sum(met) == 2 + 38 // LEARNED_ANEW
    with torch.no_grad(), watch(model) as one:
        for x in batches:
            model(x)
    for a, b in zip(w.result().layers, one.result().layers, strict=True):
        torch.testing.assert_close(a.shift, b.shift)
    assert w.result().saturation == one.result().saturation


def test_an_error_on_another_way_leaves_nothing_on(met) -> None:
    def there(model: Branches, x: Tensor) -> Tensor:
        model.third(x)
        raise ValueError("on the way")

    model = ready(Branches(there))
    with watch(model) as w:
        for index in range(6):
            model.flag = index == 3
            if model.flag:
                with pytest.raises(ValueError, match="on the way"):
                    model(images(index))
            else:
                model(images(index))
            assert not _get_current_dispatch_mode_stack()
    assert met == [True, True, False, False, False]
    assert w.result().layers[0].samples == 24
