from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchnorm.cli.errors import CommandError
from batchnorm.cli.output import (
    check_destinations,
    check_folder,
    note,
    only_result_on_stdout,
    print_json,
    publish,
    writing,
)
from batchnorm.report import Document, Facts, Result, Section


class Found(Result):
    def document(self) -> Document:
        return Document("Found", "two things", [Section("", [Facts([("value", 3)])])])

    def to_dict(self) -> dict[str, Any]:
        return {"value": 3}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [True, False])
def test_whatever_interrupts_the_writing_leaves_the_old_file(tmp_path: Path, error: Any, there: bool) -> None:
    target = tmp_path / "net.pt"
    if there:
        target.write_text("old")

    def write_half(fresh: Path) -> None:
        fresh.write_text("half of it")
        raise error

    with pytest.raises((CommandError, KeyboardInterrupt)), writing() as files:
        files.write("--output", target, write_half)
    assert names(tmp_path) == (["net.pt"] if there else [])
    assert not there or target.read_text() == "old"


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    def write(fresh: Path) -> None:
        with Path("/dev/full").open("w") as full:
            full.write("x" * 100_000)

    with (
        pytest.raises(CommandError, match=r"--output .*net\.pt: cannot be written \(No space left on device\)"),
        writing() as files,
    ):
        files.write("--output", tmp_path / "net.pt", write)
    assert names(tmp_path) == []


_FULL = """
import resource, sys, torch
from pathlib import Path
from batchnorm.cli.errors import CommandError
from batchnorm.cli.save import save_model
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_model(torch.nn.Linear(300, 300), Path(sys.argv[1]))
except CommandError as error:
    print(error)
"""


@pytest.mark.parametrize("name", [pytest.param("net.pt", marks=pytest.mark.sweep), "net.safetensors"])
def test_what_cpp_and_rust_say_of_a_full_disk_is_told_in_the_words_of_the_system(tmp_path: Path, name: str) -> None:
    """The size of files is limited: the writers fail as on a full disk, with another reason of the system's."""
    done = subprocess.run([sys.executable, "-c", _FULL, tmp_path / name], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"--output {tmp_path / name}: cannot be written (File too large)."
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("output", "html", "said"),
    [
        ("net.onnx", None, "--output net.onnx: expected a name that ends in .safetensors, .pt or .pth; got .onnx"),
        ("net", None, "got no suffix"),
        ("none/net.pt", None, "--output none/net.pt: no directory none; make it first"),
        ("folder.pt", None, "this is a directory"),
        (None, "page.txt", "--html page.txt: expected a name that ends in .html or .htm; got .txt"),
        (None, "none/page.html", "no directory none"),
    ],
)
def test_where_nothing_can_be_written_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str | None, html: str | None, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CommandError) as raised:
        check_destinations(output and Path(output), html and Path(html))  # type: ignore[arg-type]
    assert said in str(raised.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for check in (lambda: check_destinations(tmp_path / "net.pt", None), lambda: check_folder("-o", tmp_path / "new")):
        with pytest.raises(CommandError, match="no right to write in"):
            check()


def test_a_folder_that_is_there_or_can_be_made_passes(tmp_path: Path) -> None:
    check_folder("--output", tmp_path)
    check_folder("--output", tmp_path / "new" / "newer")
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match=r"expected a folder; .*file is a file"):
        check_folder("--output", tmp_path / "file" / "inside")


def test_numbers_that_json_lacks_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1.5, float("nan"), (float("inf"), -0.0)], 3: "×"})
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == {"a": [1.5, None, [None, 0.0]], "3": "×"}


def test_json_holds_the_result_and_the_files_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(Found(), json_=True, output=tmp_path / "net.pt", more=1)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"value": 3, "more": 1, "output": str(tmp_path / "net.pt"), "html": None}
    assert err == ""


def test_text_shows_the_tables_and_notes_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(Found(), output=tmp_path / "net.pt")
    out, err = capsys.readouterr()
    assert out.startswith("Found\ntwo things\n")
    assert f"wrote {tmp_path / 'net.pt'}." in err


def test_what_the_users_code_prints_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with only_result_on_stdout():
        print("hello")
        note("careful.")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "hello\nnote: careful.\n"


def test_on_a_terminal_a_note_is_as_wide_as_that(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    note(f"{'word ' * 20}and a/path/that/is/longer/than/the/line/but/is/not/broken.")
    lines = capsys.readouterr().err.splitlines()
    assert all(len(line) <= 40 for line in lines if "/" not in line)
    assert lines[0].startswith("note: word")
    assert all(line.startswith("      ") for line in lines[1:])
    assert "a/path/that/is/longer/than/the/line/but/is/not/broken." in lines[-1]
