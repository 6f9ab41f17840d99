from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from batchnorm.cli import main
from batchnorm.cli.load import load_model
from batchnorm.cli.load.objects import find_object

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.down = nn.Conv2d(6, 4, 3, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.relu(self.bn2(self.down(x)))
        return self.head(x.mean((2, 3)))


def build():
    return Net()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 32, 32, generator=generator) for _ in range(3)]


def failing():
    yield from batches()[:2]
    raise OSError("disk on fire")


def interrupted():
    yield from batches()[:2]
    raise KeyboardInterrupt


def poisoned():
    x = torch.ones(4, 3, 32, 32)
    x[1, 2, 3, 4] = float("nan")
    yield from batches()[:1]
    yield x


def empty():
    return []


def mapped():
    return [{"x": batches()[0]}]


def labelled():
    return [(x, torch.zeros(len(x))) for x in batches()]


def test():
    return labelled()


def train():
    return labelled()


def accuracy(output, batch):
    return (output.argmax(1) == batch[1]).float().mean()


def strings():
    return ["one", "two"]


def wants(width, depth):
    return Net()


def broken():
    raise ValueError("no such checkpoint\\nsecond line")


def quits():
    raise SystemExit(3)


def number():
    return 7


def chatty():
    print("building the network")
    return Net()


module = Net()
tensor = torch.zeros(3)
text = "words"
"""


@dataclass
class Outcome:
    """What one command left behind."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The error: exactly one line on stderr, nothing on stdout, no traceback."""
        assert self.code == 2
        assert self.out == ""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert lines[0].endswith((".", "?", "!", "…"))
        return lines[0].removeprefix("error: ")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with net.py, its weights and a file of images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    # a module imported anew is not to meet the last test's bytecode, which is told apart only by second and size
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "net.py").write_text(NET)
    numbers = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", x=numbers.normal(1.0, 2.0, (100, 3, 32, 32)))
    before = set(sys.modules)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield tmp_path
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def weights(here: Path) -> Path:
    """State dict of the network in net.py, its statistics no longer the initial ones."""
    model = load_model("net:build", seed=3).train()
    with torch.no_grad():
        for batch in find_object("--data", "net:batches")():
            model(batch)
    torch.save(model.state_dict(), here / "net.pt")
    return here / "net.pt"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run one command in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(int(exit_.value.code or 0), out, err)

    return run
