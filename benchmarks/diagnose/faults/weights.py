"""Faults of the weights: averaged, pruned, dead, or changed after the statistics were taken."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from benchmarks.diagnose.architectures import build
from benchmarks.diagnose.faults.dataflow import feeders, first_moved, pass_in_train_mode, recalibrated
from benchmarks.diagnose.faults.registry import EVERY, THREE, Bench, Planted, accuracy, fault
from benchmarks.diagnose.training import PLAIN, fit, norms
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

_TUNING = replace(PLAIN, epochs=4)
# Weights go far where the learning rate is high again: what is averaged, or saved without buffers, must.
_FAR = replace(PLAIN, epochs=6, learning_rate=0.4)


def _stale_everywhere(bench: Bench, model: nn.Module) -> Planted:
    """Return the fault of a model whose statistics are to be measured again, all of them."""
    right = recalibrated(model, bench.data.training(128))
    return bench.planted(model, first_moved(model, right, bench.data.held_out()), right)


# -- averaged weights ------------------------------------------------------------------------------------------------


@fault("averaged_weights", "swa", architectures=THREE)
def swa_without_update_bn(bench: Bench) -> Planted:
    """Stochastic weight averaging by ``torch.optim.swa_utils.AveragedModel``; ``update_bn`` was forgotten.

    The buffers are those of the last snapshot.
    """
    model = bench.trained()
    average = AveragedModel(model)
    fit(model, bench.data, _FAR, bench.seed + 1, lambda step, now: average.update_parameters(now))
    return _stale_everywhere(bench, average.eval())


@fault("averaged_weights", "ema", architectures=THREE)
def ema_of_parameters(bench: Bench) -> Planted:
    """An exponential moving average of the parameters, decay 0.99, was kept while training; buffers are the model's."""
    model = build(bench.architecture, bench.seed)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    fit(model, bench.data, replace(PLAIN, epochs=8), bench.seed, lambda step, now: average.update_parameters(now))
    return _stale_everywhere(bench, average.eval())


@fault("averaged_weights", "soup", architectures=THREE)
def soup(bench: Bench) -> Planted:
    """Two models, fine-tuned from the same one in different order, averaged entry by entry of their state dicts."""
    one, other = (fit(bench.trained(), bench.data, _FAR, bench.seed + number).state_dict() for number in (1, 2))
    model = bench.trained()
    mean = {key: (one[key] + other[key]) / 2 if one[key].is_floating_point() else one[key] for key in one}
    model.load_state_dict(mean)
    return _stale_everywhere(bench, model)


# -- pruned weights --------------------------------------------------------------------------------------------------


@fault("pruned_weights", "everywhere")
def pruned_everywhere(bench: Bench) -> Planted:
    """The smallest 60 % of the weights of every layer before a norm were set to zero.

    Nothing was trained or measured since.
    """
    model = bench.trained()
    for layer in set(feeders(model, bench.data.held_out()).values()):
        _prune(model.get_submodule(layer), 0.6)
    return _stale_everywhere(bench, model)


@fault("pruned_weights", "one_layer")
def pruned_in_one_layer(bench: Bench) -> Planted:
    """The smallest 70 % of one layer's weights were set to zero."""
    right = bench.trained()
    model = copy.deepcopy(right)
    fed = feeders(model, bench.data.held_out())
    name = bench.pick(list(fed))
    _prune(model.get_submodule(fed[name]), 0.7)
    return bench.planted(model, [name], recalibrated(model, bench.data.training(128)))


@fault("pruned_weights", "filters")
def pruned_filters(bench: Bench) -> Planted:
    """Half of one layer's filters, those of least L2 norm, were set to zero whole, and their statistics were kept."""
    model = bench.trained()
    fed = feeders(model, bench.data.held_out())
    name = bench.pick(list(fed))
    layer = model.get_submodule(fed[name])
    prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)
    prune.remove(layer, "weight")
    return bench.planted(model, [name], recalibrated(model, bench.data.training(128)))


