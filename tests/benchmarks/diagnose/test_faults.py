"""The planted faults themselves: each does damage, each in a copy, the same for the same seed."""

import copy
from functools import cache

import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks.diagnose.damage import measure
from benchmarks.diagnose.data import load
from benchmarks.diagnose.faults import FAULTS, HEALTHY
from benchmarks.diagnose.faults.dataflow import execution_order, feeders, first_moved, statistics_gap
from benchmarks.diagnose.training import norms, trained

CAUSES = {
    "average_not_arrived",
    "averaged_weights",
    "batch_mates",
    "biased_variance",
    "cumulative_average",
    "dead_channels",
    "domain_shift",
    "eps_mismatch",
    "frozen_wrong",
    "half_precision",
    "input_preparation",
    "momentum_convention",
    "never_updated",
    "not_the_norms",
    "padding",
    "poisoned",
    "pruned_weights",
    "shared_norm",
    "small_batches",
    "stale",
    "train_mode",
}


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}, {
        name: module.training for name, module in model.named_modules()
    }


# One of each way to get at a model: buffers, modes, passes, freezing, weights, fine-tuning. Training takes most of the
# time: the other faults, and the healthy models that are trained in a way of their own, are planted by `make test-all`.
TOUCHING = (
    "poisoned.nan",
    "train_mode.untracked",
    "frozen_wrong.by_hand",
    "frozen_wrong.library_early",
    "padding.dry_run",
    "pruned_weights.everywhere",
    "dead_channels.gamma",
    "stale.replaced_layer",
)
QUICK = (*TOUCHING, "healthy.held_out_128", "healthy.folded", "healthy.untrained")


def some(names):
    return pytest.mark.parametrize(
        "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.sweep) for name in names]
    )


@cache
def planted(name):
    """The MLP with one of the faults, or with none; another network for what is not planted in an MLP."""
    fault = {**FAULTS, **HEALTHY}[name]
    return fault("mlp" if "mlp" in fault.architectures else fault.architectures[0], 0)


def test_every_cause_is_planted():
    assert {fault.cause for fault in FAULTS.values()} == CAUSES
    assert all(fault.plant.__doc__ for fault in FAULTS.values())


# What was never trained classifies nothing rightly; without its branches a network does little.
UNTRAINED = {"healthy.untrained": -1.0, "healthy.zero_init": -1.0}


# Rounding moves float32 outputs by some 1e-6, bfloat16 ones by 1e-2; a fault must be told from both.
@some(FAULTS)
def test_every_fault_changes_eval_outputs(name):
    assert measure(planted(name)).output_gap > 0.02


@some(HEALTHY)
def test_healthy_models_are_right_and_learnt(name):
    damage = measure(planted(name))
    assert damage.output_gap == 0.0
    least = UNTRAINED.get(name, 0.9)
    assert damage.accuracy_before == damage.accuracy_after > least


@some(FAULTS)
def test_right_layers_are_modules_of_the_model(name):
    assert planted(name).layers
    assert planted(name).layers <= dict(planted(name).model.named_modules(remove_duplicate=False)).keys()


@some(FAULTS)
def test_right_and_faulty_models_see_the_same_pictures(name):
    labels, right = (torch.cat([labels for _, labels in batches]) for batches in _both(planted(name)))
    assert torch.equal(labels, right)


def _both(case):
    return case.batches, case.right_batches


@pytest.mark.parametrize("architecture", ["mlp", pytest.param("resnet", marks=pytest.mark.sweep)])
def test_planting_leaves_the_trained_model_as_it_was(architecture):
    original = trained(architecture, 0)
    tensors, modes = state(original)
    for name in TOUCHING:
        FAULTS[name](architecture, 0)
    after, modes_after = state(original)
    assert modes_after == modes
    assert tensors.keys() == after.keys()
    assert all(torch.equal(after[key], tensors[key]) for key in tensors)
    assert all(p.requires_grad and p.grad is None for p in original.parameters())


@pytest.mark.parametrize("name", ["poisoned.inf", "pruned_weights.one_layer", "stale.replaced_layer"])
def test_the_same_seed_plants_the_same(name):
    one, other = FAULTS[name]("mlp", 1), FAULTS[name]("mlp", 1)
    assert one.layers == other.layers
    mine, yours = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(mine[key].nan_to_num(), yours[key].nan_to_num()) for key in mine)


def test_seeds_and_faults_hit_different_layers():
    hit = {tuple(FAULTS[name]("mlp", 0).layers) for name in FAULTS if name.startswith(("poisoned", "pruned", "dead"))}
    assert len(hit) > 1


def test_order_and_feeders_of_the_mlp():
    model, batches = trained("mlp", 0), load(0).held_out()
    assert execution_order(model, batches) == [f"blocks.{number}.norm" for number in range(4)]
    assert feeders(model, batches) == {f"blocks.{number}.norm": f"blocks.{number}.linear" for number in range(4)}


def test_first_moved_is_the_first_norm_and_the_first_that_is_off():
    right = trained("mlp", 0)
    model = copy.deepcopy(right)
    norms(model)["blocks.2.norm"].running_var *= 2
    assert first_moved(model, right, load(0).held_out()) == ["blocks.0.norm", "blocks.2.norm"]


def test_statistics_gap_is_in_deviations_and_logarithms():
    due, stored = torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4)
    due.running_var.fill_(4.0)
    stored.running_var.fill_(4.0)
    stored.running_mean.fill_(3.0)
    assert statistics_gap(stored, due) == 1.5
    stored.running_mean.zero_()
    stored.running_var.fill_(1.0)
    assert statistics_gap(stored, due) == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-6)
    stored.running_var[0] = -1.0
    assert statistics_gap(stored, due) == float("inf")
