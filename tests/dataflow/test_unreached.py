"""Which code of a model no run reached, of that which depends on its inputs."""

import sys
import warnings

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.dataflow.unreached import Reached

COLUMNS = pytest.mark.skipif(sys.version_info < (3, 11), reason="columns of instructions are not known")


def told(model, *inputs):
    reached = Reached(model)
    for args in inputs:
        with reached.watching():
            model(*args)
    return " ".join(reached.sentences())


class Ways(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.wide = Part(), False

    def forward(self, x, flag=False, kind="a"):
        """A text is no code."""
        if flag:
            return x
        if self.wide and len(x):
            x = 2 * x
        if self.training:
            x = 3 * x
        if kind == "c":
            raise ValueError
        for _ in range(len(x) - 2):
            x = x + 1
        y = [self.part(item) if kind == "a" else item for item in x]
        if len(x) > 100:
            total = sum(y)
            total = total + 1
        elif kind == "z":
            total = x
        else:
            total = y[0]
        return total


class Part(nn.Module):
    def forward(self, x, scale=None):
        if scale is not None:
            x = x * scale
        if x.sum() > 0:
            return x
        return -x


X = torch.ones(2, 3)


def test_ways_that_inputs_may_take_are_named_with_what_they_depend_on():
    sentence = told(Ways().eval(), (X,))
    for condition in ("`flag`", "`range(len(x) - 2)`", "`len(x) > 100`", "`kind == 'z'`"):
        assert condition in sentence or "more" in sentence
    assert "`flag`" in sentence
    assert "test_unreached.py:" in sentence


def test_settings_modes_errors_and_defaults_that_a_part_has_are_not():
    sentence = told(Ways().eval(), (X,))
    for word in ("wide", "training", "kind == 'c'", "scale", "A text"):
        assert word not in sentence


class Settings(nn.Module):
    """Local variables that hold settings of the model, and some that only look as if they did."""

    def __init__(self):
        super().__init__()
        self.blur, self.parts, self.limit = None, nn.ModuleList([Part()]), 3

    def forward(self, x):
        blur = getattr(self, "blur", None)
        again = blur
        if again is not None:
            x = again(x)
        for number, part in enumerate(self.parts):
            if number > 2 and part is not None:
                x = part(x)
        limit = self.limit
        if len(x) > limit:
            x = -x
        chosen = self.blur
        if len(x) > 50:
            chosen = self.parts
        if chosen is not None:
            x = x + 1
        found = False
        if x.sum() < -1000:
            found = True
        if found:
            x = x + 2
        return x


def test_what_a_local_variable_reads_from_the_model_alone_is_a_setting_of_it():
    sentence = told(Settings().eval(), (X,))
    for setting in ("again", "number"):
        assert setting not in sentence
    for condition in ("`len(x) > limit`", "`len(x) > 50`", "`chosen is not None`", "`x.sum() < -1000`"):
        assert condition in sentence
    assert "and 1 more" in sentence  # `found`


def test_what_another_run_reached_is_reached():
    net = Ways().eval()
    runs = [(X,), (X, True), (torch.ones(101, 3),), (X, False, "z"), (-X,)]
    assert told(net, *runs) == ""
    assert "x.sum() > 0" in told(net, *runs[:-1])


@COLUMNS
def test_a_choice_within_a_line():
    class Choice(nn.Module):
        def forward(self, x, kind="a"):
            return x if kind == "a" else -x

    assert "`kind == 'a'`" in told(Choice(), (X,))
    assert told(Choice(), (X,), (X, "b")) == ""


def test_the_code_of_torch_is_not_looked_at_and_who_watches_is_put_back():
    seen = []

    def watcher(frame, event, arg):
        seen.append(event)

    before = sys.gettrace()
    sys.settrace(watcher)
    try:
        assert told(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), (X,)) == ""
        assert told(Ways().eval(), (X,)) != ""
        assert sys.gettrace() is watcher
    finally:
        sys.settrace(before)


