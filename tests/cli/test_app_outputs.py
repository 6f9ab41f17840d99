"""The files that one command writes: all of them or none, each with a place of its own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

COMMANDS: dict[str, list[str]] = {
    "fold": ["fold", "-m", "net:build", "-w", "net.pt", "-i", "2,3,32,32", "-o", "net.pt", "--pairs", "p.safetensors"],
    "unfold": ["unfold", "-m", "net:build", "-w", "f.pt", "--pairs", "q.safetensors", "-o", "f.pt"],
    "recalibrate": ["recalibrate", "-m", "net:build", "-w", "net.pt", "-d", "net:batches", "-o", "net.pt",
                    "--population", "p.safetensors"],
    "merge": ["merge", "-m", "net:build", "-w", "net.pt", "-w", "net.pt", "-o", "net.pt"],
    "check": ["check", "-m", "net:build", "-w", "net.pt", "-i", "2,3,32,32", "--fix", "-o", "net.pt"],
}  # fmt: skip
COMMANDS = {name: [*words, "--html", "page.html"] for name, words in COMMANDS.items()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def failing(monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[[], None]:
    """Let nothing be renamed to one name."""
    rename = Path.replace

    def replace_or_fail(self: Path, target: Any) -> Path:
        if Path(target).name == name:
            raise OSError(13, "Permission denied", str(self), None, str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace_or_fail)
    return lambda: monkeypatch.setattr(Path, "replace", rename)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", COMMANDS)
def test_where_one_file_cannot_be_written_all_are_as_they_were(
    name: str, here: Path, weights: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "unfold":
        assert command("fold", "-m", "net:build", "-w", "net.pt", "-i", "2,3,32,32", "-o", "f.pt",
                       "--pairs", "q.safetensors").code == 0  # fmt: skip
    (here / "page.html").write_text("old")
    before = content(here)
    words = COMMANDS[name]
    outputs = [word for option, word in pairwise(words)
               if option in ("-o", "--html", "--population") or (option == "--pairs" and name == "fold")]  # fmt: skip
    for target in outputs:
        mend = failing(monkeypatch, target)
        said = command(*words).sentence
        mend()
        assert f"{target}: cannot be written (Permission denied)." in said
        assert content(here) == before
    assert command(*words).code in (0, 1)
    after = content(here)
    assert set(after) == set(before) | set(outputs)
    assert all(after[target] != before.get(target) for target in outputs if name != "check" or target != "net.pt")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recalibrate", "-d", "net:batches", "-o", "x.safetensors", "--population", "x.safetensors"],
         "--population x.safetensors: that is --output; each needs a file of its own."),
        (["recalibrate", "-d", "net:batches", "-o", "x.safetensors", "--population", "./x.safetensors"],
         "--population x.safetensors: that is --output"),
        (["recalibrate", "-d", "net:batches", "-o", "x.safetensors", "--population", "link.safetensors"],
         "--population link.safetensors: that is --output"),
        (["fold", "-i", "2,3,32,32", "-o", "folder/../x.safetensors", "--pairs", "x.safetensors"],
         "--pairs x.safetensors: that is --output"),
        (["fold", "-i", "2,3,32,32", "-w", "w.safetensors", "--pairs", "w.safetensors"],
         "--pairs w.safetensors: that is --weights, which would be lost; name another file."),
        (["recalibrate", "-d", "net:batches", "-w", "w.safetensors", "--population", "w.safetensors"],
         "--population w.safetensors: that is --weights"),
    ],
)  # fmt: skip
def test_two_files_of_one_path_are_refused_before_the_work(
    here: Path, command: Any, words: list[str], said: str
) -> None:
    (here / "folder").mkdir()
    (here / "link.safetensors").symlink_to("x.safetensors")
    (here / "w.safetensors").write_text("not read")
    before = content(here)
    (here / "net.py").write_text("raise SystemExit('the work has begun')")
    assert said in command(words[0], "-m", "net:build", *words[1:]).sentence
    assert content(here) | {"net.py": before["net.py"]} == before


def test_a_secret_file_stays_one_and_a_link_stays_a_link(here: Path, weights: Path, command: Any) -> None:
    store = here / "store"
    store.mkdir()
    weights.rename(store / "real.pt")
    (store / "real.pt").chmod(0o600)
    weights.symlink_to("store/real.pt")
    before = (store / "real.pt").read_bytes()
    assert command("recalibrate", "-m", "net:build", "-w", "net.pt", "-d", "net:batches", "-o", "net.pt").code == 0
    assert weights.is_symlink()
    assert (store / "real.pt").read_bytes() != before
    assert (store / "real.pt").stat().st_mode & 0o777 == 0o600
