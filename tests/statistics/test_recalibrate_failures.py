"""Whatever goes wrong, the model is bit-identical to before, and the message says where, what, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from batchnorm.errors import (
    ArgumentTypeError,
    BatchError,
    BatchNormError,
    EmptyStreamError,
    NonFiniteError,
    ShapeError,
    StateError,
    UnknownNameError,
)
from batchnorm.nn import freeze
from batchnorm.statistics import recalibrate


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2), nn.BatchNorm1d(2)
    )
    nn.init.ones_(model[0].weight)
    model.register_buffer("poisoned", torch.tensor([float("nan"), -0.0]))
    model.train()[3].eval()
    model(torch.randn(8, 3))
    return model


def bits(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {n: (id(t), t.dtype, t.detach().contiguous().numpy().tobytes()) for n, t in tensors.items()},
        "modes": [m.training for m in model.modules()],
        "hooks": [sum(len(v) for k, v in vars(m).items() if k.endswith("hooks") and v) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
    }


def batch() -> Tensor:
    return torch.ones(8, 3).cumsum(0)


def with_nan() -> Tensor:
    x = batch()
    x[2, 1] = torch.nan
    return x


def raising(error: BaseException) -> Iterator[Tensor]:
    yield batch()
    yield batch()
    raise error


def interrupted(model: nn.Module, x: Tensor) -> None:
    model(x)
    raise KeyboardInterrupt


FAILURES: dict[str, tuple[Any, dict[str, Any], type[BaseException], str]] = {
    "nan": (lambda: [batch(), with_nan()], {}, NonFiniteError, r"batch 1 .*: 1 met NaN .* 4 of its 4 .*batch itself"),
    "overflow": (
        lambda: [batch(), batch() * 4e37],
        {},
        NonFiniteError,
        r"batch 1 .*: 1 met NaN or infinity.*The batch is finite, so a layer before",
    ),
    "loader": (lambda: raising(OSError("disk")), {}, BatchError, r"loader failed to give batch 2 .*OSError: disk"),
    "loader interrupted": (lambda: raising(KeyboardInterrupt()), {}, KeyboardInterrupt, "^$"),
    "model": (lambda: [batch(), torch.ones(8, 5)], {}, BatchError, r"Sequential failed on batch 1 .*shapes"),
    "model interrupted": (lambda: [batch()], {"forward": interrupted}, KeyboardInterrupt, "^$"),
    "batch type": (lambda: [batch(), "text"], {}, ArgumentTypeError, r"batch 1 .*type str.*forward="),
    "empty": (list, {}, EmptyStreamError, "at least one batch"),
    "one tensor": (batch, {}, ArgumentTypeError, r"\[batch\]"),
    "one sample": (lambda: [batch()[:1]], {}, ShapeError, r"1: .*at least 2 values.*channel 0 met 1 in 1 calls"),
    "single samples": (
        lambda: [batch()[:1], batch()[:1]],
        {"estimator": "within"},
        ShapeError,
        r"in some batch; channel 0 met 2 in 2 calls",
    ),
    "no values": (lambda: [batch()[:0]], {}, ShapeError, r"channel 0 met 0 in 0 calls"),
    "batch of another form": (lambda: [{"image": batch()}], {}, BatchError, r"unexpected keyword .* forward=lambda"),
    "estimator": (lambda: [batch()], {"estimator": "poled"}, UnknownNameError, "did you mean 'pooled'"),
    "estimator of a wrong type": (lambda: [batch()], {"estimator": ["pooled"]}, UnknownNameError, "expected one of"),
    "name": (lambda: [batch()], {"names": "bn"}, UnknownNameError, "'bn': no norm of that name"),
    "no names": (lambda: [batch()], {"names": []}, StateError, "names is empty"),
    "module for a name": (lambda: [batch()], {"names": nn.ReLU()}, ArgumentTypeError, "expected the names of norms"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_the_model_is_bit_identical_after(failure: str) -> None:
    make, options, error, words = FAILURES[failure]
    model, batches = network(), make()
    before = bits(model)
    with pytest.raises(error, match=words) as caught:
        recalibrate(model, batches, progress=True, **options)
    assert bits(model) == before
    if error is BatchError:
        assert caught.value.__cause__ is not None
    recalibrate(model, [batch()])  # and nothing lingers


def test_an_interrupt_while_writing_takes_back_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    before = bits(model)
    real, writes = Tensor.copy_, []

    def copy_(self: Tensor, *args: Any) -> Tensor:
        writes.append(self)
        if len(writes) == 4:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Tensor, "copy_", copy_)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, [batch()])
    assert len(writes) > 4
    assert bits(model) == before


def test_a_model_that_swallows_exceptions_cannot_hide_a_nan() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                result: Tensor = self.norm(x)
            except Exception:
                return x
            return result

    model = Careless()
    before = bits(model)
    with pytest.raises(NonFiniteError, match=r"batch 0 .*: norm met"):
        recalibrate(model, [with_nan()])
    assert bits(model) == before


def test_a_nan_in_a_scripted_module_is_named_as_one() -> None:
    with pytest.raises(NonFiniteError, match=r"batch 0 .*: 1 met"):
        recalibrate(torch.jit.script(network()), [with_nan()])


def test_a_variance_that_does_not_fit_half_precision_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3)).half()
    x = (torch.randn(8, 3) * 1000).half()
    before = bits(model)
    with pytest.raises(NonFiniteError, match=r"0: running_var reaches .*float16 can hold.*float32"):
        recalibrate(model, [x])
    assert bits(model) == before


class Opaque(nn.Module):
    """Buffers that might be statistics, and no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(3))
        self.register_buffer("b", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(3, 2), "Linear holds no batch norm"),
        (nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), r"none of the norms .*\(0: keeps no running"),
        (nn.Sequential(nn.LazyBatchNorm1d()), r"0\.weight has no size yet"),
        (Opaque(), "called no batch norm"),
    ],
)
def test_models_with_nothing_to_recalibrate(model: nn.Module, words: str) -> None:
    with pytest.raises(StateError, match=words):
        recalibrate(model, [batch()])