def _prune(layer: nn.Module, share: float) -> None:
    prune.l1_unstructured(layer, "weight", share)
    prune.remove(layer, "weight")


# -- dead channels ---------------------------------------------------------------------------------------------------


@fault("dead_channels", "gamma")
def dead_by_gamma(bench: Bench) -> Planted:
    """Network slimming set the smallest 60 % of one norm's γ to zero; the channels are still there, and constant."""
    right = bench.trained()
    model = copy.deepcopy(right)
    name = bench.pick_norm(model)
    gamma = norms(model)[name].weight
    with torch.no_grad():
        gamma[gamma.abs().argsort()[: gamma.numel() * 6 // 10]] = 0.0
    return bench.planted(model, [name], right)


@fault("dead_channels", "variance")
def dead_by_variance(bench: Bench) -> Planted:
    """Weight decay shrank 60 % of one layer's filters to nothing, while training kept the statistics up to date.

    Such a channel is constant: its variance is 0, and 1/√ε is all that its noise is multiplied by.
    """
    right = bench.trained()
    model = copy.deepcopy(right)
    fed = feeders(model, bench.data.held_out())
    name = bench.pick(list(fed))
    weight = model.get_submodule(fed[name]).weight
    with torch.no_grad():
        weight[: len(weight) * 6 // 10] *= 1e-9
    for _ in range(10):  # 210 batches leave 0.9²¹⁰, a 4-billionth, of the old variance
        pass_in_train_mode(model, bench.data.training()[:-1])
    return bench.planted(model, [name], right)


# -- weights that no statistics can mend -----------------------------------------------------------------------------


@fault("not_the_norms", "permuted_filters", architectures=EVERY)
def permuted_filters(bench: Bench) -> Planted:
    """An importer wrote the filters of every layer before a norm in another order; the statistics are as they were.

    Diagnosed by the accuracy, which is as bad on batch statistics.
    """
    right = bench.trained()
    model = copy.deepcopy(right)
    generator = torch.Generator().manual_seed(bench.seed)
    with torch.no_grad():
        for layer in sorted(set(feeders(model, bench.data.held_out()).values())):
            for parameter in model.get_submodule(layer).parameters():
                parameter.copy_(parameter[torch.randperm(len(parameter), generator=generator)])
    return bench.planted(model, [""], right, metric=accuracy)


# -- stale statistics ------------------------------------------------------------------------------------------------


@fault("stale", "parameters_only", architectures=THREE)
def fine_tuned_parameters_only(bench: Bench) -> Planted:
    """A fine-tuning was saved as ``dict(model.named_parameters())`` and loaded over the pretrained model.

    Weights are new, buffers old.
    """
    model = bench.trained()
    tuned = fit(bench.trained(), bench.data, _FAR, bench.seed + 1)
    model.load_state_dict(dict(tuned.named_parameters()), strict=False)
    return _stale_everywhere(bench, model)


@fault("stale", "replaced_layer")
def replaced_layer(bench: Bench) -> Planted:
    """One layer was made anew and trained alone, in train mode; of the result only that layer's weights were kept."""
    model = bench.trained()
    fed = feeders(model, bench.data.held_out())
    name = bench.pick(list(fed))
    tuned = bench.trained().requires_grad_(False)
    layer = tuned.get_submodule(fed[name]).requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.seed)
        layer.reset_parameters()
    fit(tuned, bench.data, _TUNING, bench.seed)
    model.load_state_dict(dict(tuned.named_parameters()), strict=False)
    return bench.planted(model, [name], recalibrated(model, bench.data.training(128)))


@fault("stale", "rescaled_weights")
def rescaled_weights(bench: Bench) -> Planted:
    """One layer's weights were scaled by 1.5, "as the norm takes the scale out again": in train mode it does."""
    model = bench.trained()
    fed = feeders(model, bench.data.held_out())
    name = bench.pick(list(fed))
    with torch.no_grad():
        for parameter in model.get_submodule(fed[name]).parameters():
            parameter *= 1.5
    return bench.planted(model, [name], recalibrated(model, bench.data.training(128)))
