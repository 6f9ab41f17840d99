"""Faults of a trained model's running statistics: lost, not arrived, poisoned, biased, rounded, frozen, or unused."""

from __future__ import annotations

import copy

import torch
from benchmarks.diagnose.data import Batch
from benchmarks.diagnose.faults.dataflow import WEIGHTED, execution_order, first_moved, pass_in_train_mode
from benchmarks.diagnose.faults.registry import THREE, Bench, Planted, fault
from benchmarks.diagnose.training import Recipe, norms
from torch import Tensor, nn

from batchnorm import freeze

# -- never updated ---------------------------------------------------------------------------------------------------


@fault("never_updated", "all")
def parameters_without_buffers(bench: Bench) -> Planted:
    """Weights were saved as ``dict(model.named_parameters())`` and loaded into a new model with ``strict=False``.

    Running means stay 0, variances 1, num_batches_tracked 0, in every norm.
    """
    right = bench.trained()
    model = copy.deepcopy(right)
    for norm in norms(model).values():
        norm.reset_running_stats()
    model.load_state_dict(dict(right.named_parameters()), strict=False)
    return bench.planted(model, execution_order(model, bench.data.held_out())[:1], right)


@fault("never_updated", "one")
def buffers_of_one_layer_lost(bench: Bench) -> Planted:
    """A layer was renamed; its parameters were mapped by hand, its buffers forgotten, ``strict=False`` said nothing."""
    right = bench.trained()
    model = copy.deepcopy(right)
    name = bench.pick_norm(model)
    norms(model)[name].reset_running_stats()
    return bench.planted(model, [name], right)


# -- the average has not arrived -------------------------------------------------------------------------------------


@fault("average_not_arrived", "few_steps")
def few_steps_after_reset(bench: Bench) -> Planted:
    """Statistics were reset, and the model was run in train mode for five batches only "to warm them up".

    Of the initial 0 and 1 there remains 0.9⁵ = 59 %.
    """
    right = bench.trained()
    model = copy.deepcopy(right)
    for norm in norms(model).values():
        norm.reset_running_stats()
    pass_in_train_mode(model, bench.data.training()[:5])
    return bench.planted(model, first_moved(model, right, bench.data.held_out()), right)


@fault("average_not_arrived", "one_new_norm")
def one_new_norm(bench: Bench) -> Planted:
    """One norm was exchanged for a new one that took over weight and bias; then eight batches in train mode."""
    right = bench.trained()
    model = copy.deepcopy(right)
    name = bench.pick_norm(model)
    norms(model)[name].reset_running_stats()
    pass_in_train_mode(model, bench.data.training()[:8])
    return bench.planted(model, [name], right)


# -- poisoned --------------------------------------------------------------------------------------------------------


@fault("poisoned", "nan", architectures=THREE)
def nan_in_a_batch(bench: Bench) -> Planted:
    """One training picture held NaN: a failed decode, or 0/0 in an augmentation.

    Loss and step were skipped, but the forward pass had already updated the statistics: NaN from the first norm on.
    """
    right = bench.trained()
    model = copy.deepcopy(right)
    images, labels = bench.data.training()[0]
    images = images.clone()
    images[3, 0, 2, 2] = torch.nan
    pass_in_train_mode(model, [(images, labels)])
    return bench.planted(model, execution_order(model, bench.data.held_out())[:1], right)


@fault("poisoned", "inf", architectures=THREE)
def overflow_in_one_channel(bench: Bench) -> Planted:
    """Under mixed precision one channel overflowed to inf in the middle of the network; the scaler skipped the step.

    The running mean of that channel is inf, its variance NaN, and so is all that comes after it.
    """
    right = bench.trained()
    model = copy.deepcopy(right)
    name = bench.pick_norm(model)

    def overflow(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0].clone()
        x[0, 1] = torch.inf
        return (x,)

    hook = norms(model)[name].register_forward_pre_hook(overflow)
    pass_in_train_mode(model, bench.data.training()[:1])
    hook.remove()
    return bench.planted(model, [name], right)


