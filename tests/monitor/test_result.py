"""What a watch says: a verdict, a sentence, rows for the norms that matter, and data."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from batchnorm.errors import StateError
from batchnorm.monitor.drift import LayerDrift, judge
from batchnorm.monitor.result import WatchResult
from batchnorm.monitor.saturation import ActivationUse
from batchnorm.monitor.stream import LayerStream, ReferenceStatistics
from batchnorm.report import Paragraph, Plot, Table


def layer(name: str, samples: int = 64, shift: float = 0.0) -> LayerDrift:
    """What is judged of a norm with mean 0 and variance 1 that met values about another mean."""
    stream = LayerStream(name, ReferenceStatistics.of(torch.zeros(4), torch.ones(4), 1e-5))
    if samples:
        x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0))
        stream.add((x - x.mean(0)) / x.std(0) + shift)
    return judge(stream, tolerance=0.1, level=0.05)


def broken(name: str) -> LayerDrift:
    stream = LayerStream(name, ReferenceStatistics.of(torch.zeros(4), torch.ones(4), 1e-5))
    stream.add(torch.full((32, 4), torch.nan))
    return judge(stream, tolerance=0.1, level=0.05)


def result(*layers: LayerDrift, uses: tuple[ActivationUse, ...] = (), **options: Any) -> WatchResult:
    return WatchResult(layers, uses, 0.1, 0.05, **options)


FINE, OFF, FEW, NEVER = layer("a"), layer("b", shift=2.0), layer("c", samples=3), layer("d", samples=0)


@pytest.mark.parametrize(
    ("layers", "verdict", "summary", "tone"),
    [
        ((FINE,), "as stored", "No drift: every norm met what it has stored, in 64 samples.", "good"),
        (
            (FINE, FEW, NEVER),
            "as stored",
            "No drift: every norm met what it has stored (1 of 3 norms could be judged), in 64 samples.",
            "good",
        ),
        ((FINE, OFF), "drifted", "Drift: 1 of 2 norms met data that the stored statistics do not describe.", "bad"),
        (
            (OFF, broken("e")),
            "drifted",
            "Drift: 1 of 2 norms met data that the stored statistics do not describe. Non-finite values in e; samples "
            "that hold them are left out there.",
            "bad",
        ),
        (
            tuple(broken(name) for name in ("", *"efghij")),
            "drifted",
            "Non-finite values in the model, e, f, g, h and 2 more; samples that hold them are left out there.",
            "bad",
        ),
        ((FEW, NEVER), "not judged", "Not enough samples to judge: 3 samples seen, at least 16 needed.", "plain"),
        ((NEVER,), "not judged", "Nothing to compare: the model was not called while it was watched.", "plain"),
        ((), "not judged", "Nothing to compare: the model was not called while it was watched.", "plain"),
    ],
)
def test_the_verdict_and_its_sentence(layers: Any, verdict: str, summary: str, tone: str) -> None:
    told = result(*layers)
    assert (told.verdict, told.summary, told.document().tone) == (verdict, summary, tone)
    data = json.loads(json.dumps(told.to_dict(), allow_nan=False))
    assert data["drifted"] is {"drifted": True, "as stored": False, "not judged": None}[verdict]
    if verdict == "not judged":
        with pytest.raises(StateError, match="watch: whether the data drifted is not known"):
            _ = told.drifted
    else:
        assert told.drifted is (verdict == "drifted")


def test_against_a_reference_the_words_are_those_of_layers() -> None:
    told = result(FINE, OFF, by_reference=True)
    assert told.summary == "Drift: 1 of 2 layers met data that the reference does not describe."
    assert result(FINE, by_reference=True).summary.startswith("No drift: every layer met what the reference did")
    (section,) = told.document().sections
    assert section.title == "Layers"
    assert section.blocks[0].columns[0] == "layer"
    assert "standard deviations of the reference σ" in section.blocks[0].caption


def test_the_page_has_every_norm_and_the_short_form_those_that_matter() -> None:
    told = result(FINE, OFF, FEW, NEVER, notes=("Half of the calls were looked at.",))
    (section,) = told.document().sections
    note, table, plot = section.blocks
    assert note == Paragraph("Half of the calls were looked at.")
    assert isinstance(table, Table)
    assert [row[:3] for row in table.rows] == [
        ["a", "as stored", 64],
        ["b", "drifted", 64],
        ["c", "too few samples", 3],
        ["d", "not called", 0],
    ]
    assert (table.tones, list(table.shown or ())) == ({1: "bad"}, [1])
    assert re.match("[0-3]:\u00a0\\+2\u00a0σ \\(", table.rows[1][-1])
    assert table.rows[2][-1] is None  # no channel is named where none can be judged
    assert isinstance(plot, Plot)
    assert [series.x for series in plot.series] == [["a", "b"]] * 2
    assert plot.series[1].y == [0.1, 0.1]
    brief = section.brief
    assert brief is not None
    assert [type(block) for block in brief] == [Paragraph, Table]
    assert [row[-1] for row in brief[1].rows][2:] == [None, None]


def use(name: str, **values: Any) -> ActivationUse:
    plain: dict[str, Any] = {"kind": "relu", "units": 4, "values": 64, "saturated": None, "stuck": None, "dead": ()}
    return ActivationUse(name=name, **(plain | values))


def test_activations_that_lost_most_of_their_units_are_shown() -> None:
    uses = (
        use("act"),
        use("", dead=(0, 1, 3)),
        use("half", dead=(0, 1)),
        use("sigmoid", kind="sigmoid", saturated=0.75, stuck=(1,), dead=None),
    )
    activations = result(FINE, uses=uses).document().sections[1]
    (table,) = activations.blocks
    assert isinstance(table, Table)
    assert [list(row) for row in table.rows] == [
        ["act", "relu", 4, None, None, 0],
        ["(the model)", "relu", 4, None, None, 3],
        ["half", "relu", 4, None, None, 2],
        ["sigmoid", "sigmoid", 4, "75.0 %", 1, None],
    ]
    assert table.tones == {1: "bad", 3: "bad"}
    assert activations.brief is not None
    said, lost = activations.brief
    assert said == Paragraph("4 activations: 5 dead units behind ReLU; 2 with most of their units or values lost.")
    assert [row[0] for row in lost.rows] == ["(the model)", "sigmoid"]
    (alone,) = result(FINE, uses=(use("act"),)).document().sections[1].brief or ()
    assert alone == Paragraph("1 activation: 0 dead units behind ReLU; 0 with most of their units or values lost.")
    data = result(FINE, uses=uses).to_dict()["activations"]
    assert (data[1]["dead_units"], data[3]["dead_units"], data[3]["stuck_units"]) == ([0, 1, 3], None, [1])


def test_numbers_that_are_not_finite_are_none_in_the_data() -> None:
    (found,) = result(broken("e")).to_dict()["layers"]
    assert (found["status"], found["nonfinite_samples"], found["distance"]) == ("non-finite values", 32, None)
    assert found["worst_channels"] == []