class Caching(nn.Module):
    """What it computes once for each device, and once for each number of rows."""

    def __init__(self):
        super().__init__()
        self.by_device, self.by_rows = {}, {}

    def of_device(self, device):
        key = str(device)
        if key not in self.by_device:
            self.by_device[key] = 1.0
        return self.by_device[key]

    def of_rows(self, rows, device):
        if rows not in self.by_rows:
            self.by_rows[rows] = rows
        if (rows, device) not in self.by_device:
            self.by_device[rows, device] = rows
        return self.by_rows[rows]

    def forward(self, x):
        return x * self.of_device(x.device) + self.of_rows(len(x), x.device)


def test_what_a_model_has_kept_for_its_device_is_no_way_that_inputs_take():
    model = Caching()
    model(X)  # so that nothing is computed while the model is watched
    sentence = told(model, (X,))
    assert "`rows not in self.by_rows`" in sentence
    assert "`(rows, device) not in self.by_device`" in sentence
    assert "key" not in sentence


class Modes(nn.Module):
    """Goes other ways in other modes; what only says or packs something there is none."""

    def __init__(self, condition):
        super().__init__()
        self.condition, self.conv, self.bn = condition, nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3)

    def forward(self, x):
        return getattr(self, self.condition)(self.conv(x))

    def grad(self, x):
        if torch.is_grad_enabled():
            return self.bn(x)
        return self.bn(x) + x

    def inference(self, x):
        return x - 1 if torch.is_inference_mode_enabled() else self.bn(x)

    def training_part(self, x):
        if self.training:
            x = self.conv(x)
        return x

    def scripting(self, x):
        if not torch.jit.is_scripting():
            return self.bn(x)
        return x.clone()

    def tracing(self, x):
        if torch.jit.is_tracing():
            x = x * 2
        return x

    def onnx(self, x):
        if torch.onnx.is_in_onnx_export():
            x = -x
        return x

    def compiling(self, x):
        return self.bn(x) if not torch.compiler.is_compiling() else self.conv(x)

    def device(self, x):
        if next(self.parameters()).is_cuda:
            x = self.bn(x)
        return x

    def dtype(self, x):
        if self.conv.weight.dtype == torch.float16:
            x = x.float()
        return x

    def grad_return(self, x):
        if torch.is_grad_enabled():
            return x
        return self.bn(x)

    def training_return(self, x):
        if self.training:
            return x
        return self.bn(x)

    def tracing_else(self, x):
        if torch.jit.is_tracing():
            return x
        else:  # noqa: RET505
            return self.bn(x)

    def grad_past(self, x):
        if not torch.is_grad_enabled():
            x = self.bn(x)
        return x

    def training_past(self, x):
        if not self.training:
            x = self.bn(x)
        return x

    def compiling_break(self, x):
        for layer in (self.conv, self.bn):
            if torch.compiler.is_compiling():
                break
            x = layer(x)
        return x

    def input_device(self, x):
        if x.device.type == "cuda":
            return 2 * x
        return self.bn(x)

    def input_cuda(self, x):
        if x.is_cuda:
            x = 2 * x
        return self.bn(x)

    def input_dtype(self, x):
        if x.dtype == torch.float16:
            return 2 * x
        return self.bn(x)

    def training_value(self, x):
        if self.training:
            x = x * 2
        return x

    def says(self, x):
        if torch.jit.is_scripting():
            warnings.warn("scripted", stacklevel=1)
            return Packed(x)
        return x

    def says_else(self, x):
        if torch.jit.is_scripting():
            return Packed(x)
        else:  # noqa: RET505
            return self.packed(x)

    def packed(self, x):
        return x

    def stops(self, x):
        if torch.onnx.is_in_onnx_export():
            raise NotImplementedError
        return x

    def setting(self, x):
        if self.condition == "other" and torch.jit.is_scripting():
            x = -x
        return x


