"""A freeze holds through everything that usually thaws one, and leaves no trace when taken back."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from batchnorm.errors import StateError, UnknownNameError
from batchnorm.nn import frozen as frozen_module
from batchnorm.nn.batch_norm import BatchNorm2d as OurBatchNorm2d
from batchnorm.nn.freeze import freeze, is_frozen, unfreeze


class NormAct(nn.BatchNorm2d):
    """A norm with an activation, as timm writes them: own forward, a submodule that drops out."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(super().forward(x)).relu()


NORMS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, OurBatchNorm2d, NormAct]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    for norm in (model[1], model[4]):
        with torch.no_grad():
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model


def exact_state(model: nn.Module) -> list[Any]:
    """Everything that a freeze may touch, in a form that compares exactly."""
    return [
        (
            name,
            type(m),
            sorted(vars(m)),
            m.training,
            [(k, id(p), p.requires_grad, id(p.grad)) for k, p in m.named_parameters(recurse=False)],
            [(k, id(b), b.tolist()) for k, b in m.named_buffers(recurse=False)],
        )
        for name, m in model.named_modules(remove_duplicate=False)
    ]


@pytest.mark.parametrize("cls", NORMS)
def test_a_frozen_norm_ignores_train_and_a_thawed_one_is_what_it_was(cls: type[nn.BatchNorm2d]) -> None:
    model = nn.Sequential(cls(3))
    before = exact_state(model)
    result = freeze(model)
    norm = model[0]
    for to_train in (model.train, norm.train, lambda: model.apply(lambda m: m.train())):
        to_train()
        assert is_frozen(norm)
        assert not norm.training
        assert model.training
    assert isinstance(norm, cls)
    assert type(norm).__name__ == f"Frozen{cls.__name__}"
    assert "frozen=statistics and affine" in repr(model)
    assert not norm.weight.requires_grad
    assert not norm.bias.requires_grad
    assert [layer.name for layer in result.layers] == ["0"]
    unfreeze(model)
    assert exact_state(model) == before
    assert not is_frozen(norm)


def test_frozen_statistics_do_not_move_in_training_and_parameters_do_not_learn() -> None:
    model = network()
    freeze(model, "1")
    frozen, free = model[1], model[4]
    held = {k: v.clone() for k, v in frozen.state_dict().items()}
    moving = free.running_mean.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(held[k], v) for k, v in frozen.state_dict().items())
    assert not torch.equal(moving, free.running_mean)


def test_a_waiting_gradient_is_not_applied_after_the_freeze_and_undo_returns_it() -> None:
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    weight, grad = model[1].weight.clone(), model[1].weight.grad
    result = freeze(model)
    optimizer.step()
    assert torch.equal(model[1].weight, weight)
    result.undo()
    assert model[1].weight.grad is grad


def test_frozen_output_is_the_eval_output() -> None:
    model = network()
    x = torch.randn(4, 3, 8, 8)
    expected = model.eval()(x)
    freeze(model)
    assert torch.equal(model.train()(x), expected)


def test_modes_reach_the_submodules_of_a_frozen_norm() -> None:
    model = nn.Sequential(NormAct(3))
    freeze(model)
    model.train()
    assert model[0].drop.training
    model.eval()
    assert not model[0].drop.training


@pytest.mark.parametrize("asked", [True, False])
def test_unfreezing_gives_the_mode_last_asked_for(asked: bool) -> None:
    model = network().train(not asked)
    freeze(model)
    model.train(asked)
    unfreeze(model)
    assert all(m.training == asked for m in model.modules())


def test_a_norm_frozen_by_hand_returns_to_its_own_mode() -> None:
    model = network().train()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    before = exact_state(model)
    freeze(model)
    unfreeze(model)
    assert exact_state(model) == before


def test_freezing_twice_changes_nothing_and_a_second_freeze_can_extend_the_first() -> None:
    model = network()
    before = exact_state(model)
    freeze(model, affine=False)
    once = exact_state(model)
    freeze(model, affine=False)
    assert exact_state(model) == once
    assert is_frozen(model[1])
    assert model[1].weight.requires_grad
    extension = freeze(model, stats=False)
    assert not model[1].weight.requires_grad
    assert is_frozen(model[1])
    extension.undo()
    assert exact_state(model) == once
    freeze(model)
    unfreeze(model)
    assert exact_state(model) == before


