"""Names of layers, classes and arrays do nothing: in no command, not in its errors, and on no page."""

from __future__ import annotations

import json
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batchnorm.cli.load import load_model

TITLE, CLEAR, END_OF_LINE, TURNED, UNSEEN, C1 = (
    "\x1b]0;OWNED\x07",
    "\x1b[2J",
    "\nerror: forged",
    "\u202e",
    "\u200b",
    "\x9b31m",
)
MARKUP = "[red][link=http://evil]x[/link]:bomb:](http://evil) {0}"
TAGS = "--><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&lt;]]></title></svg>"
NAME = TITLE + CLEAR + END_OF_LINE + TURNED + UNSEEN + C1 + "\u2028" + MARKUP + TAGS
FILE_NAME = (TITLE + CLEAR + END_OF_LINE + TURNED + MARKUP + TAGS).replace("/", "|")

NET = f"""
import torch
from torch import nn

NAME = {NAME!r}


class Block(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.add_module("conv" + NAME, nn.Conv2d(3 if first else 6, 6, 3, padding=1))
        self.add_module("bn" + NAME, nn.BatchNorm2d(6))

    def forward(self, x):
        conv, bn = self.children()
        return bn(conv(x).relu() if self.broken else conv(x))

    broken = False


Block.__name__ = Block.__qualname__ = "Block" + NAME.replace(".", "_")


def build():
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module(NAME, Block(True))
    net.add_module("second" + NAME, Block(False))
    net.add_module("end", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)))
    net.train()
    with torch.no_grad():
        for batch in batches():
            net(batch)
    net[1].broken = True
    return net


def plain():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 12, 12, generator=generator) for _ in range(4)]


def failing():
    yield batches()[0]
    raise ValueError(NAME)


def raising():
    raise ValueError(NAME)
"""


def harmful(text: str) -> set[str]:
    return {c for c in text if c != "\n" and unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}


