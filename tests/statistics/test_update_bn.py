"""The drop-in takes what torch's function takes, and is right where that one is not."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.optim import swa_utils
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from batchnorm.errors import BatchError, StateError
from batchnorm.nn import freeze
from batchnorm.statistics import recalibrate, update_bn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2), nn.BatchNorm1d(2))


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in model.state_dict().items()}


def data(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, generator=generator) + 5 * k for k, n in enumerate(sizes)]


def test_it_is_called_as_torchs_function_is() -> None:
    theirs = inspect.signature(swa_utils.update_bn).parameters
    ours = inspect.signature(update_bn).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [ours[name].default for name in theirs] == [p.default for p in theirs.values()]
    assert all(p.kind is p.KEYWORD_ONLY for name, p in ours.items() if name not in theirs)


def test_uneven_batches_weigh_what_they_hold_where_torchs_weigh_alike() -> None:
    batches = data(64, 64, 2)
    exact = torch.cat(batches).double()
    ours, theirs = AveragedModel(nn.Sequential(nn.BatchNorm1d(3))), AveragedModel(nn.Sequential(nn.BatchNorm1d(3)))
    update_bn(batches, ours)
    swa_utils.update_bn(batches, theirs)
    torch.testing.assert_close(ours.module[0].running_mean, exact.mean(0).float())
    torch.testing.assert_close(ours.module[0].running_var, exact.var(0).float())
    assert (theirs.module[0].running_mean - exact.mean(0)).min() > 2
    assert (theirs.module[0].running_var / exact.var(0)).max() < 0.5


def test_on_even_batches_within_is_torchs_function_but_for_dropout() -> None:
    batches = [data(32)[0] + k for k in range(4)]
    ours, theirs = network(), network()
    for model in (ours, theirs):
        model[2].p = 0.0
    update_bn(batches, ours, order="parallel", estimator="within")
    swa_utils.update_bn(batches, theirs)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "loader"])
def test_it_takes_the_batches_that_torchs_function_takes(kind: str) -> None:
    x = torch.cat(data(32, 32))
    loaders: dict[str, Any] = {
        "tensor": x.split(16),
        "tuple": [(part, "label") for part in x.split(16)],
        "list": [[part, None, 3] for part in x.split(16)],
        "loader": DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=16),
    }
    expected, model = network(), network()
    recalibrate(expected, x.split(16))
    result = update_bn(loaders[kind], model)
    assert bits(model) == bits(expected)
    assert [layer.name for layer in result.layers] == ["1", "4"]
    result.undo()
    assert bits(model) == bits(network())


def test_a_tensor_holds_batches_along_its_first_dimension() -> None:
    x = torch.stack(data(8, 8, 8))
    expected, model, theirs = network(), network(), network()
    recalibrate(expected, list(x))
    update_bn(x, model)
    assert bits(model) == bits(expected)
    swa_utils.update_bn(x, theirs)
    assert theirs[1].num_batches_tracked == model[1].num_batches_tracked == 3


@pytest.mark.parametrize(
    "loader", [[], iter(()), torch.zeros(0, 8, 4), DataLoader([])], ids=["list", "iterator", "tensor", "loader"]
)
def test_an_empty_loader_changes_nothing(loader: Any) -> None:
    model = network()
    before = bits(model)
    with pytest.warns(UserWarning, match="expected at least one batch.* The statistics are as they were") as caught:
        result = update_bn(loader, model)
    assert bits(model) == before
    assert result.layers == ()
    assert caught[0].filename == __file__


class OfList(nn.Module):
    """Takes its two inputs as one list, as detection models do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, inputs: Any) -> Tensor:
        x = inputs.data if isinstance(inputs, PackedSequence) else torch.cat(inputs)
        normalized: Tensor = self.norm(x)
        return normalized


@pytest.mark.parametrize(
    "batch", [[[torch.ones(4, 3), torch.zeros(4, 3)], "label"], (pack_sequence([torch.ones(4, 3), torch.zeros(4, 3)]),)]
)
def test_the_first_element_is_passed_on_whatever_it_is(batch: Any) -> None:
    if isinstance(batch[0], PackedSequence):
        batch = [batch[0], "label"]
    model = OfList()
    update_bn([batch], model, device="cpu")
    assert model.norm.running_mean.tolist() == [0.5, 0.5, 0.5]


