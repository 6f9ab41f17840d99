"""Layers get weights of their own only where that computes the same, and all of it can be taken back."""

import copy

import pytest
import torch
from tests.folding.lively_models import Drawn, Standardized, lively, randn
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from batchnorm import fold, refold, unfold
from batchnorm.dataflow.trace import trace
from batchnorm.folding.planning.own_weights import ComputedWeights, ties, untie


def computed_layers(model, inputs):
    weights = ComputedWeights()
    return weights.layers(trace(model, inputs, observer=weights.observe))


def test_ties_are_named_by_their_first_place():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[2].weight, net[1].bias = net[0].weight, net[0].bias
    assert ties(net) == {"1.bias": "0.bias", "2.weight": "0.weight"}


def test_one_module_under_two_names_is_no_tie():
    layer = nn.Linear(3, 3)
    assert ties(nn.Sequential(layer, layer)) == {}


def test_untied_parameters_are_equal_and_apart():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    net[0].weight.requires_grad_(False)
    untie(net)
    assert net[0].weight is not net[1].weight
    assert torch.equal(net[0].weight, net[1].weight)
    assert not net[1].weight.requires_grad


@pytest.mark.parametrize("layer", [
    lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3, padding=1, groups=2)),
    lambda: parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2)),
    lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    lambda: Standardized(4, 6, 3, padding="same", dilation=2),
])  # fmt: skip
def test_the_stored_layer_computes_what_the_other_did(layer):
    net = nn.Sequential(layer()).double().eval()
    shape = {nn.Conv1d: (2, 4, 9), nn.Linear: (2, 4)}
    inputs = randn(*next((s for kind, s in shape.items() if isinstance(net[0], kind)), (2, 4, 9, 9)))
    stored = computed_layers(net, inputs)
    assert list(stored) == ["0"]
    with torch.no_grad():
        torch.testing.assert_close(stored["0"](inputs), net(inputs), rtol=0, atol=0)
    assert not stored["0"].training
    assert stored["0"].weight.requires_grad


@pytest.mark.parametrize("change", ["a hook", "reads its input", "called twice, other weights", "an ordinary one"])
def test_what_is_left_as_it_is(change):
    layer = Drawn(3, 4, 1) if change == "reads its input" else Standardized(3, 4, 1)
    if change == "an ordinary one":
        layer = nn.Conv2d(3, 4, 1)
    if change == "a hook":
        layer.register_forward_hook(lambda *_: None)
    if change == "called twice, other weights":
        layer = Turns(3, 3, 1)
    net = nn.Sequential(layer, layer) if layer.out_channels == 3 else nn.Sequential(layer)
    assert computed_layers(net.double().eval(), randn(2, 3, 5, 5)) == {}


class Turns(nn.Conv2d):
    """Uses another weight each time."""

    def forward(self, x):
        self.turn = getattr(self, "turn", 0) + 1
        return self._conv_forward(x, self.weight * self.turn, self.bias)


def test_only_layers_that_took_a_norm_in_are_replaced():
    net = nn.Sequential(Standardized(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), Standardized(4, 4, 1))
    result = fold(lively(net), randn(2, 3, 5, 5))
    assert [type(m) for m in result.model] == [nn.Conv2d, nn.Identity, nn.ReLU, Standardized]


def test_all_comes_back_from_a_file(tmp_path):
    net = lively(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)))
    result = fold(copy.deepcopy(net), randn(2, 3, 5, 5), inplace=True)
    result.save_pairs(tmp_path / "pairs.safetensors")
    back = unfold(result.model, tmp_path / "pairs.safetensors", like=net)
    assert list(back.state_dict()) == list(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), net.state_dict().values(), strict=True))