class Page(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.images: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.images += [value or "" for name, value in attrs if name in ("src", "href")]

    handle_startendtag = handle_starttag


COMMANDS = {
    "check": ["check", "-m", "net:build", "-i", "2,3,12,12", "--html", "p.html"],
    "fix": ["check", "-m", "net:build", "-i", "2,3,12,12", "--fix", "-o", "f.pt", "--html", "p.html"],
    "diagnose": ["diagnose", "-m", "net:build", "-d", "net:batches", "--html", "p.html"],
    "recalibrate": ["recalibrate", "-m", "net:build", "-d", "net:batches", "--html", "p.html",
                    "--population", "q.safetensors"],
    "merge": ["merge", "-m", "net:build", "-w", "w.pt", "-w", "w2.pt", "--html", "p.html"],
    "fold": ["fold", "-m", "net:build", "-i", "2,3,12,12", "-o", "o.pt", "--pairs", "p.safetensors",
             "--html", "p.html"],
    "watch": ["watch", "-m", "net:build", "-d", "net:batches", "--html", "p.html"],
}  # fmt: skip


@pytest.fixture
def hostile(here: Path) -> Path:
    (here / "net.py").write_text(NET, encoding="utf-8")
    state = load_model("net:build").state_dict()
    torch.save(state, here / "w.pt")
    torch.save({name: value + 1 for name, value in state.items()}, here / "w2.pt")
    return here


@pytest.mark.every(3)
@pytest.mark.parametrize("name", COMMANDS)
def test_names_of_layers_and_classes_do_nothing(name: str, hostile: Path, command: Any) -> None:
    ran = command(*COMMANDS[name])
    assert ran.code in (0, 1), ran.err
    look_at_text(ran)
    look_at_page(hostile / "p.html")
    as_data = command(*COMMANDS[name], "--json")
    assert not harmful(as_data.out)
    assert json.loads(as_data.out)
    if name == "fold":
        back = command("unfold", "-m", "net:build", "-w", "o.pt", "--pairs", "p.safetensors", "--html", "p.html")
        assert back.code == 0, back.err
        look_at_text(back)
        look_at_page(hostile / "p.html")


def look_at_text(ran: Any) -> None:
    assert not harmful(ran.out + ran.err)
    assert "OWNED" in ran.out + ran.err  # the name is there, and does nothing
    assert not any(line.startswith("error: forged") for line in (ran.out + ran.err).splitlines())
    shown = "".join((ran.out + ran.err).split())
    assert "[red]" in shown  # no markup was taken out
    assert "\U0001f4a3" not in shown


def look_at_page(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "OWNED" in text
    assert not harmful(text.replace("\t", ""))
    page = Page(text)
    assert not page.tags & {"script", "iframe", "object", "embed", "a", "link1"}
    assert not {a for a in page.attributes if a.startswith("on")}
    assert all(image.startswith(("data:", "#")) for image in page.images)


def test_findings_for_other_tools_hold_no_links(hostile: Path, command: Any) -> None:
    ran = command("check", "-m", "net:build", "-i", "2,3,12,12", "--format", "sarif")
    results = json.loads(ran.out)["runs"][0]["results"]
    assert results
    assert not harmful(ran.out)
    for result in results:
        assert "{{0}}" in result["message"]["text"]
        assert "\\](http://evil" in result["message"]["text"]


ERRORS = [
    ["watch", "-m", "net:build", "-d", "net:failing"],
    ["watch", "-m", "net:raising", "-d", "net:batches"],
    ["watch", "-m", "net:plain", "-w", "w.pt", "-d", "net:batches"],
    ["recalibrate", "-m", "net:build", "-d", "net:batches", "--names", f"no {NAME}"],
    ["fold", "-m", "net:build", "-i", NAME],
    ["check", "-m", NAME, "-i", "1"],
    ["check", "-m", f"net:{NAME}", "-i", "1"],
    ["watch", "-m", "net:plain", "-d", NAME],
    ["watch", "-m", "net:plain", "-d", f"{NAME}.npz"],
    ["watch", "-m", "net:plain", "-w", f"{NAME}.pt", "-d", "net:batches"],
    ["fold", "-m", f"{NAME}.pt2"],
    ["watch", f"--{NAME}"],
    ["watch", "-m", "net:plain", "-d", "strings.npz"],
    ["watch", "-m", "net:plain", "-d", "net:batches", "-w", "dtype.safetensors"],
    ["watch", "-m", "net:plain", "-d", "net:batches", "-w", "names.safetensors"],
    ["unfold", "-m", "net:plain", "-w", "w.pt", "--pairs", "dtype.safetensors"],
    ["fold", "-m", "net:plain", "-i", "1,3,9,9", "-o", f"{FILE_NAME}|x.onnx"],
]


@pytest.mark.every(6)
@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("words", ERRORS, ids=range(len(ERRORS)))
def test_nor_do_they_in_errors(words: list[str], debug: bool, hostile: Path, command: Any) -> None:
    write_hostile_files(hostile)
    ran = command(*words, *(["--debug"] if debug else []))
    assert ran.code == 2, ran.out
    assert not harmful(ran.err)
    assert ran.out == ""
    told = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(told) == (1 if not debug else len(told))
    assert not any(line.startswith("error: forged") for line in told) or debug
    assert "OWNED" in ran.err


def write_hostile_files(folder: Path) -> None:
    np.savez(folder / "strings.npz", **{FILE_NAME: np.array(["a", "b"])})

    def safetensors(name: str, header: Any) -> None:
        data = json.dumps(header).encode()
        (folder / name).write_bytes(len(data).to_bytes(8, "little") + data + bytes(8))

    safetensors("dtype.safetensors", {"x": {"dtype": NAME, "shape": [2], "data_offsets": [0, 8]}})
    safetensors("names.safetensors", {NAME: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})


def test_an_array_of_a_hostile_name_is_taken_and_told(hostile: Path, command: Any) -> None:
    arrays = {FILE_NAME: np.zeros((4, 3, 9, 9), np.float32), "other": np.zeros(2)}
    np.savez(hostile / "arrays.npz", **arrays)
    ran = command("watch", "-m", "net:plain", "-d", "arrays.npz")
    assert "OWNED" in ran.err
    assert not harmful(ran.out + ran.err)
    assert not any(line.startswith("error: forged") for line in ran.err.splitlines())
