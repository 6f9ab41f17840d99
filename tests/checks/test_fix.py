from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tests.checks.flows import TwoWays
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.checks import Finding, check, fix
from batchnorm.checks.rules.bias_before_norm import BiasBeforeNorm
from batchnorm.errors import StateError

X = torch.randn(8, 3, 8, 8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid()),
        *(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6)),
    )
    for module in model:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def test_safe_fixes_keep_the_output_in_both_modes() -> None:
    model = net()
    fixed = check(model, X).fix()
    assert [f.layer for f in fixed.applied] == ["0", "3", "7"]
    assert (fixed.left, fixed.notes) == ([], [])
    assert fixed.dropped == ["0.bias", "3.bias", "7.bias"]
    assert fixed.error is not None
    assert fixed.bound is not None
    assert fixed.error <= fixed.bound
    for mode in (False, True):  # the training step last, for it changes the statistics
        model.train(mode)
        fixed.model.train(mode)
        with torch.no_grad():
            torch.testing.assert_close(fixed.model(X), model(X))


def test_statistics_go_on_in_step_after_a_training_step() -> None:
    model = net()
    fixed = check(model, X).fix().model
    for m in (model, fixed):
        m.train()(X)
    torch.testing.assert_close(fixed[1].running_mean + model[0].bias, model[1].running_mean)
    torch.testing.assert_close(fixed[1].running_var, model[1].running_var)


def test_the_original_is_untouched() -> None:
    model = net().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fixed = check(model, X).fix(unsafe=True)
    assert model[0].bias is not None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m.training for m in fixed.model.modules())


def test_unsafe_fixes_need_to_be_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
    safe = check(model, X).fix()
    assert safe.applied == []
    assert "unsafe=True" in safe.left[0].reason
    both = check(model, X).fix(unsafe=True)
    # the bias is redundant only once the norm stands behind the convolution
    assert [f.code for f in both.applied] == ["BN002", "BN001"]
    assert [type(m) for m in both.model] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert set(both.model.state_dict()) == set(model.state_dict()) - {"0.bias"}


def test_a_fix_in_a_renamed_place_is_reported_with_its_keys() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(8, 3)
    fixed = check(model, x).fix(unsafe=True)
    assert [f.code for f in fixed.applied] == ["BN001", "BN003"]
    assert fixed.renamed == {"3.weight": "3.linear.weight"}
    assert fixed.dropped == ["0.bias", "3.bias"]
    assert check(fixed.model, x).findings == []
    assert set(fixed.model.state_dict()) > {"3.linear.weight", "3.norm.running_mean"}


def test_a_fix_that_would_be_wrong_in_the_other_mode_is_not_applied() -> None:
    fixed = check(TwoWays(), X).fix()
    assert fixed.applied == []
    assert "in eval mode: the model runs other code" in fixed.left[0].reason
    assert fixed.model.conv.bias is not None


def test_one_bad_fix_does_not_keep_the_others_from_being_applied() -> None:
    class Reads(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            assert self[3].bias is not None
            return super().forward(x)

    fixed = check(Reads(*net()), X).fix()
    assert [f.layer for f in fixed.applied] == ["0", "7"]
    assert [entry.finding.layer for entry in fixed.left] == ["3"]
    assert "AssertionError" in fixed.left[0].reason


def test_a_fix_that_changes_the_output_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(copy: nn.Module) -> Any:
        changes = right(copy)
        copy[1].running_mean.add_(1e-4)
        return changes

    model = net().eval()
    (finding,) = [f for f in check(model, X).findings if f.layer == "0"]
    assert finding.fix is not None
    right = finding.fix.apply
    bad = Finding(**{**vars(finding), "fix": type(finding.fix)("", True, wrong, finding.fix.proof)})
    monkeypatch.setattr(BiasBeforeNorm, "find", lambda self, model, graph: iter([bad]))
    fixed = check(model, X).fix()
    assert fixed.applied == []
    assert "times the bound of its rounding" in fixed.left[0].reason
    assert fixed.model[0].bias is not None


def test_a_model_that_cannot_run_in_training_mode_is_fixed_with_a_note() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()).eval()
    fixed = check(model, torch.randn(1, 3), select="BN001").fix()
    assert [f.layer for f in fixed.applied] == ["0"]
    assert "Not verified in training mode" in fixed.notes[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, StateError])
def test_an_exception_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    model = net()
    result = check(model, X)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def stop(*args: Any) -> None:
        raise error

    monkeypatch.setattr(fix._Fixer, "_prove", stop)
    if issubclass(error, Exception):
        assert result.fix().applied == []
    else:
        with pytest.raises(error):
            result.fix()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(m.training for m in model.modules())


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    class Uncopyable(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot pickle")

    with pytest.raises(StateError, match="cannot be copied"):
        check(Uncopyable(*net()), X).fix()


def test_hooks_are_kept() -> None:
    model = net()
    shapes = []
    model[2].register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    fixed = check(model, X).fix()
    shapes.clear()
    fixed.model(X)
    assert shapes == [torch.Size((8, 4, 6, 6))]


def test_the_result_is_text_and_data() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    model.append(nn.Conv2d(4, 4, 3)).append(nn.BatchNorm2d(4))
    fixed = check(model, X).fix()
    data = json.loads(json.dumps(fixed.to_dict()))
    assert [entry["code"] for entry in data["applied"]] == ["BN001"]
    assert data["left"][0]["reason"].startswith("Its fix is unsafe")
    assert data["dropped"] == ["3.bias"]
    assert "1 finding fixed, 1 left" in str(fixed)
    assert F.relu(fixed.model(X)).shape == (8, 4, 4, 4)
