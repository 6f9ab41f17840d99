from __future__ import annotations

import copy
import json
import threading

import pytest
import torch
from torch import nn

from batchnorm.errors import ArgumentTypeError, InputError, StateError, VerificationError
from batchnorm.folding.fold import fold
from batchnorm.folding.writing import rewrite


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.late = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return {"logits": self.head(torch.tanh(self.late(self.stem(x))).mean((2, 3)))}


def make(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    net = Net().eval()
    for norm in (net.stem[1], net.late):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return net.to(dtype)


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def state_of(model):
    """Everything a fold may not change: tensors and their identity, modes, classes, hooks."""
    tensors = {k: (id(v), v.clone()) for k, v in [*model.named_parameters(), *model.named_buffers()]}
    modules = {k: (id(m), type(m), m.training, dict(m._forward_hooks)) for k, m in model.named_modules()}
    return tensors, modules


def assert_unchanged(model, before):
    tensors, modules = state_of(model)
    assert modules == before[1]
    assert {k: i for k, (i, _) in tensors.items()} == {k: i for k, (i, _) in before[0].items()}
    assert all(torch.equal(v, before[0][k][1]) for k, (_, v) in tensors.items())


def test_result_says_what_was_folded_and_what_was_left():
    net = make()
    before = state_of(net)
    result = fold(net, X)
    assert_unchanged(net, before)
    assert [str(item) for item in [*result.folded, *result.left]] == [
        "stem.1 → stem.0: folded. Its scale and shift go back into the convolution stem.0.",
        "late: not folded. No shift can cross relu in stem.2, whose slope changes at zero. "
        "Nor can it go on: tanh reads it, which is no linear operator. "
        "Nor can it be cut in two: no negative scale can cross relu in stem.2, and 1 of 4 is negative.",
    ]
    assert result.folded[0].kind == "convolution"
    assert result.summary == f"1 of 2 norms folded; output error {result.error:.2g}, bound {result.bound:.2g}"
    assert 0 <= result.error <= result.bound < 1e-4
    assert result.error_float64 is not None
    assert result.error_float64 < 1e-12
    assert "late" in str(result)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert [(item["norm"], item["into"], item["kind"]) for item in data["folded"]] == [
        ("stem.1", "stem.0", "convolution")
    ]
    assert data["left"][0]["into"] is None


def test_refusal_names_both_sides_and_the_other_reader():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.block = nn.Sequential()

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y

    (left,) = fold(nn.Sequential(Residual()).eval(), X).left
    assert str(left) == (
        "0.bn → 0.conv: not folded. The output of conv2d in 0.conv is also read by add in 0. "
        "Nor can it go on: add in 0 adds it to a tensor that is not scaled alike."
    )


def test_class_modes_and_other_modules_are_kept():
    net = make()
    net.label = "mine"
    result = fold(net, X)
    assert type(result.model) is Net
    assert result.model.label == "mine"
    assert type(result.model.stem[1]) is nn.Identity
    assert not result.model.stem[1].training
    assert torch.equal(result.model.head.weight, net.head.weight)
    assert set(net.state_dict()) - set(result.model.state_dict()) == {
        f"stem.1.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert set(result.model.state_dict()) - set(net.state_dict()) == {"stem.0.bias"}


def test_in_place_folds_the_model_itself():
    net, copied = make(), fold(make(), X).model
    result = fold(net, X, inplace=True)
    assert result.model is net
    assert type(net.stem[1]) is nn.Identity
    assert torch.equal(net(X)["logits"], copied(X)["logits"])


def test_nothing_left_to_fold_the_second_time():
    result = fold(fold(make(), X).model, X)
    assert not result.folded
    assert [item.norm for item in result.left] == ["late"]
    assert result.summary == "0 of 1 norms folded"


def test_model_without_norms():
    result = fold(nn.Linear(3, 3), torch.ones(1, 3))
    assert result.summary == "The model has no batch norm."
    assert "no batch norm" in str(result)


def test_train_mode_refuses_every_norm_and_changes_nothing():
    net = make().train()
    before = state_of(net)
    result = fold(net, X)
    assert_unchanged(net, before)
    assert not result.folded
    assert all("call model.eval() first" in item.reason for item in result.left)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_parameters_are_merged_in_float64_and_rounded_once(dtype):
    net = make(dtype=dtype)
    result = fold(net, X.to(dtype))
    assert [f.norm for f in result.folded] == ["stem.1"]
    conv, norm = copy.deepcopy(net.stem[0]).double(), copy.deepcopy(net.stem[1]).double()
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    assert torch.equal(result.model.stem[0].weight, (scale.view(-1, 1, 1, 1) * conv.weight).to(dtype))
    assert torch.equal(result.model.stem[0].bias, (norm.bias - norm.running_mean * scale).to(dtype))


def test_overflow_is_refused():
    net = make(dtype=torch.float16)
    net.stem[0].weight.data.fill_(30.0)
    net.stem[1].running_var.fill_(1e-7)
    net.stem[1].weight.data.fill_(50.0)
    net.late.weight.data.fill_(0.0)
    result = fold(net, (X * 1e-4).half())
    assert result.left[0].reason == "The merged weight of stem.0 would overflow float16."


@pytest.mark.parametrize("grad", [True, False])
def test_requires_grad_and_memory_format_follow_the_old_parameters(grad):
    net = make().to(memory_format=torch.channels_last)
    net.stem[0].weight.requires_grad_(grad)
    conv = fold(net, X).model.stem[0]
    assert conv.weight.requires_grad is grad
    assert conv.bias.requires_grad is grad
    assert conv.weight.stride() == net.stem[0].weight.stride()


def test_parameters_can_be_trained_even_if_folded_in_inference_mode():
    with torch.inference_mode():
        result = fold(make(), X)
    result.model(X)["logits"].sum().backward()
    assert result.model.stem[0].weight.grad is not None


def test_inputs_are_not_written_into():
    class Writer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make()

        def forward(self, x):
            return self.net(x.mul_(2))

    x = X.clone()
    assert fold(Writer().eval(), x).folded
    assert torch.equal(x, X)


def test_model_that_fails_names_itself():
    net = make()
    before = state_of(net)
    with pytest.raises(InputError, match="Net fails on the example inputs: RuntimeError"):
        fold(net, X[:, :2])
    assert_unchanged(net, before)


def test_wrong_type_and_lazy_parameters():
    with pytest.raises(ArgumentTypeError, match=r"expected a torch\.nn\.Module; got function"):
        fold(make, X)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="Run the model once"):
        fold(nn.Sequential(nn.LazyConv2d(3, 3), nn.BatchNorm2d(3)).eval(), X)


def test_model_that_cannot_be_copied_says_why():
    net = make()
    net.lock = threading.Lock()
    with pytest.raises(StateError, match=r"Net cannot be copied.*lock"):
        fold(net, X)


def test_model_that_keeps_activations_with_a_history_is_copied():
    net = make()
    net.kept = [net.stem(X)]
    assert fold(net, X).folded


class Counter(nn.Module):
    """Adds something else at each call."""

    def __init__(self):
        super().__init__()
        self.net, self.count = make(), [0]

    def forward(self, x):
        self.count[0] += 1
        return self.net(x)["logits"] + 1000.0 ** self.count[0]


def test_output_that_is_not_determined_by_the_inputs_is_refused():
    with pytest.raises(VerificationError, match="not determined by its inputs"):
        fold(Counter().eval(), X)


def test_a_count_in_an_attribute_goes_on_where_it_stood():
    class Plain(Counter):
        def forward(self, x):
            self.count = [self.count[0] + 1]
            return self.net(x)["logits"] + self.count[0]

    net = Plain().eval()
    net(X)
    folded = fold(net, X).model
    assert net.count == folded.count == [1]
    torch.testing.assert_close(folded(X), net(X), rtol=1e-4, atol=1e-4)


def test_output_without_a_finite_number_is_refused():
    net = make()
    net.head.bias.data.fill_(float("nan"))
    with pytest.raises(VerificationError, match="no finite number"):
        fold(net, X)


def test_in_autocast_the_way_out_is_told():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), X)
    assert result.left[0].reason.startswith(
        "The weight of conv2d is not a parameter of the model, but a cast of torch.autocast; fold outside of it."
    )


