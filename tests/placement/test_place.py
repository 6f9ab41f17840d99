from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm.nn
from batchnorm.dataflow.trace import trace
from batchnorm.errors import InputError, StateError
from batchnorm.placement import place as place_module
from batchnorm.placement.place import PlaceResult, place

EPS = torch.finfo(torch.float32).eps


def convnet() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(inplace=True)),
        *(nn.Flatten(), nn.Linear(32, 10), nn.Dropout(0.2), nn.ReLU(), nn.Linear(10, 4)),
    )


def mlp(activation: type[nn.Module] = nn.Sigmoid) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), activation(), nn.Linear(12, 12), activation(), nn.Linear(12, 3))


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {key: value.clone() for key, value in model.state_dict().items()},
        "modes": {name: m.training for name, m in model.named_modules()},
        "modules": {name: id(m) for name, m in model.named_modules(remove_duplicate=False)},
    }


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["modes"] == other["modes"]
    assert one["modules"] == other["modules"]
    assert one["tensors"].keys() == other["tensors"].keys()
    for key, value in one["tensors"].items():
        assert torch.equal(value, other["tensors"][key])


def layers(result: PlaceResult) -> list[str]:
    return [placed.layer for placed in result.placed]


def reasons(result: PlaceResult) -> dict[str, str]:
    return {site.layer: site.reason for site in result.left}


# -- where norms go ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (convnet(), (2, 3, 8, 8), {"0": "2d", "3": "2d", "7": "1d"}),
        (mlp(), (4, 6), {"0": "1d", "2": "1d"}),
        (mlp(nn.Tanh), (4, 6), {"0": "1d", "2": "1d"}),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.GELU(), nn.Conv1d(4, 1, 1)), (3, 2, 9), {"0": "1d"}),
        (nn.Sequential(nn.Conv3d(2, 4, 3), nn.SiLU(), nn.Conv3d(4, 1, 1)), (3, 2, 5, 5, 5), {"0": "3d"}),
        (
            nn.Sequential(
                nn.ConvTranspose2d(3, 4, 2, groups=1), nn.LeakyReLU(), nn.ConvTranspose2d(4, 1, 2), nn.Tanh()
            ),
            (2, 3, 4, 4),
            {"0": "2d"},
        ),
        (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.PReLU(), nn.Conv2d(6, 1, 1)), (2, 4, 6, 6), {"0": "2d"}),
    ],
)
def test_a_norm_of_the_right_kind_goes_between_layer_and_activation(
    model: nn.Module, shape: tuple[int, ...], expected: dict[str, str]
) -> None:
    result = place(model, torch.randn(shape))
    kinds = {p.layer: type(result.model.get_submodule(p.norm)) for p in result.placed}
    assert kinds == {layer: getattr(batchnorm.nn, f"BatchNorm{kind}") for layer, kind in expected.items()}
    graph = trace(result.model, torch.randn(shape))
    for placed in result.placed:
        (norm,) = (c for c in graph.calls if c.module == placed.norm and c.name == "batch_norm")
        producer = norm.args["input"].producer
        assert producer is not None
        assert producer.module.startswith(f"{placed.layer}.")
        reader = graph.readers(norm.output)[0]
        while reader.name in ("max_pool2d", "dropout"):
            reader = graph.readers(reader.output)[0]
        assert reader.name.rstrip("_") == placed.activation


def test_in_eval_mode_a_new_norm_gives_the_layers_old_output() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 1)).eval()
    x = torch.randn(4, 3, 8, 8)
    result = place(model, x)
    assert not any(m.training for m in result.model.modules())
    conv = model[0]
    with torch.no_grad():
        gap = (result.model[0](x) - conv(x)).abs()
        magnitude = F.conv2d(x.abs(), conv.weight.abs(), conv.bias.abs())
    # either side sums 27 products and a bias; the norm adds √, a division, a product and a sum: γ_n = n·u of each
    assert bool((gap <= 2 * (27 + 1 + 8) * EPS / 2 * magnitude).all())


def test_the_original_is_untouched_and_class_modes_and_hooks_are_kept() -> None:
    class Net(nn.Sequential):
        pass

    model = Net(*convnet())
    model[1].eval()
    seen = []
    model[2].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    before = state(model)
    result = place(model, torch.randn(2, 3, 8, 8))
    assert_same_state(before, state(model))
    assert type(result.model) is Net
    assert result.model is not model
    assert not result.model[1].training
    assert result.model[0].norm.training
    seen.clear()
    result.model(torch.randn(2, 3, 8, 8))
    assert seen == [torch.Size((2, 8, 4, 4))]


def test_in_place_rewrites_the_model_itself() -> None:
    model = convnet()
    first = model[0]
    result = place(model, torch.randn(2, 3, 8, 8), inplace=True)
    assert result.model is model
    assert model[0].conv is first
    assert first.bias is None


