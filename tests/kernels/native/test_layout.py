from __future__ import annotations

import pytest
import torch

from batchnorm.kernels.native.layout import PLANES, ROWS, Layout, empty, is_dense, layout_of, like, view


def channels_last(*shape):
    n, c, *space = shape
    return torch.empty(n, *space, c).movedim(-1, 1)


# what lies how, and what the kernels are told: layout, stride of samples or rows, stride of channels
TENSORS = {
    "(N, C)": (lambda: torch.empty(4, 6), Layout(ROWS, 4, 6, 1), 6, 1),
    "(N, C), slice of the batch": (lambda: torch.empty(8, 6)[::2], Layout(ROWS, 4, 6, 1), 12, 1),
    "(N, C), slice of the channels": (lambda: torch.empty(4, 9)[:, 2:8], Layout(ROWS, 4, 6, 1), 9, 1),
    "(N, C), one channel of many": (lambda: torch.empty(4, 9)[:, 3:4], Layout(ROWS, 4, 1, 1), 9, 1),
    "(N, C), by column": (lambda: torch.empty(6, 4).t(), Layout(PLANES, 1, 6, 4), 0, 4),
    "(N, C, 1, 1), by column": (lambda: torch.empty(6, 4).t()[..., None, None], Layout(PLANES, 1, 6, 4), 0, 4),
    "(N, C, 1, 1)": (lambda: torch.empty(4, 6, 1, 1), Layout(ROWS, 4, 6, 1), 6, 1),
    "(N, C, L)": (lambda: torch.empty(4, 6, 5), Layout(PLANES, 4, 6, 5), 30, 5),
    "(N, C, L), slice of the batch": (lambda: torch.empty(8, 6, 5)[::2], Layout(PLANES, 4, 6, 5), 60, 5),
    "(N, C, L), slice of the channels": (lambda: torch.empty(4, 9, 5)[:, 2:8], Layout(PLANES, 4, 6, 5), 45, 5),
    "(N, C, L), start of the space": (lambda: torch.empty(4, 6, 8)[..., 1:6], Layout(PLANES, 4, 6, 5), 48, 8),
    "(C, N, L) transposed": (lambda: torch.empty(6, 4, 5).transpose(0, 1), Layout(PLANES, 4, 6, 5), 5, 20),
    "(N, L, C) transposed": (lambda: torch.empty(4, 5, 6).transpose(1, 2), Layout(ROWS, 20, 6, 1), 6, 1),
    "one channel, every second position": (lambda: torch.empty(4, 1, 10)[..., ::2], Layout(ROWS, 20, 1, 1), 2, 1),
    "NCHW": (lambda: torch.empty(4, 6, 2, 3), Layout(PLANES, 4, 6, 6), 36, 6),
    "NHWC": (lambda: channels_last(4, 6, 2, 3), Layout(ROWS, 24, 6, 1), 6, 1),
    "NHWC, slice of the channels": (lambda: channels_last(4, 9, 2, 3)[:, 2:8], Layout(ROWS, 24, 6, 1), 9, 1),
    "NHWC, one sample": (lambda: channels_last(1, 6, 2, 3), Layout(ROWS, 6, 6, 1), 6, 1),
    "NHWC, one row": (lambda: channels_last(4, 6, 1, 3), Layout(ROWS, 12, 6, 1), 6, 1),
    "NDHWC": (lambda: channels_last(2, 6, 2, 3, 2), Layout(ROWS, 24, 6, 1), 6, 1),
    "expanded batch": (lambda: torch.empty(1, 6, 5).expand(4, 6, 5), Layout(PLANES, 4, 6, 5), 0, 5),
    "expanded channels": (lambda: torch.empty(4, 1, 5).expand(4, 6, 5), Layout(PLANES, 4, 6, 5), 5, 0),
    "sliding windows": (lambda: torch.empty(2, 14).unfold(1, 9, 1), Layout(PLANES, 2, 6, 9), 14, 1),
}
NEITHER = {
    "every second position": lambda: torch.empty(4, 6, 10)[..., ::2],
    "width before height": lambda: torch.empty(4, 6, 3, 2).transpose(2, 3),
    "NHWC, slice of the space": lambda: channels_last(4, 6, 4, 6)[..., :3],
    "expanded batch of rows": lambda: torch.empty(1, 6).expand(4, 6),
    "every second channel": lambda: torch.empty(4, 12)[:, ::2],
    "windows over the rows": lambda: torch.empty(14).unfold(0, 6, 1)[:, :3],
}


