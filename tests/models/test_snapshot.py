from __future__ import annotations

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.models.snapshot import Snapshot, Structure, Values, restored_if_raised, untouched
from batchnorm.models.transaction import transaction
from batchnorm.nn.pending import deferring_always


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3).eval()))


def state(model):
    return copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]


def assert_same(a, b):
    assert list(a[0]) == list(b[0])
    assert all(torch.equal(v, b[0][k]) for k, v in a[0].items())
    assert a[1] == b[1]


def test_buffers_and_modes_come_back_into_the_same_tensors():
    model = net()
    before, buffers = state(model), list(model.buffers())
    snapshot = Snapshot(model)
    model.train()
    model(torch.randn(4, 3))
    assert model[1].num_batches_tracked.item() == 1
    snapshot.restore()
    assert_same(state(model), before)
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))


def test_replaced_added_and_removed_buffers_are_put_right():
    model = net()
    before, mean = state(model), model[1].running_mean
    snapshot = Snapshot(model)
    model[1].running_mean = torch.full((3,), 9.0)
    model[1].running_var = None
    model[1].register_buffer("extra", torch.zeros(1))
    del model[3][0].num_batches_tracked
    snapshot.restore()
    assert_same(state(model), before)
    assert model[1].running_mean is mean


def test_parameters_keep_the_values_that_they_got():
    model = net()
    before = model[0].weight.detach().clone()
    snapshot = Snapshot(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    snapshot.restore()
    assert torch.equal(model[0].weight, before + 1)
    assert model[0].weight.requires_grad


def test_a_mode_is_restored_past_an_overridden_train():
    class Stubborn(nn.BatchNorm1d):
        def train(self, mode=True):
            return self

    model = nn.Sequential(Stubborn(3))
    model[0].training = False
    snapshot = Snapshot(model)
    model[0].training = True
    snapshot.restore()
    assert model[0].training is False


def test_it_can_restore_twice():
    model = net()
    before, snapshot = state(model), Snapshot(model)
    for _ in range(2):
        model(torch.randn(4, 3))
        snapshot.restore()
        assert_same(state(model), before)


def test_lazy_expanded_and_scripted_modules_do_not_stand_in_the_way():
    expanded = nn.Module()
    expanded.register_buffer("one", torch.ones(1).expand(3))
    model = nn.Sequential(nn.LazyBatchNorm1d(), expanded)
    Snapshot(model).restore()
    Values(model.parameters()).restore()
    with pytest.warns(DeprecationWarning, match=r"torch\.jit\.script"):
        scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3)))
    snapshot = Snapshot(scripted)
    scripted(torch.randn(4, 3))
    snapshot.restore()
    assert all(b.eq(0).all() for name, b in scripted.named_buffers() if name.endswith(("mean", "tracked")))


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_untouched_however_the_body_ends(error):
    model = net()
    before, generator = state(model), torch.get_rng_state()
    with nullcontext() if error is None else pytest.raises(error), untouched(model):
        model.train()(torch.randn(4, 3))
        if error is not None:
            raise error
    assert_same(state(model), before)
    assert torch.equal(torch.get_rng_state(), generator)


def test_parameters_that_were_replaced_come_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = dict(model.named_parameters())
    with untouched(model):
        model[0]._parameters["weight"] = torch.zeros(2, 2)
        del model[1].bias
        model[1].register_parameter("extra", nn.Parameter(torch.zeros(1)))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is p for name, p in before.items())


class Stops(nn.Module):
    """Fails while the output of a fused norm has not been read yet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fails = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.conv(x))
        if self.fails:
            raise RuntimeError("stop")
        return torch.relu(h)


def test_a_step_that_a_fused_layer_owes_is_neither_lost_nor_taken_after_all_was_put_back() -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = batchnorm.convert(Stops(), x, fuse=True).model.train()
    with deferring_always():
        unread = model.norm(x.new_ones(4, 4, 8, 8))
        before = copy.deepcopy(model.norm.state_dict())
        model.fails = True
        with pytest.raises(RuntimeError) as caught, untouched(model):
            model(x)
        # the traceback holds the forward's frame, and with it the output that nobody has read
        assert model.norm.num_batches_tracked == before["num_batches_tracked"] + 1  # the one from before the block
        after = copy.deepcopy(model.norm.state_dict())
        del caught
        gc.collect()
        assert all(torch.equal(value, after[key]) for key, value in model.norm.state_dict().items())
        assert unread.mean().isfinite()
        assert model.norm.num_batches_tracked == 1


# -- the parts, and when they are put back -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_is_set_aside_comes_back_after_an_exception_only(error):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    norm, mean = model[0], model[0].running_mean

    def change(raised=None):
        norm.__class__ = type("Other", (torch.nn.BatchNorm1d,), {})
        norm.mark = 1
        norm.running_mean = torch.ones(2)
        model[0] = torch.nn.Identity()
        mean.fill_(float("nan"))
        if raised is not None:
            raise raised

    with pytest.raises(error), restored_if_raised(Structure(model.modules())), restored_if_raised(Values([mean])):
        change(error)
    assert model[0] is norm
    assert type(norm) is torch.nn.BatchNorm1d
    assert not hasattr(norm, "mark")
    assert norm.running_mean is mean
    assert mean.tolist() == [0, 0]
    with restored_if_raised(Structure(model.modules())), restored_if_raised(Values([mean])):
        change()
    assert isinstance(model[0], torch.nn.Identity)
    assert mean.isnan().all()


def test_an_interrupt_of_the_verb_after_the_body_takes_the_change_back_too():
    value = torch.zeros(2)

    @transaction("test")
    def verb(model):
        with restored_if_raised(Values([value])):
            value.fill_(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verb(torch.nn.Identity())
    assert value.tolist() == [0, 0]


def test_values_of_every_kind_of_tensor_come_back():
    with torch.inference_mode():
        inference = torch.zeros(2)
    tensors = [torch.zeros(2), inference, torch.zeros(1).expand(3), torch.zeros(2, 2).to_sparse(), torch.zeros(4)[::2]]
    values = Values(tensors)
    tensors[0].fill_(float("nan"))
    with torch.inference_mode():
        inference.add_(1)
    tensors[2][:1].add_(1)
    tensors[3].add_(torch.ones(2, 2).to_sparse())
    tensors[4].add_(1)
    for _ in range(2):  # as often as need be
        values.restore()
    assert all(t.to_dense().eq(0).all() for t in tensors)
