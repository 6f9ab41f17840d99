"""Findings in the format that code scanning tools exchange: SARIF 2.1.0 (OASIS, section numbers below)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from batchnorm.checks.rule import Finding, Rule

__all__ = ["sarif_log"]

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def sarif_log(
    findings: Sequence[Finding], rules: Sequence[type[Rule]], model: str, source: str | None
) -> dict[str, Any]:
    """Return a log with one run (3.13, 3.14).

    Args:
        findings: what was found.
        rules: the rules that ran, those without findings too.
        model: name of the model's class, the root of every layer's name.
        source: path or URI of the file that defines the model.
    """
    index = {rule.code: number for number, rule in enumerate(rules)}
    driver = {"name": "batchnorm", "version": _version(), "rules": [_descriptor(rule) for rule in rules]}
    results = [_result(finding, index[finding.code], model, source) for finding in findings]
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}


def _version() -> str:
    try:
        return version("batchnorm")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0"


def _descriptor(rule: type[Rule]) -> dict[str, Any]:
    """Return a reportingDescriptor (3.49)."""
    sections = rule.sections()
    words = "".join(part.capitalize() for part in rule.name.split("-"))
    return {
        "id": rule.code,
        "name": words,
        "shortDescription": {"text": rule.summary()},
        "fullDescription": {"text": _flowing(sections["What it does"])},
        "help": {"text": rule.page()},
        "defaultConfiguration": {"enabled": rule.by_default, "level": "warning"},
    }


def _plain(text: str) -> str:
    """Return a text without links and places for arguments, which a message has (3.11.5, 3.11.6)."""
    text = re.sub(r"\{(\d+)\}", r"{{\1}}", text)
    return re.sub(r"([\\\[\]])", r"\\\1", text) if "](" in text else text


def _flowing(text: str) -> str:
    return " ".join(text.split())


def _result(finding: Finding, rule_index: int, model: str, source: str | None) -> dict[str, Any]:
    """Return a result (3.27); a layer has no line of its own, so its place is a logical location (3.33)."""
    name = f"{model}.{finding.layer}" if finding.layer else model
    location: dict[str, Any] = {
        "logicalLocations": [
            {"name": finding.layer.rpartition(".")[2] or model, "fullyQualifiedName": name, "kind": "member"}
        ]
    }
    if source is not None:
        location["physicalLocation"] = {
            "artifactLocation": {"uri": source if "://" in source else quote(PurePath(source).as_posix())}
        }
    properties: dict[str, Any] = {"advice": finding.advice}
    if finding.fix is not None:
        # a SARIF fix object replaces text in a file (3.55); ours rewrites a model
        properties["fix"] = {"description": finding.fix.description, "safe": finding.fix.safe}
    fingerprint = hashlib.sha256(f"{finding.code}\n{name}".encode()).hexdigest()
    return {
        "ruleId": finding.code,
        "ruleIndex": rule_index,
        "level": "warning",
        "message": {"text": _plain(f"{finding.layer or model}: {finding.message}")},
        "locations": [location],
        "partialFingerprints": {"layer/v1": fingerprint},
        "properties": properties,
    }