@pytest.mark.parametrize("place", ["inputs", "statistics"])
def test_values_that_are_all_nan_on_the_way_are_told_of(place):
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval(), X
    if place == "inputs":
        x = torch.full_like(X, float("nan"))
    else:
        net[1].running_mean[:] = float("nan")
    with pytest.raises(VerificationError, match="look for NaN in its parameters and statistics"):
        fold(net, x)


@pytest.mark.every(4)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_wrong_algebra_or_an_interruption_leaves_the_model_bit_identical(monkeypatch, inplace, error):
    net = make()
    before = state_of(net)
    of_fold, of_settle = "batchnorm.folding.fold_model.", "batchnorm.folding.proving.proved_plan."
    names = [
        of_fold + name
        for name in ("trace", "run", "verify", "verify_float64", "trial_copy", "describe_folded", "prove_plan")
    ]
    names += [of_settle + name for name in ("trace", "make_plan", "round_parameters", "trial_copy")]
    names += ["batchnorm.dataflow.sizes." + name for name in ("trace", "random_like")]
    for name in names:
        with monkeypatch.context() as patch:
            patch.setattr(name, _raising(error))
            with pytest.raises(error):
                fold(net, X, inplace=inplace)
        assert_unchanged(net, before)


@pytest.mark.parametrize("after", ["parameters", "one module", "all"])
def test_interruption_while_the_model_itself_is_rewritten(monkeypatch, after):
    net = make()
    before, changed = state_of(net), []
    weight, replace = net.stem[0].weight, rewrite.replace_by_id

    def interrupted(model, new):
        if model is not net or not new:  # what has computed weights comes first; here nothing has
            return replace(model, new)
        assert net.stem[0].weight is not weight
        if after != "parameters":
            replace(model, new if after == "all" else dict([next(iter(new.items()))]))
        changed.append(sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()))
        raise KeyboardInterrupt

    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    monkeypatch.setattr(rewrite, "replace_by_id", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fold(net, X, inplace=True)
    assert (changed[0] < norms) == (after != "parameters")
    assert_unchanged(net, before)


def _raising(error):
    def stub(*args, **kwargs):
        raise error

    return stub


def test_only_the_norms_that_stop_the_model_are_left():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(7))

        def forward(self, x):
            for i, block in enumerate(self.blocks):
                x = block(x)
                if i in (1, 2, 6):
                    x = x * (1 + block[1].eps)
            return x

    result = fold(Picky().eval(), X)
    assert [f.norm for f in result.folded] == [f"blocks.{i}.1" for i in (0, 3, 4, 5)]
    assert [item.norm for item in result.left] == [f"blocks.{i}.1" for i in (1, 2, 6)]
    assert all("no attribute 'eps'" in item.reason for item in result.left)


def test_two_threads_fold_two_models():
    nets, results = [make(seed) for seed in range(4)], {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: fold(nets[i], X)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, net in enumerate(nets):
        assert [f.norm for f in results[i].folded] == ["stem.1"]
        with torch.no_grad():
            gap = (results[i].model(X)["logits"] - net(X)["logits"]).abs().max()
        assert float(gap) <= results[i].bound


def test_a_distributed_wrapper_is_to_be_taken_off(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval())
        with pytest.raises(StateError, match=r"Fold model\.module"):
            fold(wrapped.eval(), torch.randn(1, 3, 4, 4))
        assert len(fold(wrapped.module.eval(), torch.randn(1, 3, 4, 4)).folded) == 1
    finally:
        dist.destroy_process_group()
