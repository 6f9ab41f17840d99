"""Faults that are part of training: each needs a short training run of its own."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from benchmarks.diagnose.data import Batch, in_batches
from benchmarks.diagnose.faults.dataflow import execution_order, first_moved, recalibrated
from benchmarks.diagnose.faults.registry import THREE, Bench, Planted, fault
from benchmarks.diagnose.training import PLAIN, Recipe, norms
from torch import Tensor, nn
from torch.nn import functional as F


def _whole_run(bench: Bench, recipe: Recipe, training_batches: list[Batch] | None = None) -> Planted:
    """Train by the recipe; right would be the same weights with the population statistics of the pictures."""
    model = bench.trained(recipe)
    right = recalibrated(model, bench.data.training(128))
    layers = first_moved(model, right, bench.data.held_out())
    return bench.planted(model, layers, right, training_batches=training_batches)


# -- momentum --------------------------------------------------------------------------------------------------------


@fault("average_not_arrived", "small_momentum", architectures=THREE)
def small_momentum(bench: Bench) -> Planted:
    """Trained with momentum=0.001: after 210 steps four fifths of the initial 0 and 1 are still there."""
    return _whole_run(bench, replace(PLAIN, momentum=0.001))


@fault("momentum_convention", "keras", architectures=THREE)
def decay_taken_for_momentum(bench: Bench) -> Planted:
    """Keras's momentum=0.99 written into PyTorch: the buffers are the last batch's.

    Here these are the three pictures left over at the end of an epoch.
    """
    return _whole_run(bench, replace(PLAIN, momentum=0.99, drop_last=False))


@fault("momentum_convention", "onnx", architectures=THREE)
def onnx_momentum(bench: Bench) -> Planted:
    """ONNX's momentum=0.9 written into PyTorch; training in batches of 16, the last of an epoch with three pictures."""
    return _whole_run(bench, replace(PLAIN, momentum=0.9, batch=16, epochs=3, drop_last=False, learning_rate=0.05))


@fault("cumulative_average", "from_the_start", architectures=THREE)
def cumulative_from_the_start(bench: Bench) -> Planted:
    """Trained with momentum=None: the statistics of the first, wild steps count as much as those of the last."""
    return _whole_run(bench, replace(PLAIN, momentum=None, epochs=4, learning_rate=0.4))


# -- eps -------------------------------------------------------------------------------------------------------------


def _small_weights(model: nn.Module) -> None:
    """Start from N(0, 0.01²), as AlexNet did and Keras's random_normal nearly does, without biases before norms."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=0.01)


def _other_eps(bench: Bench, trained_with: float, evaluated_with: float) -> Planted:
    recipe = replace(PLAIN, eps=trained_with, prepare=_small_weights, learning_rate=0.002)
    right = bench.trained(recipe)
    model = copy.deepcopy(right)
    for norm in norms(model).values():
        norm.eps = evaluated_with
    batches = bench.data.held_out()
    return bench.planted(model, _first_eps_felt(model, right, execution_order(model, batches)), right)


def _first_eps_felt(model: nn.Module, right: nn.Module, order: Sequence[str]) -> list[str]:
    """Return the first norm, and the first whose gain changes by a tenth, root mean square over channels."""
    for name in order:
        ours, due = norms(model)[name], norms(right)[name]
        gain = ((due.running_var + due.eps) / (ours.running_var + ours.eps)).log() / 2
        if float(gain.square().mean().sqrt()) > 0.1:
            return [order[0], name]
    return [order[0]]


@fault("eps_mismatch", "smaller", architectures=THREE)
def smaller_eps(bench: Bench) -> Planted:
    """Trained with Keras's eps=1e-3, imported into PyTorch's default 1e-5; small weights keep variances near 1e-3."""
    return _other_eps(bench, 1e-3, 1e-5)


@fault("eps_mismatch", "larger", architectures=THREE)
def larger_eps(bench: Bench) -> Planted:
    """Trained with PyTorch's 1e-5, evaluated by a definition ported from Keras that says eps=1e-3."""
    return _other_eps(bench, 1e-5, 1e-3)


# -- small batches ---------------------------------------------------------------------------------------------------


# The smallest batches from which each network still learns: of one value in a channel a norm makes 0, of two −1 and 1.
_SMALLEST = {"mlp": 4, "resnet": 1, "mobilenet": 2}


