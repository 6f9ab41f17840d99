from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from batchnorm.cli.load import load_model
from batchnorm.folding.fold import fold

SHAPE = "4,3,32,32"


def x(size: int = 4) -> torch.Tensor:
    return torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(9))


def test_the_program_it_writes_gives_the_outputs_of_the_original(
    command: Callable[..., Any], here: Path, weights: Path
) -> None:
    done = command("fold", "-m", "net:build", "-w", weights, "-i", SHAPE, "-o", "folded.pt2")
    assert done.code == 0
    assert "wrote folded.pt2." in done.err
    program = torch.export.load(here / "folded.pt2")
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    original = load_model("net:build", weights).eval()
    with torch.no_grad():
        for size in (1, 4, 7):
            torch.testing.assert_close(program.module()(x(size)), original(x(size)))


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["folded.safetensors", "folded.pt"])
def test_the_state_dict_it_writes_is_that_of_the_folded_model(
    command: Callable[..., Any], here: Path, weights: Path, name: str
) -> None:
    done = command("fold", "-m", "net:build", "-w", weights, "-d", "images.npz", "-o", name, "--json")
    assert json.loads(done.out)["output"] == name
    state = load_file(here / name) if name.endswith("safetensors") else torch.load(here / name, weights_only=True)
    original = load_model("net:build", weights).eval()
    folded = fold(load_model("net:build").eval(), x()).model
    folded.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(folded(x()), original(x()))


def test_the_report_names_every_norm(command: Callable[..., Any], here: Path) -> None:
    done = command("fold", "-m", "net:build", "-i", SHAPE, "--html", "fold.html")
    assert done.code == 0
    assert "bn2" in done.out
    assert "<html" in (here / "fold.html").read_text()
    assert sorted(p.name for p in here.iterdir()) == ["fold.html", "images.npz", "net.py"]


def test_a_page_is_not_left_behind_when_the_model_cannot_be_written(command: Callable[..., Any], here: Path) -> None:
    (here / "fold.html").write_text("old")
    (here / "odd.py").write_text(ODD)
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    done = command("fold", "-m", "odd:build", "-i", SHAPE, "--html", "fold.html", "-o", "folded.pt2")
    assert "torch.export cannot export Odd" in done.sentence
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


def test_a_norm_that_shrinks_a_channel_stays_if_the_range_is_kept(command: Callable[..., Any], here: Path) -> None:
    (here / "half.py").write_text(HALF)
    plain = json.loads(command("fold", "-m", "half:build", "-i", "2,3:float16", "--json").out)
    kept = json.loads(command("fold", "-m", "half:build", "-i", "2,3:float16", "--keep-range", "--json").out)
    assert [len(plain[key]) for key in ("folded", "left", "warnings")] == [1, 0, 1]
    assert [len(kept[key]) for key in ("folded", "left", "warnings")] == [0, 1, 0]


HALF = """
from torch import nn
def build():
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)).half()
    net[1].weight.data.fill_(1e-5)
    return net
"""


# what depends on values cannot be exported, though it runs
ODD = """
from torch import nn
class Odd(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if float(x.abs().sum()) > 0 else x
def build():
    return Odd(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
"""


LEFT = """
from torch import nn
def build():
    return nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))
"""


def test_strict_exits_with_1_when_a_norm_is_left(command: Callable[..., Any], here: Path) -> None:
    (here / "left.py").write_text(LEFT)
    done = command("fold", "-m", "left:build", "-i", SHAPE, "--json")
    assert done.code == 0
    assert len(json.loads(done.out)["left"]) == 1
    assert command("fold", "-m", "left:build", "-i", SHAPE, "--strict").code == 1
    assert command("fold", "-m", "net:build", "-i", SHAPE, "--strict").code == 0


