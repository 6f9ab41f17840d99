"""Every way in which preparing a picture goes wrong is among what the range of the inputs allows, and is mended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from batchnorm.diagnosis.preparations import Preparation, Range, affine, fitted, known, line_of

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def pixels() -> Tensor:
    """Pictures from 0 to 1, with black and white in each channel."""
    x = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0], x[0, :, 0, 1] = 0.0, 1.0
    return x


def prepared(x: Tensor) -> Tensor:
    return (x - MEAN) / STD


def test_the_range_of_some_inputs() -> None:
    r = Range.of([torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [-1.0]])])
    assert (r.least, r.largest, r.mean, r.std) == (-1.0, 5.0, 2.0, pytest.approx(5**0.5))
    through = r.through(2.0, 1.0)
    assert (through.least, through.largest, through.mean, through.std) == (-1.0, 11.0, 5.0, pytest.approx(20**0.5))


@pytest.mark.parametrize(
    ("given", "unit", "byte", "standard"),
    [
        (pixels(), True, False, False),
        (1.05 * pixels(), True, False, False),  # interpolation overshoots
        (pixels() / 255, False, False, False),  # a narrow part of it
        (255 * pixels(), False, True, False),
        (300 * pixels(), False, False, False),
        (prepared(pixels()), False, False, True),
        (10 * prepared(pixels()), False, False, False),
    ],
)
def test_kinds_of_ranges(given: Tensor, unit: bool, byte: bool, standard: bool) -> None:
    r = Range.of([given])
    assert (r.unit, r.bytes, r.standard) == (unit, byte, standard)


WRONG = {
    "missing /255: pixels": (lambda x: 255 * x, lambda x: x),
    "divided by 255 twice": (lambda x: x / 255, lambda x: x),
    "not applied: pixels": (lambda x: x, prepared),
    "missing /255 and mean and std not applied": (lambda x: 255 * x, prepared),
    "missing /255": (lambda x: prepared(255 * x), prepared),
    "mean and std applied twice": (lambda x: prepared(prepared(x)), prepared),
    "applied, where training had pixels as they are": (prepared, lambda x: x),
    "mean and std swapped": (lambda x: (x - STD) / MEAN, prepared),
    "channels in the opposite order": (lambda x: prepared(x).flip(1), prepared),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_went_wrong_is_offered_and_its_code_mends_the_input(words: str) -> None:
    spoil, right = WRONG[words]
    x = pixels()
    given = spoil(x)
    offered = [p for p in known(Range.of([given]), 3, 4) if words in p.words]
    assert offered
    mended = [p for p in offered if torch.allclose(p(given), right(x), rtol=1e-4, atol=1e-4)]
    assert mended
    by_code = eval(mended[0].code, {"torch": torch, "x": given})
    torch.testing.assert_close(by_code, mended[0](given), rtol=1e-4, atol=1e-4)


def test_ranges_that_fit_nothing_are_offered_little() -> None:
    odd = Range(-30.0, 12.0, 1.0, 2.0)
    assert [p.code for p in known(odd, 2, 4)] == []
    assert [p.code for p in known(odd, 3, 4)] == ["x.flip(1)"]
    assert [p.code for p in known(Range(0.0, 1.0, 0.5, 0.2), 3, 2)] == ["x * 255"]  # vectors have no mean and std


@pytest.mark.parametrize(
    ("spoil", "right", "words"),
    [
        (lambda x: 255 * x, lambda x: x, "missing /255: pixels"),
        (lambda x: x, lambda x: (x - 0.55) / 0.3, "mean and std not applied"),
        (lambda x: 255 * x, lambda x: (x - 0.55) / 0.3, "missing /255 and mean and std not applied"),
        (lambda x: (x - 0.55) / 0.3, lambda x: x, "applied, where training had pixels"),
        (lambda x: ((x - 0.5) / 0.3 - 0.5) / 0.3, lambda x: (x - 0.5) / 0.3, "applied twice"),
        (lambda x: (x - 0.3) / 0.5, lambda x: (x - 0.5) / 0.3, "swapped"),
    ],
)
def test_a_fitted_scale_and_shift_mean_something_with_constants_that_nobody_knows(spoil, right, words: str) -> None:
    x = pixels()
    given, due = spoil(x), right(x)
    scale = float(due.std() / given.std())
    shift = float(due.mean() - scale * given.mean())
    found = fitted(Range.of([given]), scale, [shift] * 3, 4)
    assert found is not None
    assert words in found.words
    torch.testing.assert_close(found(given), due, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize(("scale", "shift"), [(-1.0, 0.0), (0.0, 0.5), (1.0, 0.0), (1.7, 0.4)])
def test_others_mean_nothing(scale: float, shift: float) -> None:
    assert fitted(Range.of([3 * prepared(pixels())]), scale, [shift] * 3, 4) is None


def test_an_affine_preparation_is_written_shortly() -> None:
    same, each = affine(0.333333333, [0.5, 0.5, 0.5], 4), affine(2.0, [0.123456, 0.0, -1.0], 4, "as told")
    assert (same.code, same.scale, same.words) == ("0.33333 * x + 0.5", (0.33333,), "")
    assert each.code == "2 * x + torch.tensor([0.1235, 0, -1]).view(1, -1, 1, 1)"
    x = pixels()
    torch.testing.assert_close(each(x), eval(each.code, {"torch": torch, "x": x}))
    assert Preparation("", (2.0,), (1.0,), "2 * x + 1")(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("batch", "get"),
    [
        (torch.ones(2, 3), lambda batch: batch),
        ((torch.ones(2, 3), "label"), lambda batch: batch[0]),
        ([torch.ones(2, 3), "label"], lambda batch: batch[0]),
        ({"name": "n", "image": torch.ones(2, 3), "max": 1}, lambda batch: batch["image"]),
    ],
)
def test_the_line_of_code_prepares_every_batch_and_keeps_the_rest(batch: Any, get: Any) -> None:
    line = line_of(batch, "(x / 255 - max(0.5, 0)) * x")
    assert line is not None
    scope: dict[str, Any] = {"batches": [batch, batch], "torch": torch}
    exec(line, scope)
    assert len(scope["batches"]) == 2
    torch.testing.assert_close(get(scope["batches"][1]), torch.full((2, 3), 1 / 255 - 0.5))
    rest = [leaf for leaf in (batch.values() if isinstance(batch, dict) else batch) if not isinstance(leaf, Tensor)]
    now = scope["batches"][1]
    assert rest == [leaf for leaf in (now.values() if isinstance(now, dict) else now) if not isinstance(leaf, Tensor)]


@pytest.mark.parametrize("batch", ["text", [], {}, {"a": 1}, [[torch.ones(1)]], 7])
def test_an_input_inside_of_something_else_has_no_line(batch: Any) -> None:
    assert line_of(batch, "x / 255") is None
