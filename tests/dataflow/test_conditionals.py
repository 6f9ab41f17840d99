"""``torch.cond``: what either branch reads is read, and what comes out is of neither alone."""

import pytest
import torch
from tests.folding.lively_models import lively, randn
from torch import nn

from batchnorm import fold
from batchnorm.errors import InputError


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """``torch.cond`` compiles its branches: nothing that ran before may have used up the compiler's limits."""
    torch._dynamo.reset()


class Net(nn.Module):
    """A norm before the branches, one in each, and one behind."""

    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.b, self.m = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.c, self.o = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.after = nn.BatchNorm2d(4)

    def first(self, x):
        return self.m(self.b(x)).relu()

    def second(self, x):
        return self.o(self.c(x)).tanh()

    def forward(self, x):
        x = self.n(self.a(x))
        return self.after(torch.cond(x.mean() > 0, self.first, self.second, (x,)))


class Shared(Net):
    """The second branch uses the convolution of the first without its norm."""

    def __init__(self):
        super().__init__()
        del self.c, self.o

    def second(self, x):
        return self.b(x).tanh()


def both_ways(model, folded):
    for shift in (-3.0, 3.0):
        x = randn(2, 3, 5, 5) + shift
        with torch.no_grad():
            torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_norms_in_both_branches_go_whichever_is_taken(shift):
    net = lively(Net())
    result = fold(net, randn(2, 3, 5, 5) + shift)
    assert {norm.norm for norm in result.folded} == {"n", "m", "o"}
    assert result.left[0].reason.startswith("It reads the output of cond")
    both_ways(net, result.model)


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_what_the_other_branch_reads_is_read(shift):
    net = lively(Shared())
    result = fold(net, randn(2, 3, 5, 5) + shift)
    assert "m" in {item.norm for item in result.left}
    assert "b runs 2 times" in next(item.reason for item in result.left if item.norm == "m")
    both_ways(net, result.model)


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_in_an_exported_program_norms_outside_the_branches_go(shift):
    net = lively(Net())
    program = torch.export.export(net, (randn(2, 3, 5, 5) + shift,))
    result = fold(program)
    assert "n" in {norm.norm for norm in result.folded}
    both_ways(net, result.model.module())


def test_other_operators_that_are_given_functions_are_named():
    class Loop(nn.Module):
        def forward(self, x):
            step = torch._higher_order_ops.while_loop
            return step(lambda i, y: i < 3, lambda i, y: (i + 1, y * 2), (torch.tensor(0), x))[1]

    with pytest.raises(InputError, match="while_loop is given functions"):
        fold(nn.Sequential(Loop(), nn.BatchNorm2d(3)).eval(), torch.randn(1, 3, 4, 4))


def test_a_compiler_whose_limits_are_used_up_refuses_nothing():
    """Folding runs both branches itself, in eager mode."""
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1, fail_on_recompile_limit_hit=True):
        for rows in (2, 3):
            result = fold(lively(Net()), randn(rows, 3, 5, 5))
            assert {norm.norm for norm in result.folded} == {"n", "m", "o"}