def test_a_model_that_is_all_frozen_says_so_before_the_pass() -> None:
    model = network()
    freeze(model)
    stream = iter([batch()])
    with pytest.raises(StateError, match=r"1: frozen; 5: frozen.*names="):
        recalibrate(model, stream)
    assert next(stream) is not None


def test_a_model_must_be_a_module() -> None:
    with pytest.raises(ArgumentTypeError, match=r"expected a torch\.nn\.Module; got function"):
        recalibrate(lambda x: x, [batch()])  # type: ignore[arg-type]


def test_every_refusal_is_one_of_the_librarys_errors() -> None:
    assert all(issubclass(e, BatchNormError | KeyboardInterrupt) for _, _, e, _ in FAILURES.values())


@pytest.mark.parametrize("wrong", [[0], [0, 1, 2], [1]])
def test_another_number_of_channels_is_told_of_the_batch_that_has_it(wrong: list[int]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))
    batches = [torch.randn(8, 5 if index in wrong else 3) for index in range(3)]
    before = bits(model)
    with pytest.raises(BatchError, match=rf"failed on batch {wrong[0]} .*0: expected 3 channels; got 5"):
        recalibrate(model, batches)
    assert bits(model) == before


def test_parameters_that_a_forward_puts_in_place_are_taken_out_again() -> None:
    model = network()
    averaged = {name: p.detach() / 2 for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    recalibrate(model, [batch(), batch() + 1], forward=lambda m, x: functional_call(m, averaged, (x,)))
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert dict(model.named_parameters()).keys() == parameters.keys()


def test_a_model_that_is_being_recalibrated_is_refused() -> None:
    model = network()
    before = bits(model)
    hook = model[0].register_forward_hook(lambda *_: recalibrate(model, [batch()]) and None)
    with pytest.raises(BatchError, match=r"StateError: .*is being worked on by recalibrate already"):
        recalibrate(model, [batch()])
    hook.remove()
    assert bits(model) == before
    recalibrate(model, [batch()])
