"""Files are there whole or not at all, several together or none, with the rights and links that they had."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from batchnorm.files import replace
from batchnorm.files.replace import is_same, replacing, together


@contextmanager
def umask(mode: int) -> Iterator[None]:
    before = os.umask(mode)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_at_once_each_write_a_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    with replacing(target) as one, replacing(target) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert target.read_text() == "one"  # the one that was finished last
    assert names(tmp_path) == ["report.html"]


def test_a_pipe_or_a_device_is_not_replaced_with_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.html"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="a device or a pipe is no place for a file"), replacing(pipe):
        raise AssertionError("the body is not entered")
    assert pipe.is_fifo()
    assert names(tmp_path) == ["pipe.html"]


def by_hand(path: Path) -> None:
    path.write_text("new")


def by_torch(path: Path) -> None:
    torch.save({"x": torch.zeros(2)}, path)


def by_safetensors(path: Path) -> None:
    save_file({"x": torch.zeros(2)}, path)


WRITERS = pytest.mark.parametrize("write", [by_hand, by_torch, by_safetensors])


@WRITERS
@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_rights_of_new_files(
    tmp_path: Path, write: Callable[[Path], None], mask: int, expected: int
) -> None:
    with umask(mask), replacing(tmp_path / "net.pt") as fresh:
        write(fresh)
    assert mode(tmp_path / "net.pt") == expected


@WRITERS
@pytest.mark.parametrize("before", [0o600, 0o640, 0o664, 0o400])
def test_a_file_that_takes_the_place_of_another_has_its_rights(
    tmp_path: Path, write: Callable[[Path], None], before: int
) -> None:
    target = tmp_path / "net.pt"
    target.write_text("old")
    target.chmod(before)
    with umask(0o022), replacing(target) as fresh:
        assert mode(fresh) & ~before & ~0o200 == 0  # nobody may read it meanwhile who may not afterwards
        write(fresh)
    assert mode(target) == before
    assert target.read_bytes() != b"old"


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one(tmp_path: Path, there: bool) -> None:
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "real.pt", tmp_path / "net.pt"
    if there:
        target.write_text("old")
    link.symlink_to(Path("store") / "real.pt")
    with replacing(link) as fresh:
        fresh.write_text("new")
    assert link.is_symlink()
    assert link.readlink() == Path("store") / "real.pt"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["net.pt", "store"]
    assert names(tmp_path / "store") == ["real.pt"]


def test_of_two_names_of_one_file_the_other_keeps_the_old_content(tmp_path: Path) -> None:
    target, other = tmp_path / "net.pt", tmp_path / "other.pt"
    target.write_text("old")
    other.hardlink_to(target)
    with replacing(target) as fresh:
        fresh.write_text("new")
    assert (target.read_text(), other.read_text()) == ("new", "old")


@pytest.mark.parametrize("letter", ["x", "é", "層"])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path, letter: str) -> None:
    room = 255 - len(b".safetensors")
    target = tmp_path / f"{letter * (room // len(letter.encode()))}.safetensors"
    for _ in range(2):
        with replacing(target) as fresh:
            by_safetensors(fresh)
    assert names(tmp_path) == [target.name]
    with replacing(tmp_path / f"a.{'h' * 200}") as fresh:
        fresh.touch()


def written(folder: Path, last: str, failing: str | None) -> None:
    with together([folder / last]) as files:
        for name in ("a", "b", "c"):
            files.beside(folder / name).write_text(f"new {name}")
        if failing == "body":
            raise KeyboardInterrupt


@pytest.mark.parametrize("there", [("a", "b", "c"), ("b",), ()])
@pytest.mark.parametrize("failing", ["a", "b", "c", "body"])
@pytest.mark.parametrize("error", [OSError(5, "no"), KeyboardInterrupt()])
@pytest.mark.parametrize("links", [True, False])
def test_where_one_fails_all_are_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], failing: str, error: Exception, links: bool
) -> None:
    for name in there:
        (tmp_path / name).write_text(f"old {name}")
    rename = Path.replace

    def replace_or_fail(self: Path, target: Path) -> Path:
        if target.name == failing and self.read_text().startswith("new"):
            raise error
        return rename(self, target)

    def no_link(*args: object) -> None:
        raise OSError(1, "this file system has no links")

    monkeypatch.setattr(Path, "replace", replace_or_fail)
    if not links:
        monkeypatch.setattr(replace.os, "link", no_link)
    with pytest.raises((OSError, KeyboardInterrupt)):
        written(tmp_path, "a", failing)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: f"old {name}" for name in there}


@pytest.mark.parametrize("last", ["a", "b", "c"])
def test_what_was_read_is_replaced_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    order: list[str] = []
    rename = Path.replace

    def noted(self: Path, target: Path) -> Path:
        order.append(target.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    (tmp_path / "link").symlink_to(last)
    written(tmp_path, "link", None)
    assert order[-1] == last
    assert sorted(order) == ["a", "b", "c"]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()}.items() >= {(n, f"new {n}") for n in "abc"}


def test_paths_of_one_file_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("net.pt")
    (tmp_path / "way").symlink_to("folder")
    one = Path("net.pt")
    for other in (Path("./net.pt"), tmp_path / "net.pt", Path("folder/../net.pt"), Path("link"), Path("way/../net.pt")):
        assert is_same(one, other)
    assert is_same(Path("folder/x"), Path("way/x"))
    assert not is_same(one, Path("net.pth"))
    one.touch()
    Path("hard").hardlink_to(one)
    assert is_same(one, Path("hard"))
