"""Boxes do not overlap, arrows point down, and a chain is straight."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from batchnorm.report.graph_layout import lay_out


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 12))
    widths = draw(st.lists(st.floats(10, 200), min_size=count, max_size=count))
    pairs = [(a, b) for b in range(count) for a in range(b)]
    return widths, draw(st.lists(st.sampled_from(pairs), unique=True, max_size=16)) if pairs else []


@given(graphs())
def test_nothing_overlaps_and_arrows_point_down(graph) -> None:
    widths, edges = graph
    layout = lay_out(widths, edges, gap=8)
    assert all(layout.layer[a] < layout.layer[b] for a, b in edges)
    boxes = sorted(zip(layout.layer, layout.x, widths, strict=True))
    for (layer, x, width), (next_layer, next_x, next_width) in pairwise(boxes):
        if layer == next_layer:
            assert next_x - x >= (width + next_width) / 2 + 8 - 1e-6
    for x, width in zip(layout.x, widths, strict=True):
        assert x - width / 2 >= -1e-6
        assert x + width / 2 <= layout.width + 1e-6


@given(graphs())
def test_a_way_goes_from_layer_to_layer_past_all_boxes(graph) -> None:
    widths, edges = graph
    layout = lay_out(widths, edges, gap=8)
    for (start, end), way in zip(edges, layout.ways, strict=True):
        assert way[0] == (layout.x[start], layout.layer[start])
        assert way[-1] == (layout.x[end], layout.layer[end])
        assert [layer for _, layer in way] == list(range(layout.layer[start], layout.layer[end] + 1))
        for x, layer in way[1:-1]:
            beside = zip(layout.x, layout.layer, widths, strict=True)
            assert all(abs(x - other) >= width / 2 for other, at, width in beside if at == layer)


def test_a_chain_is_straight_and_a_beginning_stands_right_above_its_reader() -> None:
    chain = lay_out([60, 40, 80], [(0, 1), (1, 2)], gap=8)
    assert chain.x[0] == chain.x[1] == chain.x[2] == 40
    late = lay_out([10] * 4, [(0, 2), (2, 3), (1, 3)], gap=8)
    assert late.layer == [0, 1, 1, 2]


def test_nothing_is_laid_out_too() -> None:
    assert lay_out([], [], gap=8).width == 0
