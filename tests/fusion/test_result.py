"""A conversion as text and as plain data."""

from __future__ import annotations

import json

from tests.fusion.networks import Subclass, resnet
from torch import nn

from batchnorm.fusion.convert import convert, revert
from batchnorm.fusion.result import ConvertResult, FusedNorm
from batchnorm.report import Paragraph


def test_the_result_prints_and_is_plain_data():
    result = convert(nn.Sequential(nn.BatchNorm2d(2), Subclass(2)))
    text = str(result)
    assert "1 of 2 norms converted." in text
    assert "now batchnorm.nn.BatchNorm2d" in text
    assert "left as it is" in text
    assert json.loads(json.dumps(result.to_dict())) == {
        "verb": "convert",
        "converted": ["0"],
        "left": [{"name": "1", "reason": dict(result.left)["1"]}],
        "fused": [],
        "unfused": [],
    }
    assert "The model holds no batch norm." in str(convert(nn.Linear(2, 2)))
    assert repr(revert(result.model)) == "<ConvertResult: 1 of 2 norms reverted.>"


def test_what_was_fused_prints_and_is_plain_data():
    net = resnet()
    result = convert(net, net.x, fuse=True)
    assert repr(result) == "<ConvertResult: 5 of 5 norms converted, 4 fused.>"
    text = str(result)
    assert "Fused" in text
    assert "Not fused" in text
    data = json.loads(json.dumps(result.to_dict()))
    assert data["fused"][1] == {"norm": "0.bn2", "activation": "relu", "residual": True, "where": "0.act"}
    assert data["unfused"] == [
        {"name": "0.downsample.1", "reason": "Its output is added in place to another tensor, by add_ in 0."}
    ]


FUSED = (FusedNorm("bn1", "relu", False, "act"), FusedNorm("bn2", "silu", True, ""))


def test_a_fused_norm_is_a_line() -> None:
    assert [str(norm) for norm in FUSED] == ["bn1 → relu in act: fused.", "bn2 → add → silu in the model: fused."]


def test_norms_are_rows_and_those_that_are_gone_from_the_model_are_none() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Identity())
    result = ConvertResult(model, ("0", "1.bn"), (("x", "why"),), "revert")
    (section,) = result.document().sections
    (table,) = section.blocks
    assert list(table.rows) == [("0", "now torch.nn.BatchNorm1d", ""), ("x", "left as it is", "why")]
    assert result.summary == "2 of 3 norms reverted."


def test_fused_and_others_have_sections_of_their_own() -> None:
    result = ConvertResult(nn.Identity(), (), (), "convert", FUSED, (("bn3", "nothing follows it"),))
    assert result.summary == "0 of 0 norms converted, 2 fused."
    first, fused, unfused = result.document().sections
    assert first.blocks[0] == Paragraph("The model holds no batch norm.")
    assert list(fused.blocks[0].rows) == [("bn1", "", "relu", "act"), ("bn2", "added to", "silu", "")]
    assert list(unfused.blocks[0].rows) == [("bn3", "nothing follows it")]
    only = ConvertResult(nn.Identity(), (), (), "convert", (), (("bn3", "why"),))
    assert [section.title for section in only.document().sections] == ["", "Not fused"]
    assert only.summary == "0 of 0 norms converted, 0 fused."
    assert only.to_dict()["unfused"] == [{"name": "bn3", "reason": "why"}]
