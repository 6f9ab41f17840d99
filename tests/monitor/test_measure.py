"""What measure says, and that it leaves the model as it was however it ends."""

import copy
import threading

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import (
    ArgumentTypeError,
    BatchError,
    EmptyStreamError,
    NonFiniteError,
    ShapeError,
    StateError,
    UnknownNameError,
)
from batchnorm.monitor import measure


def images(n: int, seed: int, size: int = 8) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Identity())


def state(model: nn.Module) -> tuple:
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    return tensors, [m.training for m in model.modules()], [len(m._forward_pre_hooks) for m in model.modules()]


def assert_as_before(model: nn.Module, before: tuple, random: torch.Tensor) -> None:
    tensors, modes, hooks = state(model)
    assert all(torch.equal(tensors[name], value) for name, value in before[0].items())
    assert (modes, hooks) == before[1:]
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_measured_in_eval_mode_and_left_as_it_was(model: nn.Module, training: bool) -> None:
    model.train(training)
    model[0].eval()
    before, random = state(model), torch.get_rng_state()
    data = [images(8, seed) for seed in range(4)]
    population = measure(model, data)
    assert_as_before(model, before, random)
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        given = {"1@input": twin[0](torch.cat(data)), "4@input": twin[:4](torch.cat(data))}
    for key, x in given.items():
        moments = population.layers[key].moments
        torch.testing.assert_close(moments.mean, x.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.variance(), x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)
    assert (population.layers["1@input"].of_norm, population.layers["4@input"].of_norm) == (True, False)


class Bad(nn.Module):
    """Raises in its third call, after a norm that has moved by then."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.calls, self.error = 0, error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.norm.running_mean += 1  # as custom layers do, in whatever mode
        x = self.norm(x)
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return x


def interrupted():
    yield images(4, 0)
    raise KeyboardInterrupt


def broken():
    yield images(4, 0)
    raise OSError("disk gone")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("model", "batches", "error"),
    [
        (Bad(ValueError("bad")), [images(4, i) for i in range(5)], BatchError),
        (Bad(KeyboardInterrupt()), [images(4, i) for i in range(5)], KeyboardInterrupt),
        (nn.BatchNorm2d(3), interrupted, KeyboardInterrupt),
        (nn.BatchNorm2d(3), broken, BatchError),
        (nn.BatchNorm2d(3), [images(4, 0), images(4, 1) * torch.nan], NonFiniteError),
    ],
    ids=["model raises", "model interrupted", "data interrupted", "data raise", "NaN"],
)
def test_nothing_is_left_moved_by_what_is_raised(model: nn.Module, batches, error, training: bool) -> None:
    model = copy.deepcopy(model).train(training)
    before, random = state(model), torch.get_rng_state()
    with pytest.raises(error):
        measure(model, batches() if callable(batches) else batches)
    assert_as_before(model, before, random)


STREAMS = {
    "one tensor": images(4, 0),
    "one dict": {"input": images(4, 0)},
    "a text": "abc",
    "no batch": [],
    "numbers": [1, 2],
    "wrong shape": [images(4, 0), torch.zeros(2, 5, 8, 8)],
    "empty batches": [images(0, 0)] * 3,
    "NaN": [images(4, 0), images(4, 1) * torch.nan],
    "infinity": [images(4, 0), images(4, 1) / 0],
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
def test_the_sentences_are_those_of_recalibrate(model: nn.Module, stream) -> None:
    raised = []
    for verb in (batchnorm.recalibrate, measure):
        with pytest.raises((ArgumentTypeError, BatchError, EmptyStreamError, NonFiniteError, ShapeError)) as caught:
            verb(model, stream)
        raised.append((caught.type, str(caught.value).replace("recalibrate:", "measure:")))
    assert raised[0] == raised[1]


class Swallows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return self.norm(x)
        except Exception:
            return x


def test_values_that_are_not_finite_are_told_whatever_the_model_makes_of_it() -> None:
    x = images(4, 1)
    x[2, 1, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"batch 1 .* norm met NaN or infinity in 1 of its 3 channels"):
        measure(Swallows(), [images(4, 0), x])
    made = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        made[0].weight[2] = torch.inf
    with pytest.raises(NonFiniteError, match="The batch is finite, so a layer before this one made them"):
        measure(made, [images(4, 0)] * 2)


def test_what_was_not_measured_is_named(model: nn.Module) -> None:
    with pytest.raises(UnknownNameError, match="'7'"):
        measure(model, [images(4, 0)], "7")
    with pytest.raises(StateError, match="two batches or more"):
        measure(model, [images(4, 0), images(0, 0)])
    with pytest.raises(StateError, match="no place of ReLU was given a tensor"):
        measure(nn.ReLU(), [images(4, 0)] * 2)
    with pytest.raises(StateError, match="weight has no value yet"):
        measure(nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)), [images(4, 0)] * 2)


def test_it_has_the_model_to_itself(model: nn.Module) -> None:
    met, problems = threading.Event(), []

    def other() -> None:
        met.wait(60)
        try:
            batchnorm.recalibrate(model, [images(4, 0)] * 2, progress=False)
        except StateError as error:
            problems.append(str(error))

    thread = threading.Thread(target=other)

    def data():
        yield images(4, 0)
        met.set()
        thread.join(60)
        yield images(4, 1)

    thread.start()
    measure(model, data())
    assert "is being worked on by measure already" in problems[0]


def test_forward_says_how_the_model_is_called(model: nn.Module) -> None:
    batches = [{"image": images(4, seed)} for seed in range(2)]
    with pytest.raises(BatchError, match="forward=lambda model, batch"):
        measure(model, batches)
    a = measure(model, batches, forward=lambda model, batch: model(batch["image"]))
    b = measure(model, [batch["image"] for batch in batches])
    assert a.layers["1@input"].moments == b.layers["1@input"].moments


def test_a_block_that_is_open_changes_nothing(model: nn.Module) -> None:
    data = [images(4, seed) for seed in range(2)]
    plain = measure(model, data)
    with batchnorm.use("batch", model):
        within = measure(model, data)
    assert plain.layers["4@input"].moments == within.layers["4@input"].moments


def test_a_population_is_one_line() -> None:
    population = measure(nn.Sequential(*(nn.BatchNorm1d(300) for _ in range(50))), [torch.zeros(4, 300)] * 2)
    text = repr(population)
    assert text == "<Population of 50 layers: 0@input, 1@input, 2@input, ...; 8 values a channel, 2 batches>"
    assert repr(population.layers["7@input"]) == "LayerPopulation(300 channels, 8 values a channel, 2 batches)"
    assert population._repr_html_() == f"<code>{text.replace('<', '&lt;').replace('>', '&gt;')}</code>"