class Packed(tuple):
    pass


M = torch.ones(2, 3, 4)


@pytest.mark.parametrize(("condition", "asks"), [
    ("grad", "torch.is_grad_enabled()"), ("training_part", "self.training"),
    ("scripting", "not torch.jit.is_scripting()"),
    ("tracing", "torch.jit.is_tracing()"), ("onnx", "torch.onnx.is_in_onnx_export()"),
    ("training_return", "self.training"), ("tracing_else", "torch.jit.is_tracing()"),
    ("training_past", "not self.training"), ("compiling_break", "torch.compiler.is_compiling()"),
    ("input_device", "x.device.type == 'cuda'"), ("input_cuda", "x.is_cuda"),
    ("input_dtype", "x.dtype == torch.float16"),
    ("device", "next(self.parameters()).is_cuda"), ("dtype", "self.conv.weight.dtype == torch.float16"),
    pytest.param("inference", "torch.is_inference_mode_enabled()", marks=COLUMNS),
    pytest.param("compiling", "not torch.compiler.is_compiling()", marks=COLUMNS),
])  # fmt: skip
def test_a_way_of_another_mode_is_named(condition, asks):
    sentence = told(Modes(condition).eval(), (M,))
    assert "The model's code goes other ways in another mode" in sentence
    assert f"(`{asks}" in sentence
    assert "examples=" not in sentence
    (warning,) = batchnorm.fold(Modes(condition).eval(), M).warnings
    assert f"(`{asks}" in warning


@pytest.mark.parametrize("condition", ["training_value", "says", "says_else", "stops", "setting"])
def test_what_computes_nothing_in_another_mode_is_not(condition):
    assert told(Modes(condition).eval(), (M,)) == ""


@pytest.mark.parametrize(("condition", "grad"), [("grad_return", False), ("grad_past", False)])
def test_a_way_that_leaves_a_layer_out_in_another_mode_is_named(condition, grad):
    with torch.set_grad_enabled(grad):
        assert "is_grad_enabled()`" in told(Modes(condition).eval(), (M,))


def test_what_asks_for_a_device_and_for_a_size_is_a_way_that_inputs_take():
    class Mixed(nn.Module):
        def forward(self, x):
            if x.is_cuda or len(x) > 100:
                x = x + 1
            return x

    assert "examples=" in told(Mixed(), (X,))


def test_both_kinds_of_ways_have_a_sentence_each():
    class Both(Modes):
        def forward(self, x, flag=False):
            if flag:
                return x
            return self.grad(x)

    reached = Reached(model := Both("grad").eval())
    with reached.watching():
        model(M)
    by_inputs, in_modes = reached.sentences()
    assert "`flag`" in by_inputs
    assert "is_grad_enabled" in in_modes


class Skips(nn.Module):
    """Ways past a norm that have no code of their own."""

    def __init__(self, way):
        super().__init__()
        self.way, self.other, self.norm = way, None, nn.BatchNorm1d(3)
        self.layers = nn.ModuleList([nn.Linear(3, 3), self.norm, nn.ReLU()])

    def forward(self, x, flag=False, which=None):
        return getattr(self, self.way)(x, flag, which)

    def not_flag(self, x, flag, which):
        # fmt: off
        if not flag: x = self.norm(x)  # noqa: E701
        # fmt: on
        return x

    def value(self, x, flag, which):
        if x.abs().max() < 1e3:
            x = self.norm(x)
        return x

    def both(self, x, flag, which):
        if len(x) < 100 and not flag:
            x = self.norm(x)
        return x

    def other_else(self, x, flag, which):
        if flag and which is None:
            x = x + 1
        elif len(x) < 100:
            x = self.norm(x)
        return x

    def breaks(self, x, flag, which):
        for number, layer in enumerate(self.layers):
            if number == which:
                break
            x = layer(x)
        return x

    def continues(self, x, flag, which):
        for number, layer in enumerate(self.layers):
            # fmt: off
            if number == which: continue  # noqa: E701
            # fmt: on
            x = layer(x)
        return x

    def in_a_loop(self, x, flag, which):
        for layer in self.layers:
            if not flag:
                x = layer(x)
        return x

    def setting(self, x, flag, which):
        if self.other is None:
            x = self.norm(x)
        if isinstance(x, torch.Tensor):
            x = self.norm(x)
        if not flag:
            which = [x]
        return which[0]

    def raises(self, x, flag, which):
        if not flag:
            return self.norm(x)
        raise ValueError