def test_affine_alone_leaves_the_statistics_free() -> None:
    model = network().train()
    freeze(model, stats=False)
    assert not is_frozen(model[1])
    assert model[1].training
    before = model[1].running_mean.clone()
    model(torch.randn(4, 3, 8, 8))
    assert not torch.equal(before, model[1].running_mean)
    assert not model[1].weight.requires_grad


def test_norms_without_parameters_freeze_too() -> None:
    norm = nn.BatchNorm2d(3, affine=False)
    freeze(norm)
    assert is_frozen(norm)
    assert [layer.name for layer in unfreeze(norm).layers] == [""]
    assert type(norm) is nn.BatchNorm2d


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    **{
        f"pickle{p}": lambda m, p=p: pickle.loads(pickle.dumps(m, protocol=p))
        for p in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("cls", [nn.BatchNorm2d, OurBatchNorm2d, NormAct, nn.SyncBatchNorm])
def test_copies_are_frozen_and_thaw_by_themselves(cls: type[nn.Module], how: str) -> None:
    norm = cls(3)
    freeze(norm)
    twin = COPIES[how](norm)
    twin.train()
    assert is_frozen(twin)
    assert not twin.training
    assert type(twin) is type(norm)
    assert twin.state_dict().keys() == norm.state_dict().keys()
    unfreeze(twin)
    assert type(twin) is cls
    assert is_frozen(norm)


def test_a_saved_model_is_frozen_when_loaded_where_nothing_was_frozen_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    freeze(model)
    file = io.BytesIO()
    torch.save(model, file)
    expected = model.state_dict()
    monkeypatch.setattr(frozen_module, "_classes", WeakValueDictionary())
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False).train()
    assert is_frozen(loaded[1])
    assert not loaded[1].training
    assert all(torch.equal(expected[k], v) for k, v in loaded.state_dict().items())
    unfreeze(loaded)
    assert type(loaded[1]) is nn.BatchNorm2d
    assert loaded[1].weight.requires_grad


def test_state_dict_keys_are_unchanged_both_ways() -> None:
    plain, frozen = network(), network()
    freeze(frozen)
    assert list(plain.state_dict()) == list(frozen.state_dict())
    assert dict(plain.state_dict()._metadata) == dict(frozen.state_dict()._metadata)
    plain[1].running_mean.fill_(7)
    frozen.load_state_dict(plain.state_dict(), strict=True)
    assert frozen[1].running_mean.tolist() == [7] * 4
    plain.load_state_dict(frozen.state_dict(), strict=True)


def test_a_shared_norm_is_frozen_once_and_everywhere() -> None:
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(norm, nn.Linear(3, 3), norm)
    before = exact_state(model)
    assert len(freeze(model, "2").layers) == 1
    assert is_frozen(model[0])
    unfreeze(model)
    assert exact_state(model) == before


def test_a_parameter_shared_with_a_norm_that_learns_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    before = exact_state(model)
    with pytest.raises(StateError, match=r"0\.weight: cannot be frozen.*same parameter as 1\.weight, which learns"):
        freeze(model, "0")
    assert exact_state(model) == before
    freeze(model, "0", affine=False)
    unfreeze(model)
    freeze(model)
    with pytest.raises(StateError, match=r"1\.weight: cannot be unfrozen.*0\.weight, which stays frozen"):
        unfreeze(model, "1")
    assert is_frozen(model[1])
    unfreeze(model)
    assert exact_state(model) == before


