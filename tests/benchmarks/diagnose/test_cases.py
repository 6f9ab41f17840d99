"""What a row says, of diagnoses that are right, wrong, silent or broken; and the table that is made of rows."""

from types import SimpleNamespace

import pytest

pytest.importorskip("sklearn")

from benchmarks.diagnose.cases import run
from benchmarks.diagnose.faults import FAULTS, HEALTHY

from batchnorm.errors import StateError
from benchmarks.diagnose import report


def naming(*findings):
    told = tuple(SimpleNamespace(cause=cause, layer=layer, severity="high") for cause, layer in findings)
    return lambda model, batches, **extra: SimpleNamespace(findings=told)


def failing(error):
    def diagnose(model, batches, **extra):
        raise error

    return diagnose


def row(name, diagnose):
    return run(FAULTS.get(name) or HEALTHY[name], "mlp", 0, diagnose)


@pytest.mark.parametrize(
    ("findings", "cause", "layer"),
    [
        ([("poisoned", "blocks.0.norm")], True, True),
        ([("stale", "blocks.0.norm"), ("poisoned", "blocks.0.norm")], False, True),
        ([("poisoned", "blocks.1.norm")], True, False),
        ([], False, False),
    ],
)
def test_only_the_first_finding_counts(findings, cause, layer):
    found = row("poisoned.nan", naming(*findings))
    assert (found["right_cause"], found["right_layer"]) == (cause, layer)
    assert (found["accuracy_after"] < 0.2 < found["accuracy_before"], found["output_gap"]) == (True, float("inf"))


def test_a_finding_in_a_healthy_model_is_a_false_alarm():
    assert row("healthy.held_out_128", naming())["right_cause"]
    assert not row("healthy.held_out_128", naming(("stale", "blocks.0.norm")))["right_cause"]


def test_a_failure_is_a_row_and_never_right():
    for name in ("poisoned.nan", "healthy.held_out_128"):
        found = row(name, failing(RuntimeError("no")))
        assert (found["failed"], found["right_cause"]) == ("RuntimeError: no", False)


def test_to_say_that_there_is_no_norm_is_right_for_a_folded_model_only():
    refuse = failing(StateError("diagnose: Sequential holds no batch norm."))
    assert row("healthy.folded", refuse)["right_cause"]
    assert not row("poisoned.nan", refuse)["right_cause"]


def test_the_table_counts_rows(tmp_path):
    about = dict.fromkeys(("device", "torch", "batchnorm", "date"), "x") | {"commit": "0123abc"}
    cases = [
        row("poisoned.nan", naming(("poisoned", "blocks.0.norm"))),
        row("poisoned.zero", naming(("stale", "blocks.0.norm"))),
        row("never_updated.all", naming()),
        row("healthy.held_out_128", naming(("stale", "blocks.0.norm"))),
    ]
    page = report.write([{**about, **case} for case in cases], tmp_path / "page.md").read_text()
    assert "| 1 poisoned | **1** | · | 1 | · | · |" in page
    assert "| 2 never_updated | · | **·** | · | 1 | · |" in page
    assert "right cause comes first in 33.3%" in page
    assert "| healthy.held_out_128 | 1 | 1 | stale 1 |" in page
