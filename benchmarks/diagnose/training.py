"""Short real training runs: SGD with momentum, weight decay, a warm-up and a linear decay; seconds on one thread."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from benchmarks.diagnose.architectures import build
from benchmarks.diagnose.data import Batch, Data, load
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["PLAIN", "Feed", "Recipe", "fit", "logits", "norms", "trained"]

Feed = Callable[[Tensor, Tensor, torch.Generator], Batch]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: passes through the training part: 10 of them are 210 steps of 64 pictures.
        batch: pictures a batch.
        accumulate: batches whose gradients are added up for one step.
        learning_rate: at its height, after a tenth of the steps; it falls to zero linearly.
        momentum: of the norms' running average, by PyTorch's convention; None for a cumulative one.
        eps: of the norms.
        drop_last: leave out the last batch of an epoch where it is smaller than the others.
        prepare: what is done to the untrained network.
        feed: what is made of each batch before the network meets it. Pictures that it appends have no label: they go
            through the network, but not into the loss.
    """

    epochs: int = 10
    batch: int = 64
    accumulate: int = 1
    learning_rate: float = 0.1
    momentum: float | None = 0.1
    eps: float = 1e-5
    drop_last: bool = True
    prepare: Callable[[nn.Module], None] | None = None
    feed: Feed | None = None


PLAIN = Recipe()


def norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the norms by name, in the order in which they are registered."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


@lru_cache(maxsize=64)
def trained(architecture: str, seed: int, recipe: Recipe = PLAIN) -> nn.Module:
    """Return a trained network in eval mode. It is trained once a process: copy it before you change it."""
    model = build(architecture, seed)
    if recipe.prepare is not None:
        recipe.prepare(model)
    for norm in norms(model).values():
        norm.momentum, norm.eps = recipe.momentum, recipe.eps
    return fit(model, load(seed), recipe, seed).eval()


def fit(
    model: nn.Module,
    data: Data,
    recipe: Recipe = PLAIN,
    seed: int = 0,
    after_step: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """Train a network in place, in train mode, and return it; ``after_step`` is told the number of steps done."""
    generator = torch.Generator().manual_seed(seed)
    batches = list(_stream(data, recipe, generator))
    steps = max(1, len(batches) // recipe.accumulate)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    rise = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    model.train()
    for number, (images, labels) in enumerate(batches, 1):
        outputs = model(images)[: len(labels)]
        (F.cross_entropy(outputs, labels) / recipe.accumulate).backward()
        if number % recipe.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if after_step is not None:
                after_step(number // recipe.accumulate, model)
    model.zero_grad(set_to_none=True)
    return model


def _stream(data: Data, recipe: Recipe, generator: torch.Generator) -> Iterator[Batch]:
    for _ in range(recipe.epochs):
        for some in torch.randperm(len(data.train_images), generator=generator).split(recipe.batch):
            if recipe.drop_last and len(some) < recipe.batch:
                continue
            batch = data.train_images[some], data.train_labels[some]
            yield batch if recipe.feed is None else recipe.feed(*batch, generator)


@torch.no_grad()
def logits(model: nn.Module, batches: list[Batch]) -> Tensor:
    """Return the outputs on all batches, one below the other, in the modes in which the modules are.

    The model itself is not called, but a copy of it: a norm in train mode would otherwise go on learning.
    """
    runner = copy.deepcopy(model)
    return torch.cat([runner(images) for images, _ in batches])