def test_norms_follow_the_layer() -> None:
    model = mlp().double()
    model[0].eval()
    result = place(model, torch.randn(4, 6, dtype=torch.float64))
    assert result.model[0].norm.weight.dtype == torch.float64
    assert not result.model[0].norm.training
    assert result.model[2].norm.training
    half = place(mlp().bfloat16(), torch.randn(4, 6, dtype=torch.bfloat16))
    assert half.model[0].norm.running_var.dtype == torch.float32
    assert half.model(torch.randn(4, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


# -- keys --------------------------------------------------------------------------------------------------------------


def test_an_old_checkpoint_loads_and_gives_the_same_output() -> None:
    model = convnet().eval()
    x = torch.randn(2, 3, 8, 8)
    result = place(model, x)
    assert result.renamed["0.weight"] == "0.conv.weight"
    assert result.renamed["7.weight"] == "7.linear.weight"
    assert result.dropped == ["0.bias", "3.bias", "7.bias"]
    old = convnet().eval()
    result.model.load_state_dict(result.convert_state_dict(old.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), old(x))


def test_a_layer_with_two_names_is_replaced_under_both() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3)
            self.stack = nn.ModuleList([self.first])
            self.last = nn.Conv2d(4, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.stack[0](x)))

    result = place(Net(), torch.randn(2, 3, 5, 5))
    assert layers(result) == ["first"]
    assert result.model.first is result.model.stack[0]
    assert result.renamed == {"first.weight": "first.conv.weight", "stack.0.weight": "stack.0.conv.weight"}
    assert result.dropped == ["first.bias", "stack.0.bias"]
    result.model.load_state_dict(result.convert_state_dict(Net().state_dict()))


def test_results_are_data() -> None:
    result = place(convnet(), torch.randn(2, 3, 8, 8))
    data = json.loads(json.dumps(result.to_dict()))
    assert data["placed"][0] == {
        "layer": "0",
        "norm": "0.norm",
        "activation": "relu",
        "channels": 8,
        "bias_dropped": True,
    }
    assert "3 norms placed" in str(result)


# -- what is left ------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Two layers before a ReLU, one of which stands in a way that a test chooses."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1)
        self.linear = nn.Linear(4, 4)
        self.kept: list[Tensor] = []
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def other_reader(net: Branching, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.last(F.relu(y) + y)


def twice(net: Branching, x: Tensor) -> Tensor:
    return net.last(F.relu(net.a(F.relu(net.a(x)))))


def functional(net: Branching, x: Tensor) -> Tensor:
    return net.last(F.relu(F.conv2d(x, net.a.weight, net.a.bias)))


def gate(net: Branching, x: Tensor) -> Tensor:
    return net.last(x * torch.sigmoid(net.a(x)))


def output(net: Branching, x: Tensor) -> Tensor:
    return F.relu(net.a(x)).mean((2, 3))


def last_axis(net: Branching, x: Tensor) -> Tensor:
    return net.last(F.relu(net.linear(x)))


def residual(net: Branching, x: Tensor) -> Tensor:
    return net.last(F.relu(net.a(x) + x))


def norm_after(net: Branching, x: Tensor) -> Tensor:
    return net.last(F.batch_norm(F.relu(net.a(x)), None, None, training=True))


def kept(net: Branching, x: Tensor) -> Tensor:
    y = net.a(x)
    net.kept = [y]
    return net.last(F.relu(y))


def one_sample(net: Branching, x: Tensor) -> Tensor:
    return torch.stack([net.last(F.relu(net.a(x[0])))])


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("forward", "layer", "phrase"),
    [
        (other_reader, "a", "other readers, which would get normalized values too: add in the model"),
        (twice, "a", "called more than once"),
        (functional, "a", "code calls it with that layer's parameters"),
        (gate, "a", "is a gate"),
        (output, "a", "output activation"),
        (last_axis, "linear", "a batch norm takes axis 1"),
        (residual, "a", "added to another value"),
        (norm_after, "a", "A norm follows the relu"),
        (kept, "a", "the model stores it"),
        (one_sample, "a", "without a batch axis"),
    ],
)
def test_sites_that_get_no_norm_are_listed_with_the_reason(
    forward: Callable[[Branching, Tensor], Tensor], layer: str, phrase: str
) -> None:
    result = place(Branching(forward), torch.randn(2, 4, 4, 4))
    assert layers(result) == []
    assert list(reasons(result)) == [layer]
    assert phrase in reasons(result)[layer]


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, 2, 1)
        self.expand = nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


def test_squeeze_and_excitation_is_left_alone_and_what_is_around_it_is_not() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), SqueezeExcite(4), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 1)
    )
    result = place(model, torch.randn(2, 3, 8, 8))
    assert layers(result) == ["0", "3"]
    assert "does nothing but compute a gate" in reasons(result)["2.reduce"]
    assert "is a gate" in reasons(result)["2.expand"]


def test_a_gate_of_tanh_and_sigmoid_does_not_make_the_layers_before_it_gates() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.gate = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x))

    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), Gated(), nn.Conv1d(4, 1, 1))
    result = place(model, torch.randn(2, 2, 8))
    assert layers(result) == ["0"]
    assert set(reasons(result)) == {"2.value", "2.gate"}