def _small(bench: Bench, recipe: Recipe, together: int = 1) -> Planted:
    size = _SMALLEST[bench.architecture]
    recipe = replace(recipe, batch=size, epochs=1 + (size > 2), accumulate=max(1, together // size))
    return _whole_run(bench, recipe, bench.data.training(size)[:128])


@fault("small_batches", "tiny", architectures=THREE)
def tiny_batches(bench: Bench) -> Planted:
    """Trained in batches of one, two or four pictures, for more would not fit into memory."""
    return _small(bench, replace(PLAIN, learning_rate=0.01))


@fault("small_batches", "accumulated", architectures=THREE)
def accumulated_gradients(bench: Bench) -> Planted:
    """Gradients of such batches are added up for a step: a batch of 16 for the optimizer, but not for the norms."""
    return _small(bench, replace(PLAIN, learning_rate=0.05), together=16)


# -- padding ---------------------------------------------------------------------------------------------------------


def _filled_up(images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Batch:
    """Append as many pictures of zeros as there are; label −100 keeps them out of the loss."""
    return torch.cat([images, torch.zeros_like(images)]), torch.cat([labels, torch.full_like(labels, -100)])


@fault("padding", "samples", architectures=THREE)
def batches_filled_up(bench: Bench) -> Planted:
    """Batches of a fixed shape, half of them filled up with zeros; the loss masks these, the norms do not.

    Evaluation is without padding.
    """
    training = [_filled_up(*batch) for batch in bench.data.training(32)]
    return _whole_run(bench, replace(PLAIN, batch=32, epochs=5, feed=_filled_up), training)


# -- one norm for two inputs -----------------------------------------------------------------------------------------


@torch.no_grad()
def _by_batch(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode whose norms use each batch's own statistics: what the model did in training."""
    right = copy.deepcopy(model).eval()
    for norm in norms(right).values():
        norm.running_mean = norm.running_var = None
    return right


def _use_twice(first: str, second: str, model: nn.Module) -> None:
    model.set_submodule(second, model.get_submodule(first))


@fault("shared_norm", "two_layers", architectures=THREE)
def one_norm_in_two_layers(bench: Bench) -> Planted:
    """``self.bn`` was defined once and used after two layers: fine in training, a mixture of both in eval mode."""
    plain = bench.trained()
    order = execution_order(plain, bench.data.held_out())
    pairs = {
        first: second
        for first, second in itertools.pairwise(order)
        if norms(plain)[first].num_features == norms(plain)[second].num_features
    }
    first = bench.pick(list(pairs))
    model = bench.trained(replace(PLAIN, prepare=partial(_use_twice, first, pairs[first])))
    whole = in_batches(bench.data.test_images, bench.data.test_labels, len(bench.data.test_labels))
    return bench.planted(model, [first, pairs[first]], _by_batch(model), right_batches=whole)


def _other_sensor(images: Tensor, labels: Tensor) -> Batch:
    """Return pictures as another sensor gives them: three times the gain, and an offset."""
    return 3 * images + 2, labels


def _sensors(images: Tensor, labels: Tensor, generator: torch.Generator) -> Batch:
    """Return one batch in two, by chance, as the other sensor gives it."""
    return _other_sensor(images, labels) if torch.rand((), generator=generator) < 0.5 else (images, labels)


def _in_turns(batches: list[Batch]) -> list[Batch]:
    """Return every second batch as the other sensor gives it."""
    return [_other_sensor(*batch) if number % 2 else batch for number, batch in enumerate(batches)]


@fault("shared_norm", "two_domains", architectures=THREE)
def one_norm_for_two_domains(bench: Bench) -> Planted:
    """Batches of two sensors take turns in training, each batch of one only; one set of statistics serves both.

    The same happens to a discriminator that is shown real and generated pictures in batches of their own.
    """
    model = bench.trained(replace(PLAIN, feed=_sensors))
    batches, training = _in_turns(bench.data.held_out()), _in_turns(bench.data.training())
    first = execution_order(model, batches)[:1]
    return bench.planted(model, first, _by_batch(model), batches=batches, training_batches=training)


# -- batch-mates -----------------------------------------------------------------------------------------------------


class Centered(nn.Module):
    """x − mean over the batch, in training and in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x less the batch's mean, feature by feature."""
        return x - x.mean(0, keepdim=True)


class OverBatch(nn.Module):
    """``F.normalize(x, dim=0)``: meant was dim=1."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x divided by its Euclidean norm over the batch, times 8 = √64, the scale of training."""
        return 8 * F.normalize(x, dim=0)


def _insert(name: str, mixer: type[nn.Module], model: nn.Module) -> None:
    model.set_submodule(name, nn.Sequential(model.get_submodule(name), mixer()))


def _mixed(bench: Bench, mixer: type[nn.Module], batches: list[Batch], whole: list[Batch]) -> Planted:
    plain = bench.trained()
    name = bench.pick([name for name, m in plain.named_modules() if isinstance(m, (nn.ReLU, nn.ReLU6))])
    model = bench.trained(replace(PLAIN, prepare=partial(_insert, name, mixer)))
    return bench.planted(model, [f"{name}.1", name], model, batches=batches, right_batches=whole)


@fault("batch_mates", "centered", architectures=THREE)
def minus_batch_mean(bench: Bench) -> Planted:
    """A layer subtracts the mean over the batch.

    Evaluation reads a folder class by class, so that the mean is of one class, where that of training was of all.
    """
    order = bench.data.test_labels.argsort(stable=True)
    images, labels = bench.data.test_images[order], bench.data.test_labels[order]
    return _mixed(bench, Centered, in_batches(images, labels, 64), in_batches(images, labels, len(labels)))


@fault("batch_mates", "normalized_over_batch", architectures=THREE)
def normalized_over_batch(bench: Bench) -> Planted:
    """Features are normalized over dim=0 instead of dim=1: what a picture becomes depends on how many come with it.

    Trained in batches of 64, evaluated in batches of 8.
    """
    return _mixed(bench, OverBatch, bench.data.held_out(8), bench.data.held_out(64))