def test_borders_lets_a_convolution_that_pads_absorb_a_norm_before_it(command: Callable[..., Any], here: Path) -> None:
    (here / "left.py").write_text(
        LEFT.replace("nn.ReLU(), nn.BatchNorm2d(3)", "nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3, 1, 1)")
    )
    torch.manual_seed(0)
    net = load_model("left:build")
    net[0].running_mean.normal_()
    torch.save(net.state_dict(), here / "left.pt")
    words = ["fold", "-m", "left:build", "-w", "left.pt", "-i", SHAPE, "--strict", "-o", "folded.pt2"]
    assert command(*words).code == 1
    done = command(*words, "--borders")
    assert done.code == 0
    assert "exactly the example's shape" not in done.err
    program = torch.export.load(here / "folded.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(x(7)), net.eval()(x(7)))


@pytest.mark.every(3)
@pytest.mark.parametrize(("mean", "std"), [("123.7,116.3,103.5", "58.4,57.1,57.4"), ("120", None), (None, "60")])
def test_the_folded_program_takes_raw_inputs(
    command: Callable[..., Any], here: Path, weights: Path, mean: str | None, std: str | None
) -> None:
    words = ["fold", "-m", "net:build", "-w", weights, "-i", SHAPE, "-o", "folded.pt2", "--json"]
    words += ["--input-mean", mean] if mean else []
    words += ["--input-std", std] if std else []
    done = command(*words)
    assert json.loads(done.out)["folded"][0]["norm"] == "input_normalization"
    columns = [
        torch.tensor([float(part) for part in (text or default).split(",")]).view(-1, 1, 1)
        for text, default in ((mean, "0"), (std, "1"))
    ]
    raw = x() * 50 + 120
    with torch.no_grad():
        want = load_model("net:build", weights).eval()((raw - columns[0]) / columns[1])
        torch.testing.assert_close(torch.export.load(here / "folded.pt2").module()(raw), want, rtol=1e-4, atol=1e-4)


def test_the_note_says_how_the_folded_weights_are_loaded(command: Callable[..., Any], here: Path) -> None:
    words = ["fold", "-m", "net:build", "-i", SHAPE, "-o"]
    assert "write --pairs PAIRS as well, and load it into batchnorm.refold" in command(*words, "folded.pt").err
    both = command(*words, "folded.pt", "--pairs", "pairs.safetensors").err
    assert "load it into batchnorm.refold(model, 'pairs.safetensors')" in both
    assert "wrote pairs.safetensors, from which batchnorm unfold gives the norms back." in both
    assert "refold" not in command(*words, "folded.pt2").err


def test_where_nothing_folds_there_are_no_pairs_and_that_is_told(command: Callable[..., Any], here: Path) -> None:
    (here / "left.py").write_text(LEFT)
    done = command("fold", "-m", "left:build", "-i", SHAPE, "-o", "same.pt", "--pairs", "pairs.safetensors", "--json")
    assert json.loads(done.out)["pairs"] is None
    assert "nothing was folded, so there is nothing to take back: pairs.safetensors was not written." in done.err
    assert (here / "same.pt").exists()
    assert not (here / "pairs.safetensors").exists()


def test_pairs_are_not_left_behind_when_the_model_cannot_be_written(command: Callable[..., Any], here: Path) -> None:
    (here / "odd.py").write_text(ODD)
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    words = ["fold", "-m", "odd:build", "-i", SHAPE, "--pairs", "pairs.safetensors", "-o", "folded.pt2"]
    assert "torch.export cannot export Odd" in command(*words).sentence
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


@pytest.mark.sweep
@pytest.mark.skipif(sys.platform == "win32", reason="there is no ulimit")
@pytest.mark.parametrize(
    ("option", "name"), [pytest.param("-o", "f.pt2", marks=pytest.mark.sweep), ("--pairs", "p.safetensors")]
)
def test_a_disk_that_is_full_is_one_sentence(here: Path, option: str, name: str) -> None:
    words = ["-m", "batchnorm", "fold", "-m", "net:build", "-i", SHAPE, option, name]
    limited = ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", sys.executable, *words]
    done = subprocess.run(limited, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --")
    assert "cannot be written" in done.stderr
    assert not [path for path in here.iterdir() if path.suffix in (".pt2", ".safetensors")]


def test_measure_adds_times_and_memory_where_something_was_folded(command: Callable[..., Any], here: Path) -> None:
    (here / "left.py").write_text(LEFT)
    done = command("fold", "-m", "net:build", "-i", SHAPE, "--measure", "--json")
    assert json.loads(done.out)["measured"]["before"]["median"] > 0
    assert done.err == ""
    assert json.loads(command("fold", "-m", "net:build", "-i", SHAPE, "--json").out)["measured"] is None
    assert json.loads(command("fold", "-m", "left:build", "-i", SHAPE, "--measure", "--json").out)["measured"] is None


def test_a_program_is_measured_on_the_inputs_that_it_holds(command: Callable[..., Any], here: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    torch.export.save(torch.export.export(net, (torch.randn(2, 3, 8, 8),)), here / "program.pt2")
    done = command("fold", "-m", "program.pt2", "--measure", "--json")
    assert json.loads(done.out)["measured"]["rounds"] >= 7


def test_what_the_users_code_prints_does_not_spoil_the_json(command: Callable[..., Any], here: Path) -> None:
    done = command("fold", "-m", "net:chatty", "-i", SHAPE, "--json")
    assert json.loads(done.out)["folded"]
    assert "building the network" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "nothing:build", "-i", SHAPE], "no module 'nothing'"),
        (["-m", "net:bild", "-i", SHAPE], "did you mean 'build'?"),
        (["-m", "net:broken", "-i", SHAPE], "raised ValueError: no such checkpoint"),
        (["-m", "net:wants", "-i", SHAPE], "it needs arguments (width, depth)"),
        (["-m", "net:number", "-i", SHAPE], "expected a torch.nn.Module"),
        (["-m", "net:build", "-w", "none.pt", "-i", SHAPE], "none.pt: no such file"),
        (["-m", "net:build", "-w", "net.py", "-i", SHAPE], "got .py"),
        (["-m", "net:build", "-w", "cut.pt", "-i", SHAPE], "it may be cut short"),
        (["-m", "net:build", "-w", "pickled.pt", "-i", SHAPE], "can run any code"),
        (["-m", "net:build", "-i", "4,three"], "expected sizes between commas"),
        (["-m", "net:build", "-i", "4,5,32,32"], "5"),
        (["-m", "net:build"], "--input or --data is needed"),
        (["-m", "net:build", "-i", SHAPE, "-d", "images.npz"], "give one of them"),
        (["-m", "net:build", "-d", "cut.npz"], "it may be cut short"),
        (["-m", "net:build", "-d", "net:empty"], "no batch in it"),
        (["-m", "net:build", "-i", SHAPE, "-o", "none/folded.pt"], "no directory none"),
        (["-m", "net:build", "-i", SHAPE, "-o", "folded.onnx"], "got .onnx"),
        (["-m", "net:build", "-i", SHAPE, "--html", "page.pdf"], "got .pdf"),
        (["-m", "net:build", "-i", SHAPE, "--pairs", "pairs.pt"], "--pairs pairs.pt: expected a name that ends in"),
        (["-m", "net:build", "-i", SHAPE, "-o", "a.safetensors", "--pairs", "./a.safetensors"], "that is --output"),
        (["-m", "net:build", "-i", SHAPE, "--input-mean", "a"], "--input-mean a: expected a number, or one for each"),
        (["-m", "net:build", "-i", SHAPE, "--input-mean", "1,2"], "--input-mean: expected one number, or 3"),
        (["-m", "net:build", "-i", SHAPE, "--input-std", "1,0,1"], "--input-std: expected positive numbers"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_no_file_changes(
    command: Callable[..., Any], here: Path, arguments: list[str], said: str
) -> None:
    torch.save(load_model("net:build").state_dict(), here / "whole.pt")
    torch.save(load_model("net:build"), here / "pickled.pt")
    (here / "cut.pt").write_bytes((here / "whole.pt").read_bytes()[:500])
    (here / "cut.npz").write_bytes((here / "images.npz").read_bytes()[:5000])
    (here / "folded.pt").write_bytes(b"old")
    before = {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}
    if "-o" not in arguments:
        arguments = [*arguments, "-o", "folded.pt"]
    assert said in command("fold", *arguments, "--json").sentence
    assert {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()} == before


def test_debug_shows_the_traceback_too(command: Callable[..., Any], here: Path) -> None:
    done = command("fold", "-m", "net:broken", "-i", SHAPE, "--debug")
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" in done.err
    assert 'raise ValueError("no such checkpoint' in done.err
    assert done.err.splitlines()[-1].startswith("error: --model net:broken")


def test_a_program_is_folded_into_a_program(command: Callable[..., Any], here: Path, weights: Path) -> None:
    net = load_model("net:build", weights).eval()
    program = torch.export.export(net, (x(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, here / "net.pt2")
    done = command("fold", "-m", "net.pt2", "-o", "folded.pt2", "--json", "--strict")
    assert done.code == 0
    assert [item["norm"] for item in json.loads(done.out)["folded"]] == ["bn", "bn2"]
    folded = torch.export.load(here / "folded.pt2")
    assert not any("batch_norm" in str(node.target) for node in folded.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(folded.module()(x(7)), net(x(7)))
    assert command("fold", "-m", "net.pt2", "-i", SHAPE, "-o", "folded.pt2").code == 0


@pytest.mark.parametrize(("words", "sentence"), [
    (["-m", "nowhere.pt2"], "--model nowhere.pt2: no such file"),
    (["-m", "broken.pt2"], "expected a program that torch.export.save wrote"),
    (["-m", "net.pt2", "-w", "w.pt"], "is a program, which has its weights"),
    (["-m", "net.pt2", "--pairs", "p.safetensors"], "the norms of a program are in the program"),
    (["-m", "net.pt2", "-o", "folded.pt"], "so is what is written: a .pt2 file"),
    (["-m", "net.pt2", "--fuse"], "fuse=True is for modules"),
])  # fmt: skip
def test_what_does_not_go_with_a_program(
    command: Callable[..., Any], here: Path, words: list[str], sentence: str
) -> None:
    torch.export.save(torch.export.export(load_model("net:build").eval(), (x(),)), here / "net.pt2")
    (here / "broken.pt2").write_bytes(b"no archive")
    done = command("fold", *words)
    assert done.code == 2
    assert sentence in done.sentence


def test_fuse_makes_multiply_adds_of_what_is_left(command: Callable[..., Any], here: Path) -> None:
    (here / "left.py").write_text(LEFT)
    words = ["fold", "-m", "left:build", "-i", SHAPE, "--json"]
    assert [item["becomes"] for item in json.loads(command(*words).out)["left"]] == [None]
    became = json.loads(command(*words, "--fuse").out)["left"][0]["becomes"]
    assert became.startswith("one multiply-add per channel")
    assert json.loads(command(*words, "--fuse", "--measure").out)["measured"]["rounds"] >= 7


WAYS = """
import torch
from torch import nn


class Ways(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x, raw=False):
        y = self.conv(x)
        if raw:
            return y
        return self.bn(y)


def build():
    model = Ways()
    model.bn.running_var.fill_(2.0)
    return model


def raw():
    return [{"x": torch.ones(1, 3, 8, 8), "raw": True}]
"""


def test_further_examples_are_those_of_python(command: Callable[..., Any], here: Path) -> None:
    """With the other way known, the norm is left: the convolution's output is an output there."""
    (here / "ways.py").write_text(WAYS)
    common = ("fold", "-m", "ways:build", "-i", "2,3,8,8", "--json")
    alone = json.loads(command(*common).out)
    both = json.loads(command(*common, "--example", "ways:raw", "-e", "1,3,5,7").out)
    model = load_model("ways:build").eval()
    first, raw = torch.randn(2, 3, 8, 8), {"x": torch.ones(1, 3, 8, 8), "raw": True}
    python = fold(model, first, examples=[raw, torch.randn(1, 3, 5, 7)]).to_dict()
    assert len(alone["folded"]) == 1
    assert any("raw" in warning for warning in alone["warnings"])
    assert both["left"] == python["left"]
    assert both["folded"] == python["folded"] == []
    assert both["sizes"] == python["sizes"]
    assert both["warnings"] == python["warnings"]


@pytest.mark.parametrize(("source", "said"), [
    ("none.npz", "--example none.npz: "), ("ways:no_such", "--example ways:no_such: "),
    ("1,3,8,8:int9", "--example 1,3,8,8:int9: no dtype"),
    ("0,3,8,8", "--example 0,3,8,8: every size must be 1 or more."),
    ("1,4,8,8", "examples[0]"),
])  # fmt: skip
def test_an_example_that_cannot_be_used_is_named(
    command: Callable[..., Any], here: Path, source: str, said: str
) -> None:
    (here / "ways.py").write_text(WAYS)
    done = command("fold", "-m", "ways:build", "-i", "2,3,8,8", "-e", source)
    assert said in done.sentence