def test_shared_and_parametrized_weights_are_left() -> None:
    tied = mlp()
    tied[2] = nn.Linear(12, 12)
    tied[4] = nn.Linear(12, 12)
    tied[4].weight = tied[2].weight
    result = place(tied, torch.randn(4, 6))
    assert layers(result) == ["0"]
    assert "shares its parameters" in reasons(result)["2"]
    normed = mlp()
    nn.utils.parametrizations.weight_norm(normed[2])
    result = place(normed, torch.randn(4, 6))
    assert layers(result) == ["0"]
    assert "Its weight is computed" in reasons(result)["2"]


def test_a_hook_that_reads_the_layers_output_is_a_reader() -> None:
    model = convnet()
    model[0].register_forward_hook(lambda module, args, output: None)
    result = place(model, torch.randn(2, 3, 8, 8))
    assert "a hook of 0" in reasons(result)["0"]


def test_layers_that_are_normalized_already_are_no_sites() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()
    )
    result = place(nn.Sequential(*model, nn.Conv2d(4, 1, 1)), torch.randn(2, 3, 8, 8))
    assert (result.placed, result.left) == ([], [])
    assert place(place(convnet(), torch.randn(2, 3, 8, 8)).model, torch.randn(2, 3, 8, 8)).placed == []


def test_code_that_reads_the_layer_gets_it_back() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x)) * self.a.out_channels
            return self.c(F.relu(self.b(x)))

    model = Reads()
    result = place(model, torch.randn(2, 3, 8, 8))
    assert layers(result) == ["b"]
    assert "the model fails" in reasons(result)["a"]
    assert "out_channels" in reasons(result)["a"]
    assert type(result.model.a) is nn.Conv2d
    assert torch.equal(result.model.a.bias, model.a.bias)
    assert set(result.renamed) == {"b.weight"}


def test_code_that_takes_another_way_gets_the_layer_back() -> None:
    class Asks(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for module in self:
                x = module(x) if isinstance(module, nn.Conv2d) or not hasattr(module, "conv") else x + 1
                x = F.relu(x)
            return x

    result = place(Asks(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), torch.randn(2, 4, 8, 8))
    assert layers(result) == []
    assert "computes something else" in reasons(result)["0"]


# -- training and errors -----------------------------------------------------------------------------------------------


def test_a_placed_network_trains() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    model = place(mlp(), x).model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert int(model[0].norm.num_batches_tracked) == 60


def test_a_batch_that_is_too_small_for_training_is_noted_and_placed_all_the_same() -> None:
    result = place(mlp(), torch.randn(1, 6))
    assert layers(result) == ["0", "2"]
    assert result.note is not None
    assert "at least 2 values per channel" in result.note
    assert place(mlp().eval(), torch.randn(1, 6)).note is None
    assert place(mlp(), torch.randn(2, 6)).note is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_rewrite_in_place_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    model = convnet()
    before = state(model)
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        return trace(*args, **kwargs)

    monkeypatch.setattr(place_module, "trace", failing)
    with pytest.raises(error):
        place(model, torch.randn(2, 3, 8, 8), inplace=True)
    assert_same_state(before, state(model))


def test_a_model_that_fails_is_refused_with_a_sentence() -> None:
    with pytest.raises(InputError, match="fails on the example inputs"):
        place(convnet(), torch.randn(2, 5, 8, 8))


def test_a_model_that_cannot_be_copied_is_refused_with_a_way_out() -> None:
    class Uncopyable(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot pickle")

    model = Uncopyable(*mlp())
    with pytest.raises(StateError, match="inplace=True"):
        place(model, torch.randn(4, 6))
    assert layers(place(model, torch.randn(4, 6), inplace=True)) == ["0", "2"]


def test_a_placed_model_can_be_copied_and_saved() -> None:
    result = place(convnet(), torch.randn(2, 3, 8, 8))
    again = copy.deepcopy(result.model)
    again.load_state_dict(result.model.state_dict())


def test_a_model_in_a_parallel_wrapper_gets_its_norms() -> None:
    result = place(nn.DataParallel(mlp()), torch.randn(4, 6))
    assert layers(result) == ["module.0", "module.2"]


def test_a_frozen_model_that_would_learn_again_is_told() -> None:
    model, x = mlp(), torch.randn(4, 6)
    frozen = [w for w in place(model, x).warnings if "are frozen" in w]
    assert not frozen
    model.requires_grad_(False)
    result = place(model, x)
    assert "γ and β" in result.warnings[0]
    assert "batchnorm.freeze(result.model)" in " ".join(str(result).split())
    assert result.to_dict()["warnings"] == result.warnings
    batchnorm.freeze(result.model)
    assert not any(p.requires_grad for p in result.model.parameters())


def test_biases_that_are_gone_are_told_to_code_outside_of_the_forward() -> None:
    result = place(mlp(), torch.randn(4, 6))
    assert result.dropped
    assert any(w.startswith(f"{', '.join(result.dropped[:3])}: gone") for w in result.warnings)
    unbiased = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 2))
    assert not place(unbiased, torch.randn(4, 6)).warnings
