"""What a row says of tools that fold, fold wrongly, do nothing or break; and what the page makes of rows."""

from dataclasses import dataclass

import pytest
import torch
from benchmarks.fold.counting import count_norms
from benchmarks.fold.errors import largest_error
from benchmarks.fold.measure import compare, verdict
from benchmarks.fold.patterns import PATTERNS
from benchmarks.fold.tools import Folded, NotJudgedError
from torch import nn

from benchmarks.fold import report, tables

PAIR = next(pattern for pattern in PATTERNS if pattern.name == "conv2d → bn, zero padding")


@dataclass(frozen=True)
class Pretender:
    """A tool that does what it is told."""

    work: object
    name: str = "batchnorm"
    dtype: torch.dtype = torch.float64
    reads_only: bool = False

    def version(self):
        return "pretender 1"

    def fold(self, model, inputs):
        return self.work(model)


def nothing(model):
    return Folded(model, lambda *inputs: count_norms(model, *inputs))


def careless(model):
    return nothing(model[0])


def broken(model):
    raise ValueError("\nno such operator\nat line 3")


def unready(model):
    raise NotJudgedError("the file is wrong")


@pytest.mark.parametrize(
    ("work", "expected", "left"),
    [(nothing, "right", 1), (careless, "wrong", 0), (broken, "raised", None), (unready, "skipped", None)],
)
def test_verdict(work, expected, left):
    (row,) = compare(PAIR, [Pretender(work)])
    assert (verdict(row), row["norms"], row["left"]) == (expected, 1, left)
    assert row["raised"] == ("ValueError: no such operator" if work is broken else None)


def test_an_error_that_rounding_explains_is_not_wrong():
    row = {"raised": None, "skipped": None, "error": 2e-3}
    assert verdict({**row, "rounding": 1e-3}) == "right"
    assert verdict({**row, "rounding": 1e-5}) == "wrong"


@pytest.mark.parametrize(
    ("got", "error"),
    [([1.0, 4.0], 0.0), ([1.0, 3.0], 0.25), ([float("nan"), 4.0], float("inf")), ([1.0], float("inf"))],
)
def test_largest_error(got, error):
    assert largest_error([torch.tensor([1.0, 4.0])], [torch.tensor(got)]) == error


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_norms_are_counted_in_torchscript_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 5, 5)
    traced = torch.jit.trace(model, x)
    assert count_norms(model, x) == count_norms(traced, x) == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_patterns_have_norms_that_matter(pattern):
    model, x = pattern.build(), pattern.inputs(0)
    norms = count_norms(model, *x)
    assert norms > 0
    assert 0 <= pattern.least <= norms


def test_names_of_patterns_are_their_own():
    assert len({pattern.name for pattern in PATTERNS}) == len(PATTERNS)


def row(tool, left, error=0.0, raised=None):
    about = {"question": "patterns", "family": "f", "subject": "s", "norms": 2, "least": 0, "rounding": 0.0}
    return {**about, "tool": tool, "left": left, "error": error, "raised": raised, "skipped": None}


def test_what_another_removes_is_told():
    titles = {"batchnorm": "ours", "other": "theirs", "wrong": "worse"}
    rows = [row("batchnorm", 1), row("other", 0), row("wrong", 0, error=1.0)]
    assert tables.missed(rows, [], "batchnorm", titles) == [{"subject": "s", "left": 1, "others": "theirs 0"}]
    assert tables.left_by_all(rows[:1]) == ["s"]
    assert "| s | 2 | 0 | 1 | 0 | **wrong, 1** |" in tables.patterns(rows, titles)


def test_facts_need_no_rows_of_speed():
    (measured,) = compare(PAIR, [Pretender(nothing)])
    about = dict.fromkeys(("device", "threads", "torch", "batchnorm", "commit", "date"), "-")
    what = {"question": "patterns", "family": PAIR.family, "subject": PAIR.name, "least": 0}
    facts = report.facts([{**about, **what, **measured}])
    assert facts["patterns"] == 1
    assert facts["speed"] == facts["leftover"] == facts["network_table"] == facts["raised"] == ""
    timed = {"question": "leftover", "package": "-", "subject": "net, 1 thread(s)", "median": 0.002, "ratio": 0.5}
    timed |= {**about, "version": "-", "side": 8, "rounds": 3}
    facts = report.facts([{**timed, "tool": tool} for tool in ("eager", "fuse")])
    assert "| net, 1 thread(s) | 2.0 (0.50) | 2.0 (0.50) |" in facts["leftover"]
    assert facts["speed"] == ""
