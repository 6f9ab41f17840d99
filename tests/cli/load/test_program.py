"""A program in a file is read, or it is said in one sentence what the file is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm.cli.errors import CommandError
from batchnorm.cli.load.program import load_program
from batchnorm.files.program import read_program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.zeros(1, 3),)), path)
    return path


def test_a_program_is_what_was_saved(program: Path) -> None:
    x = torch.ones(1, 3)
    assert torch.equal(load_program(program).module()(x), read_program(program).module()(x))


def test_no_file_and_a_folder_are_told(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.pt2", tmp_path):
        with pytest.raises(CommandError) as caught:
            load_program(path)
        assert str(caught.value) == f"--model {path}: no such file."


@pytest.mark.parametrize("content", [b"", b"hello, this is no program", bytes(1000), b"PK\x03\x04" + bytes(300)])
def test_another_kind_of_file_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(content)
    with pytest.raises(CommandError, match=r"^--model .*net\.pt2: expected a program") as caught:
        load_program(path)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_told(program: Path, tmp_path: Path, share: float) -> None:
    data = program.read_bytes()
    path = tmp_path / "net.pt2"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CommandError, match=r"^--model .*net\.pt2: expected a program"):
        load_program(path)
