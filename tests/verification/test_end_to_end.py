from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from batchnorm.dataflow.run import run
from batchnorm.errors import InputError, VerificationError
from batchnorm.folding.fold import fold
from batchnorm.models.outputs import NamedTensor
from batchnorm.verification import end_to_end as verify_module
from batchnorm.verification.end_to_end import ReferenceOutputs, verify, verify_float64

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def test_a_run_changes_nothing_and_repeats():
    net = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    first, second = run(net, X), run(net, X)
    assert torch.equal(first[0].tensor, second[0].tensor)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(InputError, match="Sequential fails"):
        run(net, X[:, :3])


def test_bound_follows_its_formula():
    net = make()
    reference = ReferenceOutputs.of(net, X, list(net.parameters()))
    u = torch.finfo(torch.float32).eps / 2
    (moved,), (bound,) = reference.moved, reference.bounds()
    assert 0 < moved < 1e-5
    assert bound == 8 * (moved + u * float(net(X).detach().abs().max()))


def test_nudges_move_by_one_unit_and_are_taken_back():
    weights = [torch.randn(100), torch.randn(100).double(), torch.randn(100).bfloat16(), torch.zeros(3)]
    before = [w.clone() for w in weights]
    with verify_module._nudged(weights, torch.Generator().manual_seed(0)):
        for weight, old in zip(weights[:3], before, strict=False):
            relative = ((weight.double() - old.double()) / old.double()).abs()
            eps = torch.finfo(old.dtype).eps
            assert 0.4 < float((relative > 0).double().mean()) < 0.9
            assert float(relative.max()) <= 2 * eps
        assert torch.equal(weights[3], before[3])
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    with pytest.raises(KeyboardInterrupt), verify_module._nudged(weights, torch.Generator()):
        raise KeyboardInterrupt
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_nudges_follow_the_precision_that_products_are_allowed():
    try:
        spacings = []
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            spacings.append([verify_module.spacing(torch.ones(1, dtype=d)) for d in (torch.float32, torch.float64)])
    finally:
        torch.set_float32_matmul_precision("highest")
    assert spacings == [[2.0**-23, 2.0**-52], [2.0**-7, 2.0**-52]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_error_of_one_part_in_a_thousand_is_caught(dtype):
    """In bfloat16 that is below its rounding, and only the comparison in float64 catches it."""
    net = make().to(dtype)
    reference = ReferenceOutputs.of(net, X.to(dtype), list(net.parameters()))
    wide = copy.deepcopy(net).double()
    before = run(wide, X.to(dtype).double())
    wide[2].weight.data *= 1.001
    after = run(wide, X.to(dtype).double())
    with pytest.raises(VerificationError, match="in float64; rounding explains at most"):
        verify_float64(before, after, reference, torch.finfo(dtype).eps / 2)


def test_the_same_model_agrees():
    net = make()
    reference = ReferenceOutputs.of(net, X, list(net.parameters()))
    assert verify(reference, run(net, X)).error == 0
    outputs = run(copy.deepcopy(net).double(), X.double())
    agreement = verify_float64(outputs, outputs, reference, 2.0**-24)
    assert agreement is not None
    assert agreement.error == 0


def test_a_copy_that_returns_other_things_in_float64_is_not_compared_there():
    net = make()
    reference = ReferenceOutputs.of(net, X, list(net.parameters()))
    others = [NamedTensor("[0]", torch.zeros(1)), NamedTensor("[1]", torch.zeros(1))]
    assert verify_float64(others, others, reference, 2.0**-24) is None


def reference_of(*tensors, moved=0.0):
    return ReferenceOutputs([NamedTensor(f"[{i}]", t) for i, t in enumerate(tensors)], [moved] * len(tensors))


def outputs_of(*tensors):
    return [NamedTensor(f"[{i}]", t) for i, t in enumerate(tensors)]


def test_the_message_names_the_output_and_both_numbers():
    with pytest.raises(VerificationError, match=r"Output \[1\] .* by 0.5; rounding explains at most 4.77e-07"):
        verify(reference_of(X, torch.ones(2)), outputs_of(X, torch.tensor([1.0, 1.5])))


def test_each_output_has_a_bound_of_its_own():
    small, large = torch.ones(2), torch.full((2,), 1e6)
    agreement = verify(reference_of(small, large), outputs_of(small + 1e-7, large + 0.125))
    assert agreement.error == 0.125
    with pytest.raises(VerificationError):
        verify(reference_of(small, large), outputs_of(small + 0.125, large))


def test_nan_and_infinity_agree_with_themselves_only():
    odd = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    assert verify(reference_of(odd), outputs_of(odd.clone())).error == 0
    for i, value in [(0, math.nan), (1, 0.0), (2, -math.inf), (3, math.nan)]:
        other = odd.clone()
        other[i] = value
        with pytest.raises(VerificationError, match="by inf"):
            verify(reference_of(odd), outputs_of(other))


def test_nothing_finite_is_nothing_verified():
    for nothing in (torch.full((3,), math.nan), torch.empty(0)):
        with pytest.raises(VerificationError, match="no finite number"):
            verify(reference_of(nothing), outputs_of(nothing))


def test_whole_numbers_must_agree_unless_rounding_changes_them():
    a, b = torch.tensor([3, 4]), torch.tensor([3, 5])
    assert verify(reference_of(a), outputs_of(a)).error == 0
    with pytest.raises(VerificationError):
        verify(reference_of(a), outputs_of(b))
    assert verify(reference_of(a, moved=1.0), outputs_of(b)).error == 0


def test_structure_must_agree():
    with pytest.raises(VerificationError, match="returns 2 tensors and the original 1"):
        verify(reference_of(X), outputs_of(X, X))
    with pytest.raises(VerificationError, match="by inf"):
        verify(reference_of(X), outputs_of(X[:2]))


@pytest.mark.sweep
def test_false_alarms_are_rare_even_for_a_single_number():
    """The documented chance, 3e-4 at most a fold, makes more than one alarm in 60 folds an event of 2e-4."""
    alarms = 0
    for seed in range(60):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1), nn.BatchNorm1d(1)).eval()
        for norm in (net[1], net[4]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        try:
            assert len(fold(net, torch.randn(1, 8)).folded) == 2
        except VerificationError:
            alarms += 1
    assert alarms <= 1
