"""Every verb's result, of a large model with long names: no broken word, one screen where all is well, a short repr."""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.cli.info import Info
from batchnorm.cli.unfold import Unfolded
from batchnorm.demo.result import DemoResult
from batchnorm.report import Document, HeatMap, Result, Table

SCREEN = 40
COUNT = 16
X = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(0))
BATCHES = list(X.split(4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 2, 1)
        self.bn2 = nn.BatchNorm2d(2)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn2(self.conv1(x)) + x)


class Net(nn.Module):
    """Norms called ``backbone.layer3.12.conv_block.bn2``, measured on the batches so that all is well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.ModuleDict({"conv_block": Block()}) for _ in range(COUNT)]
        self.backbone = nn.ModuleDict({"layer3": nn.ModuleList(blocks)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.backbone["layer3"]:
            x = block["conv_block"](x)
        return x


def measured() -> Net:
    net = Net()
    batchnorm.recalibrate(net, BATCHES)
    return net.eval()


def plain() -> nn.Module:
    """Return a model without norms, of layers called ``blocks_of_the_model.12.conv``."""
    blocks = [nn.Sequential(OrderedDict(conv=nn.Conv2d(2, 2, 1), act=nn.ReLU())) for _ in range(COUNT)]
    backbone = nn.Sequential(*blocks)
    return nn.Sequential(OrderedDict(blocks_of_the_model=backbone, head=nn.Conv2d(2, 2, 1)))


def watched(net: nn.Module, batches: list[Tensor]) -> Result:
    with batchnorm.watch(net) as watching, torch.no_grad():
        for batch in batches * 20:
            net(batch)
    return watching.result()


def broken() -> Net:
    net = measured()
    for norm in list(net.modules()):
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.fill_(100.0)
            norm.running_mean.fill_(50.0)
    return net


def unfolded() -> Result:
    names = list(dict(Net().named_modules()))
    norms = [name for name in names if name.endswith("bn2")]
    parameters = [f"{name}.weight" for name in names if name.endswith("conv1")]
    return Unfolded("Net", [(name, "BatchNorm2d") for name in norms], parameters, [])


@cache
def fixed() -> Any:
    """Return what the fixes made of the model; they take their time, since each is tried by itself."""
    return batchnorm.check(Net(), X).fix()


HEALTHY: dict[str, Callable[[], Result]] = {
    "recalibrate": lambda: batchnorm.recalibrate(Net(), BATCHES),
    "diagnose": lambda: batchnorm.diagnose(measured(), BATCHES, lambda y, batch: y.square().mean()),
    "watch": lambda: watched(measured(), BATCHES),
    "fold": lambda: batchnorm.fold(measured(), X),
    "convert": lambda: batchnorm.convert(Net()),
    "revert": lambda: batchnorm.revert(batchnorm.convert(Net()).model),
    "fuse": lambda: batchnorm.convert(measured(), X, fuse=True),
    "freeze": lambda: batchnorm.freeze(Net()),
    "unfreeze": lambda: batchnorm.unfreeze(Net()),
    "merge": lambda: batchnorm.merge([Net(), measured()]),
    "place": lambda: batchnorm.place(plain(), X),
    "check": lambda: batchnorm.check(fixed().model, X),
    "fix": fixed,
    "unfold": unfolded,
}
ILL: dict[str, Callable[[], Result]] = {
    "diagnose, ill": lambda: batchnorm.diagnose(broken(), BATCHES, lambda y, batch: y.square().mean()),
    "watch, drifted": lambda: watched(measured(), [batch + 3 for batch in BATCHES]),
    "check, with findings": lambda: batchnorm.check(Net(), X),
}
RESULTS = HEALTHY | ILL
_made: dict[str, Result] = {}


@pytest.fixture(params=RESULTS)
def result(request: pytest.FixtureRequest) -> Result:
    name = request.param
    if name not in _made:
        _made[name] = RESULTS[name]()
    return _made[name]


def tables(document: Document) -> list[Table]:
    return [block for section in document.sections for block in section.blocks if isinstance(block, Table)]


@pytest.mark.every(6)
@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_too_wide_and_no_name_or_header_is_broken(result: Result, width: int, verbose: bool) -> None:
    text = result.text(verbose=verbose, width=width)
    assert max(map(len, text.splitlines())) <= width
    words = set(re.findall(r"[^\s:,;()=\[\]\"']+", text))
    pieces = {word for word in words if word.startswith(("backbone", "_block", "conv_b"))}
    whole = re.compile(r"backbone(\.layer3(\.\d+(\.conv_block(\.\w+(\.\w+)?)?)?)?)?\.?")
    assert all(whole.fullmatch(piece) for piece in pieces), pieces
    if not verbose:
        return
    for table in tables(result.document()):
        told = {word for name in table.columns for word in re.findall(r"[^\s:,;()=\[\]]+", name)}
        assert told <= words, table.columns
        assert {row[0] for row in table.rows if isinstance(row[0], str) and "." in row[0]} <= words


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_result_fits_a_screen_and_verbose_has_more(name: str) -> None:
    made = _made.setdefault(name, HEALTHY[name]()) if name not in _made else _made[name]
    text = made.text(width=80)
    assert len(text.splitlines()) <= SCREEN, text
    assert len(made.text(verbose=True, width=80)) >= len(text)


@pytest.mark.parametrize("name", ["recalibrate", "diagnose", "watch", "fold", "convert", "freeze", "merge"])
def test_verbose_names_every_norm_and_the_short_form_counts_those_it_leaves_out(name: str) -> None:
    made = _made.setdefault(name, HEALTHY[name]()) if name not in _made else _made[name]
    norms = {f"backbone.layer3.{i}.conv_block.bn2" for i in range(COUNT)}
    assert norms <= set(made.text(verbose=True, width=80).split())
    short = made.text(width=80)
    assert not norms <= set(short.split())
    assert "text(verbose=True) shows all." in short or f"one of {COUNT} alike" in short


def test_the_repr_is_one_line(result: Result) -> None:
    text = repr(result)
    assert text == f"<{type(result).__name__}: {result.summary}>"
    assert "\n" not in text
    assert 0 < len(result.summary) < 400


def test_a_notebook_shows_it(result: Result) -> None:
    html = result._repr_html_()
    assert html.count("<div") == html.count("</div>")
    assert html.lstrip().startswith("<div")
    for word in ("<html", "<body", "<script", "http"):
        assert word not in html
    assert len(html) < 40_000


def test_every_kind_of_result_has_the_one_repr() -> None:
    def kinds(base: type) -> set[type]:
        found = set(base.__subclasses__())
        return found.union(*map(kinds, found))

    ours = {kind for kind in kinds(Result) if kind.__module__.startswith("batchnorm.")}
    assert {DemoResult, Info, Unfolded} <= ours
    for kind in ours:
        assert kind.__repr__ is Result.__repr__, kind


def test_texts_of_a_model_are_harmless_in_a_notebook_and_in_the_repr() -> None:
    @dataclasses.dataclass(repr=False)
    class Forged(Result):
        name: str

        def document(self) -> Document:
            return Document("t", f"of {self.name}", [])

        def to_dict(self) -> dict[str, Any]:
            return {}

    forged = Forged("<script>alert(1)</script>\x1b[2J\n")
    assert repr(forged) == "<Forged: of <script>alert(1)</script>\\x1b[2J\\n>"
    html = forged._repr_html_()
    assert "<script" not in html
    assert "\x1b" not in html
    assert "&lt;script&gt;" in html


def test_a_map_in_the_whole_form_fits_too() -> None:
    rows = [(f"backbone.layer3.{i}.conv_block.bn2", [0.0] * 100) for i in range(3)]
    made = Document("t", "", [batchnorm.report.Section("", [HeatMap("m", rows, 1.0)])])
    text = batchnorm.report.text.to_text(made, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert {name for name, _ in rows} <= set(text.split())