@pytest.mark.parametrize(("way", "asks", "others"), [
    pytest.param("not_flag", "`not flag` was only ever true", [(X, True)], marks=COLUMNS),
    ("value", "`x.abs().max() < 1000.0` was only ever true", [(1e4 * X,)]),
    ("both", "`len(x) < 100 and (not flag)` was only ever true", [(X, True)]),
    ("other_else", "`len(x) < 100` was only ever true", [(X, True), (torch.ones(100, 3),)]),
    ("breaks", "(`number == which`)", [(X, False, 1)]),
    pytest.param("continues", "(`number == which`)", [(X, False, 1)], marks=COLUMNS),
    ("in_a_loop", "`not flag` was only ever true", [(X, True)]),
])  # fmt: skip
def test_a_way_past_a_norm_needs_no_code_of_its_own(way, asks, others):
    net = Skips(way).eval()
    sentence = told(net, (X,))
    assert asks in sentence
    assert "examples=[...]" in sentence
    (warning,) = batchnorm.fold(net, X).warnings
    assert asks in warning
    assert told(net, (X,), *others) == ""


@pytest.mark.parametrize("way", ["setting", "raises"])
def test_settings_what_computes_nothing_and_errors_are_no_ways_past(way):
    assert told(Skips(way).eval(), (X,)) == ""


class Bounds(nn.Module):
    """Loops and slices whose bounds are arguments that have defaults."""

    def __init__(self, way):
        super().__init__()
        self.way, self.layers = way, nn.ModuleList([nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU()])

    def forward(self, x, depth=3, upto=None, keep=(0, 1)):
        if self.way == "range":
            for number in range(depth):
                x = self.layers[number](x)
        if self.way == "slice":
            for layer in self.layers[:upto]:
                x = layer(x)
        if self.way == "names":
            for number in keep:
                x = self.layers[number](x)
        if self.way == "while":
            number = 0
            while number < depth:
                x, number = self.layers[number](x), number + 1
        if self.way == "given":
            part = nn.Sequential(*self.layers[:upto])
            x = part(x)
        if self.way == "nothing":
            for number in range(3):
                x = self.layers[number](x)
        return x


@pytest.mark.parametrize(("way", "asks", "other"), [
    ("range", "`range(depth)` with another value of `depth`", (X, 1)),
    ("slice", "`self.layers[:upto]` with another value of `upto`", (X, 3, 1)),
    ("names", "`keep` with another value of `keep`", (X, 3, None, (0,))),
    ("while", "`number < depth` with another value of `depth`", (X, 1)),
    ("given", "`self.layers[:upto]` with another value of `upto`", (X, 3, 1)),
])  # fmt: skip
def test_a_bound_with_a_default_that_no_run_varied_is_told(way, asks, other):
    net = Bounds(way).eval()
    assert asks in told(net, (X,))
    (warning,) = batchnorm.fold(net, X).warnings
    assert asks in warning
    assert told(net, (X,), other) == ""


def test_a_bound_that_is_the_models_own_or_a_tensor_is_not():
    class OfTensor(nn.Module):
        def forward(self, x, rows=X):
            return x + sum(2 * row for row in rows)

    assert told(Bounds("nothing").eval(), (X,)) == ""
    assert told(OfTensor(), (X,)) == ""
