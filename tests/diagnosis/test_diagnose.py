"""The verb: what it takes, what it refuses, and that it leaves no trace."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.diagnosis.metrics import spread_out
from torch import nn

import batchnorm
from batchnorm import errors


def state_of(model: nn.Module) -> dict:
    return {
        "tensors": {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())},
        "modes": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    }


def same(a: dict, b: dict) -> bool:
    tensors = all(
        x.dtype == b["tensors"][k].dtype and torch.equal(x.view(torch.uint8), b["tensors"][k].view(torch.uint8))
        for k, x in a["tensors"].items()
        if x.dim()
    )
    return tensors and a["modes"] == b["modes"] and a["hooks"] == b["hooks"]


def test_a_healthy_model(net, batches) -> None:
    result = batchnorm.diagnose(net, batches, spread_out)
    assert result.healthy
    assert [layer.name for layer in result.layers] == ["bn1", "bn2", "bn3", "bn4"]
    assert result.metrics.eval == pytest.approx(result.metrics.recalibrated, rel=0.1)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("size", [32, 128])
def test_few_batches_make_no_false_alarm(net, batches, count: int, size: int) -> None:
    data = torch.cat(batches)
    some = [data[i * size : (i + 1) * size] for i in range(min(count, len(data) // size))]
    assert batchnorm.diagnose(net, some).healthy


def test_of_a_model_in_train_mode_it_is_judged_what_eval_would_bring(net, batches) -> None:
    net.bn2.running_mean.add_(3)
    told = []
    for mode in (False, True):
        net.train(mode)
        result = batchnorm.diagnose(net, batches, spread_out)
        told.append((result.metrics, [(f.layer, f.cause, str(f.severity), str(f.gain)) for f in result.findings]))
        plain = batchnorm.diagnose(net, batches)
        assert plain.findings[0].gain.gap_before > 0.1 > plain.findings[0].gain.gap_after
    assert told[0] == told[1]


@pytest.mark.parametrize("mode", ["eval", "train", "mixed"])
def test_the_model_is_bit_identical_afterwards(net, batches, mode: str) -> None:
    net.train(mode != "eval")
    if mode == "mixed":
        net.bn2.eval()
    net.bn3.running_var[2] = torch.nan
    before, random = state_of(net), torch.random.get_rng_state()
    assert not batchnorm.diagnose(net, batches, spread_out).healthy
    assert same(before, state_of(net))
    assert torch.equal(random, torch.random.get_rng_state())


def _fails(output, batch):
    raise ValueError("no labels")


@pytest.mark.parametrize(
    ("on", "options", "error", "said"),
    [
        (lambda b: [], {}, errors.EmptyStreamError, "at least one batch"),
        (lambda b: b[0], {}, errors.ArgumentTypeError, "one tensor"),
        (lambda b: [b[0], b[1] * torch.nan], {}, errors.NonFiniteError, "batch itself holds such values"),
        (lambda b: [b[0], b[1][:, :2]], {}, errors.BatchError, "failed on batch 1"),
        (lambda b: ["text"], {}, errors.ArgumentTypeError, "forward="),
        (lambda b: b, {"loss_or_metric": _fails}, errors.BatchError, "loss_or_metric failed on batch 0"),
        (lambda b: b, {"loss_or_metric": lambda o, b: o}, errors.ArgumentTypeError, "expected one number"),
        (lambda b: b, {"loss_or_metric": lambda o, b: "much"}, errors.ArgumentTypeError, "got str"),
        (lambda b: b, {"names": "bn9"}, errors.UnknownNameError, "did you mean"),
        (lambda b: b, {"names": []}, errors.StateError, "names is empty"),
        (lambda b: [b[0][:1]], {}, errors.ShapeError, "at least 2 values"),
    ],
)
def test_what_cannot_be_used_is_refused_and_leaves_no_trace(net, batches, on, options, error, said: str) -> None:
    before = state_of(net)
    with pytest.raises(error, match=said):
        batchnorm.diagnose(net, on(batches), **options)
    assert same(before, state_of(net))


def test_an_interrupt_leaves_no_trace(net, batches) -> None:
    def stopped(output, batch):
        raise KeyboardInterrupt

    before = state_of(net)
    with pytest.raises(KeyboardInterrupt):
        batchnorm.diagnose(net, batches, stopped)
    assert same(before, state_of(net))


def test_batches_may_be_tuples_dicts_or_anything_with_forward(net, batches, found) -> None:
    net.bn3.reset_running_stats()
    expected = [("never_updated", "bn3")]
    assert found(net, [(b, torch.zeros(len(b))) for b in batches]) == expected
    assert found(net, [{"x": b} for b in batches]) == expected
    result = batchnorm.diagnose(net, [[None, b] for b in batches], forward=lambda m, b: m(b[1]))
    assert [(f.cause, f.layer) for f in result.findings] == expected


def test_a_generator_is_walked_once(net, batches) -> None:
    assert batchnorm.diagnose(net, (b for b in batches), training_batches=(b for b in batches)).healthy


def test_wrapped_and_scripted_models(net, batches) -> None:
    net.bn3.reset_running_stats()
    wrapped = nn.DataParallel(net)
    assert batchnorm.diagnose(wrapped, batches).findings[0].layer == "module.bn3"
    scripted = torch.jit.script(copy.deepcopy(net))
    result = batchnorm.diagnose(nn.Sequential(scripted).eval(), batches)
    assert len(result.layers) == 4


def test_the_model_itself_may_be_a_norm() -> None:
    norm = nn.BatchNorm1d(3)
    nn.init.uniform_(norm.weight)
    (finding,) = batchnorm.diagnose(norm.eval(), [2 + torch.randn(64, 3)] * 2).findings
    assert (finding.cause, finding.layer) == ("never_updated", "")


def test_outputs_may_be_anything(net, batches) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x):
            return {"logits": [self.net(x)], "nothing": None}

    assert batchnorm.diagnose(Wrapped().eval(), batches, lambda o, b: o["logits"][0].mean()).healthy


def test_layers_behind_a_faulty_one_inherit_and_are_not_named(net, batches) -> None:
    net.bn1.running_mean.add_(net.bn1.running_var.sqrt())
    net.bn1.running_var.mul_(4)
    result = batchnorm.diagnose(net, batches)
    assert [layer.name for layer in result.layers if layer.off] == ["bn1"]
    assert result.layers[1].deployed_distance > 2 * result.layers[1].distance


def test_the_trial_of_a_cure_tells_what_the_cure_brings(net, batches) -> None:
    net.bn2.reset_running_stats()
    (finding,) = batchnorm.diagnose(net, batches, spread_out).findings
    assert finding.gain.gap_after < 0.5 * finding.gain.gap_before
    exec(finding.cure, {"model": net, "batches": batches, "batchnorm": batchnorm})
    after = batchnorm.diagnose(net, batches, spread_out)
    assert after.healthy
    # recalibrate runs the norm before it on batch statistics, the trial on stored ones: another estimate of the same
    assert after.metrics.eval == pytest.approx(finding.gain.metric_after, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("verb", ["diagnose", "recalibrate"])
def test_a_norm_in_half_precision_inside_a_float_model_is_named(net, batches, dtype, verb: str) -> None:
    for name in ("running_mean", "running_var"):
        setattr(net.bn2, name, getattr(net.bn2, name).to(dtype))
    try:
        getattr(batchnorm, verb)(net, batches)
    except errors.BatchError as error:
        said = str(error)
    else:  # a torch that runs it
        return
    assert "bn2 holds half precision" in said
    assert "model.get_submodule('bn2').float()" in said


def test_norms_that_were_not_met_are_listed_those_of_a_models_own_threads_too():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inside, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(self.inside, self.first(x)).result()

    batches = [torch.randn(64, 3)]
    result = batchnorm.diagnose(Pooled(), batches)
    assert [layer.name for layer in result.layers] == ["first"]
    assert [left.name for left in result.left] == ["inside", "unused"]
    assert all("threads that the model starts" in left.reason for left in result.left)
    assert [left.name for left in batchnorm.recalibrate(Pooled(), batches).left] == ["inside", "unused"]
