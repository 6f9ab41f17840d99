from __future__ import annotations

import base64
import math
import struct
import zlib

import pytest

from batchnorm.report import Document, HeatMap, Section
from batchnorm.report.heatmap import shades, strip, strongest
from batchnorm.report.html import to_html
from batchnorm.report.text import to_text


def pixels(address: str) -> list[tuple[int, ...]]:
    """Decode the one row of a PNG with 8-bit RGBA and no filter."""
    png = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    assert png.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", png[16:24])
    size = struct.unpack(">I", png[33:37])[0]
    raw = zlib.decompress(png[41 : 41 + size])
    assert height == 1
    assert raw[0] == 0
    return [tuple(raw[1 + 4 * i : 5 + 4 * i]) for i in range(width)]


def test_a_strip_is_a_picture_with_one_pixel_a_value() -> None:
    zero, half, negative, beyond, broken = pixels(strip([0.0, 0.5, -1.0, 7.0, math.nan], 1.0))
    assert zero[3] == 0
    assert half[3] == 128
    assert negative[2] > negative[0]
    assert negative[3] == beyond[3] == broken[3] == 255
    assert beyond[0] > beyond[2]
    assert broken[:3] not in (negative[:3], beyond[:3])


@pytest.mark.parametrize("values", [[], [0.0], [math.inf] * 3, [1.0] * 5000])
def test_any_number_of_values(values: list[float]) -> None:
    assert 1 <= len(pixels(strip(values, 1.0))) <= 256
    assert len(shades(values, 1.0, 48)) == min(len(values), 48)


def test_the_one_odd_channel_of_thousands_is_kept() -> None:
    values = [0.0] * 2048
    values[1234] = -3.0
    assert min(strongest(values, 100)) == -3.0
    assert "█" in shades(values, 1.0, 48)
    values[7] = math.nan
    assert any(math.isnan(v) for v in strongest(values, 100))


def test_on_a_page_and_in_a_terminal() -> None:
    block = HeatMap("Shift", [("a<b", [0.0, 1.0]), ("c", [2.0])], 1.0, "σ", "a caption", {1: "bad"})
    document = Document("Title", "", [Section("", [block])])
    page, text = to_html(document), to_text(document)
    assert "a&lt;b" in page
    assert page.count("data:image/png") == 3  # two rows and the scale
    assert "·█" in text
    assert "a caption" in text
