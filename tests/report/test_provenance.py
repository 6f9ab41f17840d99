"""A page says where it comes from."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.cli import main
from batchnorm.report.provenance import Provenance, command, source
from batchnorm.report.result import Result

X = torch.zeros(6, 3, 4, 4)


def net() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU()).eval()
    model[1].running_mean.fill_(0.5)  # not as it was made: watch refuses those
    return model


def watched() -> Result:
    model = net()
    with batchnorm.watch(model) as watching:
        model(X)
    return watching.result()


MODEL = "Sequential, 12 parameters, 1 norm"
EXAMPLE = "example inputs float32 (6, 3, 4, 4)"
STREAM = "2 batches; the first batch float32 (3, 3, 4, 4)"
VERBS: dict[str, tuple[Callable[[], Result], str, str]] = {
    "recalibrate": (lambda: batchnorm.recalibrate(net(), X.split(3)), MODEL, STREAM),
    "diagnose": (
        lambda: batchnorm.diagnose(net(), list(X.split(3))),
        MODEL,
        "2 batches; 6 samples; the first batch float32 (3, 3, 4, 4)",
    ),
    "watch": (watched, MODEL, "6 samples"),
    "fold": (lambda: batchnorm.fold(net(), X), MODEL, EXAMPLE),
    "convert": (lambda: batchnorm.convert(net()), MODEL, ""),
    "revert": (lambda: batchnorm.revert(net()), MODEL, ""),
    "freeze": (lambda: batchnorm.freeze(net()), MODEL, ""),
    "unfreeze": (lambda: batchnorm.unfreeze(net()), MODEL, ""),
    "merge": (lambda: batchnorm.merge(model for model in (net(), net())), MODEL, ""),
    "check": (lambda: batchnorm.check(net(), X), MODEL, EXAMPLE),
    "check().fix": (lambda: batchnorm.check(net(), X).fix(), MODEL, ""),
    "place": (lambda: batchnorm.place(net()[::2], example_inputs=X), "Sequential, 8 parameters, 0 norms", EXAMPLE),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_it_ran_on(verb: str) -> None:
    make, model, data = VERBS[verb]
    before = datetime.now(timezone.utc)
    found = make().provenance
    assert before <= found.date <= datetime.now(timezone.utc)
    assert (found.call, found.model, found.data, found.device) == (f"batchnorm.{verb}", model, data, "cpu")


def test_the_model_is_told_as_it_was_before_it_was_changed() -> None:
    assert batchnorm.fold(net(), X, inplace=True).provenance.model == MODEL


def test_a_measured_fold_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    result = batchnorm.fold(net(), X)
    monkeypatch.setattr("batchnorm.folding.result.measure", lambda *_, **__: None)
    assert result.measure(X).provenance == result.provenance


def test_a_verb_within_a_verb_leaves_the_outer_one_its_batches() -> None:
    def batches():
        yield X[:2], torch.zeros(2, dtype=torch.int64)
        batchnorm.recalibrate(net(), [X])

    found = batchnorm.recalibrate(net(), batches()).provenance
    assert found.data == "1 batch; the first batch float32 (2, 3, 4, 4), int64 (2,)"


def test_wrong_arguments_are_told_in_pythons_words() -> None:
    with pytest.raises(TypeError, match=r"freeze\(\) got an unexpected keyword argument 'nmaes'"):
        batchnorm.freeze(net(), nmaes="1")  # type: ignore[call-arg]


def test_a_result_without_any_has_software_and_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    rows = dict(Provenance().rows())
    assert set(rows) == {"date", "software", "made by"}
    assert rows["date"] == "1970-01-02T00:00:00+00:00"
    assert f"batchnorm {batchnorm.__version__}, torch " in rows["software"]


@pytest.mark.parametrize("told", ["", "soon", "-", "9" * 40])
def test_an_epoch_that_is_none_is_none(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", told)
    date = datetime(2020, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    assert dict(Provenance(date=date).rows())["date"] == "2020-01-02T03:04:05+00:00"


def test_a_page_has_it_and_is_the_same_at_the_same_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    pages = [batchnorm.freeze(net()).to_html(tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]
    for words in (MODEL, "1970-01-01T00:00:00+00:00", "Python, batchnorm.freeze"):
        assert words in pages[0].decode()


def test_a_page_of_a_command_has_its_line_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("provenance_net.py").write_text("from torch import nn\ndef build(): return nn.Sequential(nn.BatchNorm2d(2))\n")
    torch.save(nn.Sequential(nn.BatchNorm2d(2)).state_dict(), "my <net>.pt")
    line = [
        "check",
        "-m",
        "provenance_net:build",
        "-w",
        "my <net>.pt",
        "-i",
        "4,2,3,3",
        "--html",
        "page.html",
        "--json",
    ]
    with pytest.raises(SystemExit):
        main(line)
    json.loads(capsys.readouterr().out)
    page = Path("page.html").read_text()
    rows = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert rows["model"] == "Sequential, 4 parameters, 1 norm from provenance_net:build"
    assert rows["weights"] == "my &lt;net&gt;.pt"
    assert rows["data"] == "random numbers, seed 0; example inputs float32 (4, 2, 3, 3)"
    written = shlex.join(["batchnorm", *line]).replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;")
    assert rows["made by"] == f"<code>{written}</code>"


def test_outside_of_a_command_sources_are_not_kept() -> None:
    source("data", "x.npz")
    with command("batchnorm merge"):
        source("weights", "a.pt")
        source("weights", "b.pt")
        source("weights", "a.pt")
        rows: Any = dict(Provenance(data="3 batches").rows())
    assert (rows["weights"], rows["data"], rows["made by"]) == ("a.pt, b.pt", "3 batches", "batchnorm merge")
    assert "weights" not in dict(Provenance().rows())