def test_ties_come_back_from_a_file(tmp_path):
    net = lively(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)))
    net[2].weight = net[0].weight
    result = fold(net, randn(3, 4))
    assert len(result.folded) == 2
    result.save_pairs(tmp_path / "pairs.safetensors")
    for back in (result.unfold(), unfold(result.model, tmp_path / "pairs.safetensors")):
        assert back[0].weight is back[2].weight
        torch.testing.assert_close(back(randn(3, 4)), net(randn(3, 4)), rtol=0, atol=0)


def test_a_layer_of_which_the_model_reads_more_than_the_output_stays():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.bn1 = parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)
            self.two, self.bn2 = parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)

        def forward(self, x):
            x = torch.tanh(self.bn1(self.one(x.to(self.one.parametrizations.weight.original1.dtype))))
            return self.bn2(self.two(x))

    net = lively(Reads())
    result = fold(net, randn(2, 3, 5, 5))
    assert [norm.norm for norm in result.folded] == ["bn2"]
    assert "_weight_norm" in result.left[0].reason
    torch.testing.assert_close(result.model(randn(1, 3, 4, 4)), net(randn(1, 3, 4, 4)))


def test_what_computed_layers_have_in_common_comes_back(tmp_path):
    """One parametrization of two layers, and one parameter of a layer that is folded and one that is not."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, weight):
            return weight * self.scale

    net = nn.Sequential(*(nn.Linear(4, 4) if n % 2 == 0 else nn.BatchNorm1d(4) for n in range(4)), nn.Tanh())
    net.append(nn.Linear(4, 4))
    both = Scaled()
    for layer, scaled in zip((net[0], net[2], net[5]), (both, both, Scaled()), strict=True):
        parametrize.register_parametrization(layer, "weight", scaled)
    net[5].parametrizations.weight[0].scale = both.scale
    net = lively(net)
    result = fold(net, randn(3, 4))
    assert len(result.folded) == 2
    back = result.unfold()
    one, two, three = (back[n].parametrizations.weight[0] for n in (0, 2, 5))
    assert one is two
    assert one.scale is three.scale
    result.save_pairs(tmp_path / "pairs.safetensors")
    from_file = unfold(result.model, tmp_path / "pairs.safetensors", like=net)
    assert from_file[0].parametrizations.weight[0].scale is from_file[5].parametrizations.weight[0].scale
    for model in (back, from_file):
        torch.testing.assert_close(model(randn(3, 4)), net(randn(3, 4)), rtol=0, atol=0)


def test_raw_inputs_into_a_layer_that_computed_its_weight(tmp_path):
    net = lively(nn.Sequential(Standardized(3, 4, 3, padding=1), nn.BatchNorm2d(4)))
    result = fold(net, randn(2, 3, 5, 5), input_mean=[1.0, 2.0, 3.0], input_std=2.0)
    result.save_pairs(tmp_path / "pairs.safetensors")
    for back in (result.unfold(), unfold(result.model, tmp_path / "pairs.safetensors", like=net)):
        torch.testing.assert_close(back(randn(3, 3, 5, 5)), net(randn(3, 3, 5, 5)), rtol=0, atol=0)
    deployed = refold(copy.deepcopy(net), tmp_path / "pairs.safetensors")
    deployed.load_state_dict(result.model.state_dict())
    torch.testing.assert_close(deployed(randn(3, 3, 5, 5)), result.model(randn(3, 3, 5, 5)), rtol=0, atol=0)


class Counted(nn.Conv2d):
    """Computes its weight of a number that somebody sets."""

    number = 1.0

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.number, self.bias)


@pytest.mark.parametrize("counts", [False, True])
def test_a_weight_that_is_computed_of_a_number_that_changes_is_not_stored(counts):
    class Sets(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = Counted(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            self.conv.number = self.conv.number + 1 if counts else float(x.abs().mean())
            return self.bn(self.conv(x))

    net, x = lively(Sets()), randn(2, 3, 5, 5, seed=1)
    result = fold(net, randn(2, 3, 5, 5))
    assert not result.folded
    assert counts or torch.equal(result.model(x), net(x))