@pytest.mark.parametrize("name", TENSORS)
def test_layouts_are_recognized_and_addressed(name):
    make, layout, outer, channels = TENSORS[name]
    x = make()
    assert layout_of(x) == layout
    assert view(x, layout) == (x.data_ptr(), outer, channels)


@pytest.mark.parametrize("name", NEITHER)
def test_what_is_neither_planes_nor_rows_is_not_taken_for_one(name):
    x = NEITHER[name]()
    found = layout_of(x)
    # windows of three columns over overlapping rows are columns with the step 1
    assert found is None or (name == "windows over the rows" and found == Layout(PLANES, 1, 3, 9))


def addressed(x, layout):
    """Return the values of ``x`` by the kernels' addresses, (outer, channels, inner)."""
    address, outer, channels = view(x, layout)
    start = (address - x.untyped_storage().data_ptr()) // x.element_size()
    flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return flat.as_strided((layout.outer, layout.channels, layout.inner), (outer, channels, 1), start)


def ordered(x, layout):
    """Return the values of ``x`` by the dimensions' names, (outer, channels, inner)."""
    if layout.kind == ROWS:
        return x.movedim(1, -1).reshape(layout.outer, layout.channels, 1)
    if layout.outer != x.shape[0]:
        return x.reshape(x.shape[0], x.shape[1]).t().reshape(1, layout.channels, layout.inner)
    return x.reshape(layout.outer, layout.channels, layout.inner)


@pytest.mark.parametrize("name", TENSORS)
def test_the_addresses_are_those_of_the_values(name):
    make, layout, _, _ = TENSORS[name]
    x = make()
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())  # where values share a place, too
    memory.copy_(torch.arange(memory.numel()))
    assert torch.equal(addressed(x, layout), ordered(x, layout))


@pytest.mark.parametrize("name", TENSORS)
def test_outputs_have_a_place_for_every_value_where_the_kernels_write(name):
    make, layout, _, _ = TENSORS[name]
    model = make()
    y = empty(model, layout)
    assert y.shape == model.shape
    places = addressed(y, layout)
    places.copy_(torch.arange(y.numel()).reshape(places.shape))
    assert torch.equal(addressed(y, layout), ordered(y, layout))
    assert y.unique().numel() == y.numel()
    if is_dense(model):
        assert y.stride() == model.stride()


def test_a_tensor_of_another_layout_is_copied_and_one_of_the_same_is_not():
    model = torch.empty(4, 6, 2, 3)
    layout = layout_of(model)
    same, other = torch.randn(4, 9, 2, 3)[:, 1:7], torch.randn(4, 2, 3, 6).movedim(-1, 1)
    assert like(same, model, layout) is same
    copy = like(other, model, layout)
    assert torch.equal(copy, other)
    assert copy.stride() == model.stride()


def test_a_negative_view_is_copied_with_its_sign():
    x = torch._neg_view(torch.ones(4, 6))
    copy = like(x, x, layout_of(x))
    assert not copy.is_neg()
    assert torch.equal(copy, torch.full((4, 6), -1.0))


@pytest.mark.parametrize(
    ("dense", "make"),
    [
        (True, lambda: torch.empty(4, 6, 5)),
        (True, lambda: channels_last(4, 6, 2, 3)),
        (True, lambda: channels_last(2, 6, 2, 3, 2)),
        (False, lambda: torch.empty(4, 9, 5)[:, :6]),
        (False, lambda: torch.empty(1, 6, 5).expand(4, 6, 5)),
        (False, lambda: torch.empty(4, 6, 10)[..., ::2]),
        (False, lambda: torch.empty(2, 14).unfold(1, 9, 1)),
    ],
)
def test_memory_that_a_result_may_take_over(dense, make):
    assert is_dense(make()) is dense