def test_a_norm_without_statistics_is_refused_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    before = exact_state(model)
    with pytest.raises(StateError, match=r"^1: keeps no running statistics.*stats=False"):
        freeze(model)
    assert exact_state(model) == before
    freeze(model, stats=False)
    assert not model[1].weight.requires_grad


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        (nn.Linear(2, 2), {}, StateError, "Linear holds no batch norm"),
        (nn.BatchNorm1d(2), {"stats": False, "affine": False}, StateError, "nothing to freeze"),
        (nn.Sequential(nn.LazyBatchNorm1d()), {}, StateError, "0: a lazy norm"),
        (nn.Sequential(nn.BatchNorm1d(2)), {"names": "bn"}, UnknownNameError, "'bn': no norm of that name"),
    ],
)
def test_refusals_say_why(model: nn.Module, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        freeze(model, **options)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_parametrized_norms_are_refused_before_and_after() -> None:
    model = network()
    parametrize.register_parametrization(model[4], "weight", Doubled())
    with pytest.raises(StateError, match="4: is parametrized"):
        freeze(model)
    assert not is_frozen(model[1])
    parametrize.remove_parametrizations(model[4], "weight")
    freeze(model)
    parametrize.register_parametrization(model[4], "weight", Doubled())
    model.train()
    assert is_frozen(model[4])
    assert not model[4].training
    with pytest.raises(StateError, match="4: is parametrized"):
        unfreeze(model)
    assert is_frozen(model[1])
    parametrize.remove_parametrizations(model[4], "weight")
    unfreeze(model)
    assert type(model[4]) is nn.BatchNorm2d


def test_a_pruned_norm_freezes_what_its_weight_is_made_of() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    prune.l1_unstructured(model[0], "weight", amount=2)
    freeze(model)
    assert not model[0].weight_orig.requires_grad
    unfreeze(model)
    assert model[0].weight_orig.requires_grad


def test_undo_takes_back_each_verb_once() -> None:
    model = network()
    before = exact_state(model)
    first = freeze(model)
    frozen = exact_state(model)
    thaw = unfreeze(model)
    with pytest.raises(StateError, match="since this freeze"):
        first.undo()
    thaw.undo()
    assert exact_state(model) == frozen
    first.undo()
    assert exact_state(model) == before
    with pytest.raises(StateError, match="already taken back"):
        first.undo()


def test_undo_does_not_bring_old_gradients_back_to_norms_that_kept_learning() -> None:
    model = network().train()
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    result = freeze(model, affine=False)
    model.zero_grad()
    result.undo()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("at", range(4))
def test_an_interrupt_in_the_middle_leaves_the_model_as_it_was(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().train()
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    before = exact_state(model)
    steps = 0

    def interrupted(function: Any) -> Any:
        def step(*args: Any) -> None:
            nonlocal steps
            if steps == at:
                raise KeyboardInterrupt
            steps += 1
            function(*args)

        return step

    monkeypatch.setattr(frozen_module, "_set_learning", interrupted(frozen_module._set_learning))
    monkeypatch.setattr(frozen_module, "_dress", interrupted(frozen_module._dress))
    with pytest.raises(KeyboardInterrupt):
        freeze(model)
    assert steps == at
    assert exact_state(model) == before


def test_frozen_models_script_export_and_compile() -> None:
    model = network()
    x = torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    freeze(model)
    model.train()
    assert torch.equal(torch.jit.script(copy.deepcopy(model))(x), expected)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)


def test_threads_share_one_frozen_class() -> None:
    norms = [NormAct(2) for _ in range(16)]
    threads = [threading.Thread(target=freeze, args=(norm,)) for norm in norms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({type(norm) for norm in norms}) == 1


def test_the_result_prints_and_serializes() -> None:
    model = network()
    result = freeze(model, "1", affine=False)
    assert "1 of 2 norms frozen." in str(result)
    assert result.to_dict() == {
        "verb": "freeze",
        "total": 2,
        "layers": [{"name": "1", "kind": "BatchNorm2d", "statistics": True, "affine": False}],
    }
    assert "No norm was frozen." in str(unfreeze(model, "4"))


def test_no_names_at_all_is_not_no_norm() -> None:
    with pytest.raises(StateError, match="names is empty"):
        freeze(network(), [])


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, OurBatchNorm2d])
def test_torch_fx_keeps_a_frozen_norm_whole(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4))
    freeze(model)
    graph = torch.fx.symbolic_trace(model.train())
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(graph(x), model(x))


def test_a_container_is_frozen_if_all_its_norms_are() -> None:
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()), nn.BatchNorm1d(2), nn.Linear(2, 2))
    freeze(model, "0")
    assert [is_frozen(module) for module in (model, model[0], model[1], model[2])] == [False, True, False, False]
    freeze(model, "1", stats=False)
    assert not is_frozen(model)
    freeze(model)
    assert is_frozen(model)
    unfreeze(model, "0.0")
    assert not is_frozen(model)
