"""Classes exchanged, all or none; the verbs that do it are tested in tests/fusion/test_convert.py."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from torch import nn

from batchnorm.nn import BatchNorm1d, BatchNorm2d
from batchnorm.nn.swap import OURS, TORCHS, class_name, swap


def test_there_and_back():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm2d(2)), nn.SyncBatchNorm(2))
    norm = model[0]
    reason = (("2", "is SyncBatchNorm, which synchronizes processes"),)
    assert swap(model, OURS) == (("0", "1.0"), reason)
    assert model[0] is norm
    assert type(norm) is BatchNorm1d
    assert norm.layer_name == "0"
    norm.fused = True
    assert swap(model, TORCHS) == (("0", "1.0"), reason)
    assert type(norm) is nn.BatchNorm1d
    assert not {"fused", "layer_name", "activation"} & set(norm.__dict__)


def test_a_mark_of_somebody_elses_is_no_mark_of_ours():
    norm = nn.BatchNorm1d(2)
    norm.fused = "by hand"
    assert swap(norm, OURS)[0] == ()


@pytest.mark.parametrize("fails", [True, False])
def test_all_norms_are_swapped_or_none(monkeypatch, fails):
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(3))
    made = BatchNorm2d._refusals

    def interrupted(self, batches):
        if fails and self.num_features == 3:
            raise KeyboardInterrupt
        return made(self, batches)

    monkeypatch.setattr(BatchNorm2d, "_refusals", interrupted)
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        swap(model, OURS)
    assert [type(norm) for norm in model] == [nn.BatchNorm2d if fails else BatchNorm2d] * 2
    assert all(("layer_name" in norm.__dict__) != fails for norm in model)


def test_class_names_say_the_package():
    assert class_name(nn.BatchNorm2d) == "torch.nn.BatchNorm2d"
    assert class_name(BatchNorm2d) == "batchnorm.nn.BatchNorm2d"
    assert class_name(type("Mine", (nn.BatchNorm2d,), {})) == f"{__name__}.Mine"
