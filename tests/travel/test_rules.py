"""Each operator's rule, both ways, against the operator itself."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.dataflow.graph import Graph, Value
from batchnorm.dataflow.refusal import Refusal
from batchnorm.dataflow.trace import trace
from batchnorm.folding.planning.merged_parameters import Parameters
from batchnorm.travel import rules
from batchnorm.travel.maps import Map
from batchnorm.travel.route import carry_backward  # noqa: F401 - the rules register themselves
from batchnorm.travel.rules import Absorbed, go_backward, go_forward

ANY = ("shift", "scale", "negative", "both", "zero")
POSITIVE = ("shift", "scale", "both", "zero")  # a map that keeps the order
SCALES = ("scale", "negative", "zero")
POSITIVE_SCALES = ("scale", "zero")
NONE = ()


@dataclass(frozen=True)
class Case:
    """An operator, the shapes of what it reads, the axis of the channels, and the maps that can cross it."""

    name: str
    run: Callable[..., object]
    allowed: tuple[str, ...] = ANY
    shapes: tuple[tuple[int, ...], ...] = ((2, 6, 4, 4),)
    axis: int = 1
    back: bool = True


IMAGES = (2, 6, 4, 4)
CASES = [
    # what puts elements into another order
    Case("view", lambda x: x.view(2, 3, 2, 4, 4)),
    Case("reshape", lambda x: x.reshape(2, 6, 16)),
    Case("flatten", lambda x: x.flatten(1)),
    Case("unflatten", lambda x: x.unflatten(1, (2, 3))),
    Case("permute", lambda x: x.permute(0, 2, 3, 1)),
    Case("transpose", lambda x: x.transpose(1, 3)),
    Case("t", lambda x: x.t(), shapes=((5, 6),)),
    Case("movedim", lambda x: x.movedim(1, -1)),
    Case("squeeze", lambda x: x.squeeze(2), shapes=((2, 6, 1, 4),)),
    Case("unsqueeze", lambda x: x.unsqueeze(1)),
    Case("slice of channels", lambda x: x[:, 1:4]),
    Case("slice of positions", lambda x: x[:, :, 1:-1, ::2]),
    Case("select", lambda x: x[:, 2]),
    Case("narrow", lambda x: x.narrow(1, 2, 3)),
    Case("split", lambda x: x.split(2, 1)),
    Case("split_with_sizes", lambda x: x.split([1, 5], 1)),
    Case("chunk", lambda x: x.chunk(3, 1)),
    Case("unbind", lambda x: x.unbind(1)),
    Case("expand", lambda x: x.expand(2, 6, 4, 4), shapes=((2, 6, 1, 4),)),
    Case("repeat", lambda x: x.repeat(1, 2, 1, 1)),
    Case("repeat_interleave", lambda x: x.repeat_interleave(2, 1)),
    Case("flip", lambda x: x.flip(1)),
    Case("roll", lambda x: x.roll(2, 1)),
    Case("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2)),
    Case("channel_shuffle", lambda x: F.channel_shuffle(x, 3)),
    Case("view_as", lambda x, y: x.view_as(y), shapes=(IMAGES, (2, 6, 16))),
    # element by element
    Case("clone", lambda x: x.clone()),
    Case("contiguous", lambda x: x.contiguous()),
    Case("dropout that is off", lambda x: F.dropout(x, 0.5, False)),
    Case("relu", F.relu, POSITIVE_SCALES),
    Case("leaky_relu", lambda x: F.leaky_relu(x, 0.1), POSITIVE_SCALES),
    Case("abs", lambda x: x.abs(), SCALES, back=False),
    Case("neg", lambda x: -x),
    Case("tanh", torch.tanh, NONE),
    Case("relu6", F.relu6, NONE),
    Case("hardswish", F.hardswish, NONE),
    # means, maxima, positions between positions, padding
    Case("avg_pool", lambda x: F.avg_pool2d(x, 2)),
    Case("avg_pool that counts zeros", lambda x: F.avg_pool2d(x, 3, 1, 1), SCALES),
    Case("avg_pool that does not", lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
    Case("avg_pool with ceil_mode", lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True)),
    Case("avg_pool with a divisor", lambda x: F.avg_pool2d(x, 2, divisor_override=3), SCALES),
    Case("avg_pool1d", lambda x: F.avg_pool1d(x, 2), shapes=((2, 6, 8),)),
    Case("avg_pool3d", lambda x: F.avg_pool3d(x, 2), shapes=((2, 6, 4, 4, 4),)),
    Case("adaptive_avg_pool", lambda x: F.adaptive_avg_pool2d(x, 3)),
    Case("max_pool", lambda x: F.max_pool2d(x, 3, 2, 1), POSITIVE),
    Case(
        "adaptive_max_pool", lambda x: F.adaptive_max_pool2d(x, 2), ("shift", "scale", "both")
    ),  # places of maxima too
    Case("mean", lambda x: x.mean((2, 3))),
    Case("mean with keepdim", lambda x: x.mean((-1, 2), keepdim=True)),
    Case("mean over channels", lambda x: x.mean(1), NONE),
    Case("amax", lambda x: x.amax((2, 3)), POSITIVE),
    Case("sum", lambda x: x.sum((2, 3)), NONE),
    *(
        Case(f"upsample {mode}", lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode))
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic")
    ),
    Case("pad with zeros", lambda x: F.pad(x, (1, 1, 0, 2)), SCALES),
    Case("pad by reflection", lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
    Case("pad by replication", lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate")),
    Case("pad in a circle", lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")),
    Case("pad channels", lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), NONE),
    # several tensors
    Case("cat of channels", lambda x, y: torch.cat([x, y], 1), shapes=(IMAGES, (2, 3, 4, 4))),
    Case("cat of positions", lambda x, y: torch.cat([x, y], 3), shapes=(IMAGES, IMAGES)),
    Case("add", torch.add, shapes=(IMAGES, IMAGES)),
    Case("add with alpha", lambda x, y: torch.add(x, y, alpha=-2), shapes=(IMAGES, IMAGES)),
    Case("sub", torch.sub, shapes=(IMAGES, IMAGES)),
    Case("add of one row", torch.add, shapes=(IMAGES, (6, 1, 1))),
    Case("add to itself", lambda x: x + x),
    Case("add of a number", lambda x: x + 3.0),
    Case("mul by a number", lambda x: x * -1.5),
    Case("div by a number", lambda x: x / 4),
    Case("mul", torch.mul, SCALES, shapes=(IMAGES, IMAGES)),
    Case("div of a number", lambda x: 1 / x, NONE),
    Case("softmax", lambda x: x.softmax(1), NONE),
    Case("matmul", lambda x: x @ x.transpose(-1, -2), NONE),
]


class Runs(nn.Module):
    def __init__(self, run: Callable[..., object]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Tensor) -> object:
        return self.run(*args)


def map_of(kind: str, case: Case, shape: tuple[int, ...], seed: int) -> Map:
    g = torch.Generator().manual_seed(seed)
    # an operand of fewer dimensions is broadcast: its channels are as far from the end
    axis = case.axis if len(shape) == len(case.shapes[0]) else case.axis - len(case.shapes[0])
    size = shape[axis]
    scale, shift = torch.rand(size, generator=g).double() + 0.5, torch.randn(size, generator=g).double()
    if kind == "shift":
        scale = torch.ones_like(scale)
    if kind in ("scale", "negative", "zero"):
        shift = torch.zeros_like(shift)
    if kind == "negative":
        scale[::2] *= -1
    if kind == "zero":
        scale[0] = 0.0
    return Map.per_channel(scale, shift, len(shape), axis)


def traced(case: Case) -> tuple[nn.Module, Graph, list[Tensor], Parameters]:
    g = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=g).double() for shape in case.shapes]
    model = Runs(case.run).double()
    graph = trace(model, tuple(inputs))
    return model, graph, inputs, Parameters.of(model, graph)


def all_forward(graph: Graph, maps: dict[Value, Map], known: Parameters) -> list[Map]:
    """Carry maps of the inputs through every operator: what runs under one name may be several."""
    maps = dict(maps)
    for call in graph.calls:
        here = {value: maps[value] for value in call.tensor_args() if value in maps}
        if here:
            outputs = go_forward(call, here, known)
            assert not isinstance(outputs, Absorbed)
            maps |= dict(zip(call.outputs, outputs, strict=True))
    return [maps[value] for value in graph.outputs]


def all_backward(graph: Graph, wanted: list[Map], known: Parameters) -> dict[Value, Map]:
    maps = dict(zip(graph.outputs, wanted, strict=True))
    for call in reversed(graph.calls):
        if any(value in maps for value in call.outputs):
            here = [maps.get(value) or Map.identity(len(value.shape)) for value in call.outputs]
            demands = go_backward(call, here, known)
            assert not isinstance(demands, Absorbed)
            maps |= dict(demands)
    return {value: maps[value] for value in graph.inputs if value in maps}


def applied(map_: Map, x: Tensor) -> Tensor:
    return map_.scale * x + map_.shift


def listed(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


@pytest.mark.every(4)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ANY)
def test_a_map_that_crosses_changes_nothing_and_others_are_refused(case: Case, kind: str) -> None:
    model, graph, inputs, known = traced(case)
    sums = case.name.startswith(("add", "sub"))
    maps = {value: map_of(kind, case, value.shape, 0 if sums else i) for i, value in enumerate(graph.inputs)}
    if case.name == "view_as":
        del maps[graph.inputs[1]]
    if kind not in case.allowed:
        with pytest.raises(Refusal):
            all_forward(graph, maps, known)
        return
    outputs = all_forward(graph, maps, known)
    before = listed(
        model(*(applied(maps[v], x) if v in maps else x for v, x in zip(graph.inputs, inputs, strict=True)))
    )
    for old, new, map_ in zip(before, listed(model(*inputs)), outputs, strict=False):  # indices are not mapped
        torch.testing.assert_close(applied(map_, new), old, rtol=1e-12, atol=1e-12)
    if case.back:
        changed = all_backward(graph, outputs, known)
        pairs = zip(graph.inputs, inputs, strict=True)
        again = listed(model(*(applied(changed[v], x) if v in changed else x for v, x in pairs)))
        for new, old in zip(again, before, strict=True):
            torch.testing.assert_close(new, old, rtol=1e-12, atol=1e-12)


class OwnTable:
    """A dataflow brings its own table of absorbing operators: here one of one operator, which torch's has not."""

    with_borders = False

    def absorbing(self, call):
        return self if call.name == "tanh" else None

    def backward(self, call, wanted, known):
        return Absorbed("output", wanted[0])

    def forward(self, call, given, known):
        return Absorbed("input", given[call.args["self"]])


def test_which_operators_absorb_a_map_is_what_the_dataflow_says() -> None:
    graph = trace(Runs(lambda x: torch.tanh(x.neg())), (torch.ones(2, 6),))
    negation, tanh = graph.calls
    map_, known = Map.per_channel(torch.full((6,), 2.0), torch.ones(6), 2), OwnTable()
    assert go_backward(tanh, [map_], known).map is map_
    assert go_forward(tanh, {tanh.args["self"]: map_}, known).side == "input"
    assert not isinstance(go_backward(negation, [map_], known), Absorbed)


def test_the_algebra_imports_none_of_torchs_modules() -> None:
    for file in Path(rules.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in imported if name.startswith(("torch.nn", "torch.fx"))], file
