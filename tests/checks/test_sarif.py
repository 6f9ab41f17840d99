from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

from batchnorm.checks import RULES, check


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


TEXT = {"type": "string", "minLength": 1}
MESSAGE = closed(["text"], text=TEXT)
BAG = {"type": "object"}
LEVEL = {"enum": ["none", "note", "warning", "error"]}
DESCRIPTOR = closed(
    ["id"],
    id=TEXT,
    name=TEXT,
    shortDescription=MESSAGE,
    fullDescription=MESSAGE,
    help=MESSAGE,
    defaultConfiguration=closed([], enabled={"type": "boolean"}, level=LEVEL),
)
LOCATION = closed(
    [],
    logicalLocations={
        "type": "array",
        "uniqueItems": True,
        "items": closed([], name=TEXT, fullyQualifiedName=TEXT, kind=TEXT),
    },
    physicalLocation=closed(
        ["artifactLocation"], artifactLocation=closed([], uri={"type": "string", "format": "uri-reference"})
    ),
)
RESULT = closed(
    ["message"],
    ruleId=TEXT,
    ruleIndex={"type": "integer", "minimum": -1},
    level=LEVEL,
    message=MESSAGE,
    locations={"type": "array", "items": LOCATION},
    partialFingerprints={"type": "object", "additionalProperties": {"type": "string"}},
    properties=BAG,
)
DRIVER = closed(["name"], name=TEXT, version=TEXT, rules={"type": "array", "uniqueItems": True, "items": DESCRIPTOR})
RUN = closed(["tool"], tool=closed(["driver"], driver=DRIVER), results={"type": ["array", "null"], "items": RESULT})
# The part of the standard's schema that we write, names and types as there; what it closes is closed here.
SCHEMA = closed(
    ["version", "runs"],
    **{"$schema": {"type": "string", "format": "uri"}},
    version={"enum": ["2.1.0"]},
    runs={"type": "array", "items": RUN},
)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.BatchNorm2d(4)).eval()


@pytest.mark.parametrize("source", [None, "models/my net.py", "https://example.com/net.py"])
def test_the_log_is_as_the_standard_wants_it(source: str | None) -> None:
    log = check(model(), torch.randn(2, 3, 8, 8)).to_sarif(source=source)
    jsonschema.validate(json.loads(json.dumps(log)), SCHEMA)
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == [rule.code for rule in RULES if rule.by_default]
    assert [result["ruleId"] for result in run["results"]] == ["BN001", "BN006", "BN004"]
    assert all(rules[result["ruleIndex"]]["id"] == result["ruleId"] for result in run["results"])
    places = [result["locations"][0]["logicalLocations"][0]["fullyQualifiedName"] for result in run["results"]]
    assert places == ["Sequential.0", "Sequential", "Sequential.3"]
    assert len({result["partialFingerprints"]["layer/v1"] for result in run["results"]}) == 3


@pytest.mark.parametrize(
    ("source", "uri"),
    [("models/my net.py", "models/my%20net.py"), ("https://example.com/net.py", "https://example.com/net.py")],
)
def test_the_source_is_a_uri(source: str, uri: str) -> None:
    log = check(model(), torch.randn(2, 3, 8, 8)).to_sarif(source=source)
    for result in log["runs"][0]["results"]:
        assert result["locations"][0]["physicalLocation"] == {"artifactLocation": {"uri": uri}}


def test_a_clean_model_gives_a_log_without_results() -> None:
    log = check(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8), select="BN001").to_sarif()
    jsonschema.validate(log, SCHEMA)
    assert log["runs"][0]["results"] == []
    assert len(log["runs"][0]["tool"]["driver"]["rules"]) == 1


def test_a_rule_that_is_off_by_default_is_said_to_be() -> None:
    log = check(model(), torch.randn(2, 3, 8, 8), select=["BN", "BN015"]).to_sarif()
    jsonschema.validate(json.loads(json.dumps(log)), SCHEMA)
    rules = log["runs"][0]["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules if not rule["defaultConfiguration"]["enabled"]] == ["BN015"]
    assert len(rules) == len(RULES)