@fault("poisoned", "negative")
def negative_variance(bench: Bench) -> Planted:
    """Statistics were computed as E[x²] − E[x]² in float32 where a channel's mean is large: a variance came out < 0."""
    right = bench.trained()
    model = copy.deepcopy(right)
    name = bench.pick_norm(model)
    norm = norms(model)[name]
    norm.running_var[norm.num_features // 2] *= -0.01
    return bench.planted(model, [name], right)


@fault("poisoned", "zero")
def zero_variance(bench: Bench) -> Planted:
    """A recalibration that sums up before it divides wrote variance 0 for a norm that its pass did not reach."""
    right = bench.trained()
    model = copy.deepcopy(right)
    name = bench.pick_norm(model)
    norms(model)[name].running_var.zero_()
    return bench.planted(model, [name], right)


# -- biased and unbiased variances -----------------------------------------------------------------------------------


def _values_per_channel(model: nn.Module, pictures: int, batches: list[Batch]) -> dict[str, int]:
    """Return m = N·H·W of each norm for a batch of so many pictures."""
    found: dict[str, int] = {}
    model = copy.deepcopy(model)
    for name, norm in norms(model).items():

        def note(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            found[name] = inputs[0].numel() // inputs[0].shape[1]

        norm.register_forward_pre_hook(note)
    with torch.no_grad():
        model(batches[0][0][:pictures])
    return found


def _rescaled(bench: Bench, power: int) -> Planted:
    """Multiply each variance by ((m − 1)/m)^power, m being that of one picture, of two for the MLP."""
    right = bench.trained()
    model = copy.deepcopy(right)
    values = _values_per_channel(model, 2 if bench.architecture == "mlp" else 1, bench.data.held_out())
    for name, norm in norms(model).items():
        norm.running_var *= (1 - 1 / values[name]) ** power
    return bench.planted(model, first_moved(model, right, bench.data.held_out()), right)


@fault("biased_variance", "imported")
def biased_imported(bench: Bench) -> Planted:
    """Statistics measured in the smallest batches by a framework that keeps biased variances, imported as they are.

    Every variance is (m − 1)/m of the right one: half of it for a fully connected layer and two pictures, three
    quarters at the end of a convolutional network and one picture. With hundreds of values a channel nobody sees it.
    """
    return _rescaled(bench, 1)


@fault("biased_variance", "corrected_twice")
def corrected_twice(bench: Bench) -> Planted:
    """An importer took PyTorch's unbiased variances, from such batches, for biased ones, and corrected them again.

    Every variance is m/(m − 1) of the right one.
    """
    return _rescaled(bench, -1)


# -- half precision --------------------------------------------------------------------------------------------------


def _kelvin(images: Tensor, labels: Tensor, generator: torch.Generator) -> Batch:
    """Return thermal pictures as a camera gives them: kelvin, things at 22 °C, so little contrast, a little noise."""
    noise = 0.1 * torch.randn(images.shape, generator=generator)
    return 295.3 + 0.15 * (images + noise), labels


def _norm_on_input(model: nn.Module) -> None:
    """Let a norm take the raw pictures, before the first layer: zero padding then is the mean."""
    name = next(name for name, module in model.named_modules() if isinstance(module, WEIGHTED))
    first = model.get_submodule(name)
    width = first.in_channels if isinstance(first, nn.Conv2d) else first.in_features
    norm = type(next(iter(norms(model).values())))
    model.set_submodule(name, nn.Sequential(norm(width), first))


_THERMAL = Recipe(prepare=_norm_on_input, feed=_kelvin)


def _rounded(bench: Bench, dtype: torch.dtype) -> Planted:
    right = bench.trained(_THERMAL)
    model = copy.deepcopy(right)
    for norm in norms(model).values():
        norm.running_mean.copy_(norm.running_mean.to(dtype))
        norm.running_var.copy_(norm.running_var.to(dtype))
    generator = torch.Generator().manual_seed(bench.seed)
    batches = [_kelvin(*batch, generator) for batch in bench.data.held_out()]
    training = [_kelvin(*batch, generator) for batch in bench.data.training()]
    first = execution_order(model, batches)[:1]
    return bench.planted(model, first, right, batches=batches, training_batches=training)


@fault("half_precision", "bf16_buffers", architectures=THREE)
def buffers_saved_in_bfloat16(bench: Bench) -> Planted:
    """Buffers went through bfloat16 (a checkpoint made smaller, a broadcast in half) and back into a float32 model.

    The pictures are raw thermal ones, 295.3 ± 0.15 K; at 295 bfloat16 knows every second number only.
    """
    return _rounded(bench, torch.bfloat16)


@fault("half_precision", "fp16_buffers", architectures=THREE)
def buffers_saved_in_float16(bench: Bench) -> Planted:
    """The same through float16, which at 295 goes in steps of a quarter."""
    return _rounded(bench, torch.float16)


@fault("half_precision", "bf16_model", architectures=THREE)
def model_cast_to_bfloat16(bench: Bench) -> Planted:
    """``model.bfloat16()`` cast running_mean and running_var too; statistics were then updated by train-mode passes.

    An average of 8 bits stands still where momentum · (batch − average) is less than half a unit in the last place.
    """
    right = bench.trained().bfloat16()
    for norm, kept in zip(norms(right).values(), norms(bench.trained()).values(), strict=True):
        norm.float().load_state_dict(kept.state_dict())
    model = bench.trained().bfloat16()
    training = [(images.bfloat16(), labels) for images, labels in bench.data.training()]
    batches = [(images.bfloat16(), labels) for images, labels in bench.data.held_out()]
    pass_in_train_mode(model, training)
    first = execution_order(model, batches)[:1]
    return bench.planted(model, first, right, batches=batches, training_batches=training)


# -- frozen with wrong statistics ------------------------------------------------------------------------------------


@fault("frozen_wrong", "library_at_init")
def frozen_at_init(bench: Bench) -> Planted:
    """A norm was frozen by ``batchnorm.freeze`` in the new model, before the weights came without statistics.

    Train-mode passes then filled in all statistics but the frozen ones, which are 0 and 1.
    """
    return _frozen(bench, warm_up=0)


@fault("frozen_wrong", "library_early")
def frozen_early(bench: Bench) -> Planted:
    """The same, frozen by ``batchnorm.freeze`` after two batches: 81 % of the initial 0 and 1 remain for good."""
    return _frozen(bench, warm_up=2)


def _frozen(bench: Bench, warm_up: int) -> Planted:
    right = bench.trained()
    model = copy.deepcopy(right)
    name = bench.pick_norm(model)
    for norm in norms(model).values():
        norm.reset_running_stats()
    pass_in_train_mode(model, bench.data.training()[:warm_up])
    freeze(model, name)
    for _ in range(4):
        pass_in_train_mode(model, bench.data.training()[:-1])
    return bench.planted(model, [name], right)


@fault("frozen_wrong", "by_hand")
def frozen_by_hand(bench: Bench) -> Planted:
    """``torch.optim.swa_utils.update_bn`` reset all statistics, and filled in those of norms in train mode only.

    The model's own ``train()`` keeps one norm in eval mode, and its parameters do not learn (norm_eval). The model is
    handed over as it trains: in train mode, with that one norm in eval mode.
    """
    right = bench.trained()
    model = copy.deepcopy(right)
    name = bench.pick_norm(model)
    for norm in norms(model).values():
        norm.reset_running_stats()
    model.train()
    norms(model)[name].eval().requires_grad_(False)
    with torch.no_grad():
        for _ in range(4):
            for images, _ in bench.data.training()[:-1]:
                model(images)
    return bench.planted(model, [name], right)


# -- norms that run on batch statistics ------------------------------------------------------------------------------


@fault("train_mode", "left_in_train")
def left_in_train_mode(bench: Bench) -> Planted:
    """A callback put one norm back into train mode after ``model.eval()``; the service answers in batches of four."""
    right = bench.trained()
    model = copy.deepcopy(right)
    name = bench.pick_norm(model)
    norms(model)[name].train()
    return bench.planted(model, [name], right, batches=bench.data.held_out(4)[:50])


@fault("train_mode", "untracked")
def without_running_statistics(bench: Bench) -> Planted:
    """One norm was built with ``track_running_stats=False``: batch statistics in eval mode too, in batches of four."""
    right = bench.trained()
    model = copy.deepcopy(right)
    name = bench.pick_norm(model)
    norm = norms(model)[name]
    bare = type(norm)(norm.num_features, norm.eps, norm.momentum, track_running_stats=False).eval()
    bare.load_state_dict(dict(norm.named_parameters()))
    model.set_submodule(name, bare)
    return bench.planted(model, [name], right, batches=bench.data.held_out(4)[:50])


# -- constant inputs in the statistics -------------------------------------------------------------------------------


@fault("padding", "dry_run")
def dry_run_on_zeros(bench: Bench) -> Planted:
    """The trained model was timed in train mode on ten batches of ``torch.zeros``: 65 % of every average is theirs."""
    right = bench.trained()
    model = copy.deepcopy(right)
    images, labels = bench.data.training()[0]
    pass_in_train_mode(model, [(torch.zeros_like(images), labels)] * 10)
    return bench.planted(model, first_moved(model, right, bench.data.held_out()), right)
