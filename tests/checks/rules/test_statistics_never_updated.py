from __future__ import annotations

import torch
from torch import nn

from batchnorm.checks import Finding, check
from batchnorm.placement.place import place

X = torch.randn(4, 3, 6, 6)


def findings(model: nn.Module) -> list[Finding]:
    return check(model, X, select="BN006").findings


def net(**options: float) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU(), nn.BatchNorm2d(4, **options))


def train(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 6, 6))
    return model


def test_one_norm_is_named_and_all_of_them_are_one_finding() -> None:
    model = train(net()).eval()
    assert findings(model) == []
    model[3].reset_running_stats()
    (finding,) = findings(model)
    assert finding.layer == "3"
    assert "count 0 batches" in finding.message
    (finding,) = findings(net().eval())
    assert finding.layer == ""
    assert "None of its 2 norms" in finding.message


def test_norms_that_use_the_batch_are_not_meant() -> None:
    assert findings(net()) == []
    model = net()
    model[1].eval()  # in a model in training mode, but it does use its running statistics
    assert [f.layer for f in findings(model)] == ["1"]


def test_statistics_that_cannot_move_are_found_by_their_values() -> None:
    (finding,) = findings(train(net(momentum=0.0)).eval())
    assert "momentum is 0" in finding.message


def test_converted_weights_without_a_count_are_fine() -> None:
    model = train(net()).eval()
    for norm in (model[1], model[3]):
        norm.num_batches_tracked.zero_()
    assert findings(model) == []


def test_placed_norms_count_as_not_measured_until_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 1), nn.Tanh(), nn.Conv2d(1, 1, 1))
    placed = place(model, X).model.eval()
    assert [f.layer for f in findings(placed)] == [""]
    assert findings(train(placed).eval()) == []
    placed[0].norm.reset_running_stats()
    assert [f.layer for f in findings(placed)] == ["0.norm"]


def test_there_is_no_fix_but_a_way() -> None:
    (finding,) = findings(net().eval())
    assert finding.fix is None
    assert "batchnorm.recalibrate(model, batches)" in finding.advice
