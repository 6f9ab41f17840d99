"""Models whose own forward opens this library's blocks: exported, compiled, folded, and run without norms."""

import copy
import warnings

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import StateError, UnknownNameError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

BLOCKS = {
    "no_update": batchnorm.no_update,
    "no_update, by names": lambda model: batchnorm.no_update(model, ["f.1", "f.4"]),
    "no_update, by a pattern": lambda model: batchnorm.no_update(model, "f.*"),
    "use running": lambda model: batchnorm.use("running", model),
    "accumulated_update": batchnorm.accumulated_update,
}
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())


class Model(nn.Module):
    def __init__(self, block, norm=nn.BatchNorm2d):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4))
        self.block = block

    def forward(self, x):
        with self.block(self):
            return self.f(x)


def model_of(block, norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    model = Model(block, norm)
    for m in (model.f[1], model.f[4]):
        nn.init.normal_(m.running_mean)
        nn.init.uniform_(m.running_var, 0.5, 2)
    return model.eval()


@pytest.mark.every(4)
@every_block
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, batchnorm.nn.BatchNorm2d])
@pytest.mark.parametrize("grad", [True, False])
def test_all_norms_are_folded(block, norm, grad):
    model = model_of(block, norm)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("error")
        result = batchnorm.fold(model, X)
        y = result.model(X)
    assert result.summary.startswith("2 of 2 norms folded")
    torch.testing.assert_close(y, model(X))
    torch.testing.assert_close(result.unfold()(X), model(X))


@pytest.mark.every(3)
@every_block
@pytest.mark.parametrize("strict", [True, False])
def test_the_exported_program_is_that_of_the_model_without_the_block(block, strict):
    model = model_of(block)
    program = torch.export.export(model, (X,), strict=strict)
    plain = torch.export.export(model.f, (X,), strict=strict)
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == [
        str(n.target) for n in plain.graph.nodes if n.op == "call_function"
    ]
    assert not batchnorm.fold(program).left


@every_block
def test_compiled_whole_in_eval_mode_and_refused_in_train_mode(block):
    model = model_of(block)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), model(X))
    model.f[4].train()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises((StateError, torch._dynamo.exc.Unsupported)):
        compiled(X)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_block_that_would_change_an_exported_program_is_refused():
    with pytest.raises(StateError, match="cannot be entered in compiled code"):
        torch.export.export(model_of(lambda m: batchnorm.use("batch", m)), (X,), strict=False)
    for block in BLOCKS.values():
        with pytest.raises(StateError, match="cannot be entered in compiled code"):
            torch.export.export(model_of(block).train(), (X,), strict=False)


def test_frozen_norms_may_be_exported_under_either_use():
    for statistics in ("batch", "running"):
        model = model_of(lambda m, s=statistics: batchnorm.use(s, m))
        batchnorm.freeze(model)
        model.train()
        program = torch.export.export(model, (X,), strict=False)
        torch.testing.assert_close(program.module(check_guards=False)(X), model(X))


@every_block
def test_without_norms_a_block_warns_in_train_mode_only(block):
    model = batchnorm.fold(model_of(block), X).model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = model(X)
    with pytest.warns(UserWarning, match="Model holds no batch norm, so that the block does nothing") as caught:
        assert torch.equal(model.train()(X), y)
    assert caught[0].filename == __file__


def test_names_of_norms_that_are_folded_mean_nothing_in_eval_mode_and_others_stay_mistakes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.BatchNorm2d(4)).eval()
    folded = batchnorm.fold(model, X).model
    assert isinstance(folded[3], nn.BatchNorm2d)
    with batchnorm.no_update(folded, ["1", "3"]):
        folded[3].train()(torch.randn(2, 4, 3, 3))
    assert folded[3].num_batches_tracked == 0
    with pytest.raises(UnknownNameError, match="no norm of that name"):
        batchnorm.no_update(folded.eval(), ["1", "9"]).__enter__()
    with pytest.raises(UnknownNameError, match="no norm of that name"):
        batchnorm.no_update(folded.train(), ["1", "3"]).__enter__()


def test_gradients_under_use_running_in_eval_mode_are_those_of_the_forward():
    norm = nn.BatchNorm1d(3).eval()
    x = torch.randn(4, 3, requires_grad=True)
    with batchnorm.use("running", norm):
        y = norm(x)
    norm.running_var.fill_(9.0)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.full_like(x, (1 + norm.eps) ** -0.5))
