"""What an installed wheel must be able to do; run by cibuildwheel, outside the repository and without pytest.

python tests/native/smoke.py
"""

from __future__ import annotations

import platform

import torch
from torch import nn

import batchnorm
from batchnorm.functional import use_backend
from batchnorm.kernels.native import available_isas, isa, missing


def main() -> None:
    assert missing is None, f"no native kernels: {missing}"
    print(f"batchnorm {batchnorm.__version__}, torch {torch.__version__}, {platform.machine()}")
    print(f"instruction set {isa()} of {', '.join(available_isas())}")
    norms_agree(torch.contiguous_format)
    norms_agree(torch.channels_last)
    one_step_of_training()
    print("all passed")


def norms_agree(memory_format: torch.memory_format) -> None:
    """Forward and backward pass against torch's batch norm, in training and in eval."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, 5, 13, 11, generator=generator).to(memory_format=memory_format)
    dy = torch.randn(8, 5, 13, 11, generator=generator)
    ours, theirs = batchnorm.nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    with torch.no_grad():
        theirs.weight.uniform_(-1.5, 1.5)
        theirs.bias.uniform_(-1.0, 1.0)
    ours.load_state_dict(theirs.state_dict())
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        x, x_of_theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
        with use_backend("native"):
            y = ours(x)
            y.backward(dy)
        expected = theirs(x_of_theirs)
        expected.backward(dy)
        # results are of magnitude ten at most, and so are the terms they are made of: some roundings of float32
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(y, expected, **close)
        torch.testing.assert_close(x.grad, x_of_theirs.grad, **close)
        # sums of 1144 terms, in two orders
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, **close)
        torch.testing.assert_close(ours.running_var, theirs.running_var, **close)
    print(f"training and eval agree with torch, {memory_format}")


def one_step_of_training() -> None:
    """A convolutional network, converted, one step by the native kernels, its statistics measured again."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    x, target = torch.randn(16, 3, 12, 12), torch.randint(2, (16,))
    result = batchnorm.convert(model)
    model = result.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with use_backend("native"):
        before = nn.functional.cross_entropy(model(x), target)
        before.backward()
        optimizer.step()
        after = nn.functional.cross_entropy(model(x), target)
        assert after < before, (after, before)
        batchnorm.recalibrate(model, [x])
        model.eval()
        evaluated = nn.functional.cross_entropy(model(x), target)
    # statistics of the very batch: eval sees what training saw, up to the divisor n − 1 of n = 1600
    assert abs(evaluated - after) < 1e-2, (evaluated, after)
    print(f"one step: loss {before.item():.4f} → {after.item():.4f}; recalibrated, in eval {evaluated.item():.4f}")


if __name__ == "__main__":
    main()
