from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_the_tour_ends_with_a_report_and_its_figures(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    done = command("demo", "--steps", 5, "--output", "tour", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["html"] == "tour/report.html"
    assert found["steps"] == 5
    assert "<html" in (tmp_path / "tour" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "cifar"], "--dataset"),
        (["--steps", "0"], "--steps"),
        (["--dataset", "mnist", "--root", "nowhere"], "nowhere"),
        (["--output", "file"], "expected a folder"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert said in command("demo", "--json", *arguments).sentence
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"
