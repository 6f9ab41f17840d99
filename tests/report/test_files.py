"""Two writers of one file do not meet."""

from __future__ import annotations

from pathlib import Path

from batchnorm.report.files import replacing


def test_two_writers_at_once_each_write_a_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    with replacing(target) as one, replacing(target) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert target.read_text() == "one"  # the one that was finished last
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
