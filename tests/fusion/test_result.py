"""A conversion as text and as plain data."""

from __future__ import annotations

import json

from tests.fusion.networks import Subclass, resnet
from torch import nn

from batchnorm.fusion.convert import convert, revert


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