def test_dicts_are_keyword_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, *, x: Tensor) -> Tensor:
            normalized: Tensor = self.norm(x)
            return normalized

    model = Named()
    update_bn([({"x": torch.ones(4, 3)}, "label")], model, device="cpu")
    assert model.norm.running_mean.tolist() == [1, 1, 1]


class Moving:
    """Stands for a batch that knows how to move, and remembers where it was asked to."""

    def __init__(self, x: Tensor, asked: list[Any]) -> None:
        self.x, self.asked = x, asked

    def to(self, device: Any) -> Tensor:
        self.asked.append(device)
        return self.x


def test_inputs_are_moved_and_labels_are_not() -> None:
    asked: list[Any] = []
    x, model = torch.ones(4, 3), nn.Sequential(nn.BatchNorm1d(3))
    update_bn([(Moving(x, asked), Moving(x, [None]))], model, torch.device("cpu"))
    assert asked == [torch.device("cpu")]
    update_bn([(x, Moving(x, asked))], model, "cpu", forward=lambda model, batch: model(batch[0]))
    assert asked == [torch.device("cpu"), "cpu"]  # forward is given the batch, all of it moved


def test_an_averaged_model_is_judged_by_the_mode_of_the_model_inside() -> None:
    inside = network()
    freeze(inside, "4")
    model = AveragedModel(inside.eval())  # the wrapper is in train mode, and says nothing about who froze what
    modes = [m.training for m in model.modules()]
    result = update_bn(data(32), model)
    assert [layer.name for layer in result.layers] == ["1"]
    assert [(left.name, left.reason) for left in result.left] == [("4", "frozen")]
    assert [m.training for m in model.modules()] == modes
    by_hand = network().train()
    by_hand[1].eval()
    assert [left.name for left in update_bn(data(32), AveragedModel(by_hand)).left] == ["1"]


def test_the_averaged_weights_are_what_is_measured() -> None:
    models = [network(), network()]
    with torch.no_grad():
        models[1][0].weight.mul_(3)
    average = AveragedModel(models[0])
    for model in models:
        average.update_parameters(model)
    (x,) = data(64)
    update_bn([x], average, names="1")
    met = average.module[0](x).double()
    torch.testing.assert_close(average.module[1].running_var, met.var(0).float(), rtol=1e-5, atol=1e-6)
    assert average.n_averaged == 2


def test_a_forward_of_a_subclass_of_the_averaged_model_is_called() -> None:
    class Doubling(AveragedModel):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return self.module(2 * x)

    model = Doubling(nn.Sequential(nn.BatchNorm1d(3)))
    update_bn([torch.ones(4, 3)], model)
    assert model.module[0].running_mean.tolist() == [2, 2, 2]


def test_a_model_without_norms_is_left_and_its_loader_is_not_read() -> None:
    def loader() -> Any:
        raise AssertionError("read")
        yield

    result = update_bn(loader(), nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))
    assert (result.layers, result.left, result.batches) == ((), (), 0)
    result.undo()


def test_buffers_of_one_size_that_no_norm_uses_are_no_error() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cos", torch.ones(3))
            self.register_buffer("sin", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.cos + self.sin

    assert update_bn(data(8), Rotary()).layers == ()


def test_norms_that_are_all_frozen_are_an_error() -> None:
    model = network()
    freeze(model)
    with pytest.raises(StateError, match="none of the norms can be recalibrated"):
        update_bn(data(8), model)


def test_what_goes_wrong_leaves_the_model_as_it_was() -> None:
    model = AveragedModel(network().train())
    before, modes = bits(model), [m.training for m in model.modules()]
    momenta = [model.module[1].momentum, model.module[4].momentum]

    def failing() -> Any:
        yield from data(8, 8)
        raise OSError("disk on fire")

    for loader, error in ((failing(), BatchError), ([data(8)[0], "text"], BatchError)):
        with pytest.raises(error):
            update_bn(loader, model)
        assert bits(model) == before
        assert [m.training for m in model.modules()] == modes
        assert [model.module[1].momentum, model.module[4].momentum] == momenta


def test_dropout_stays_off() -> None:
    model = network()
    twin = copy.deepcopy(model)
    twin[2].p = 0.0
    update_bn(data(64), model)
    update_bn(data(64), twin)
    assert bits(model) == bits(twin)
