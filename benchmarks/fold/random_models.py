"""Random small networks: what a folder may meet, in combinations that nobody would think of."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["RandomModel", "random_model"]

_SIDE = 6
_MODES = ("zeros", "reflect", "replicate", "circular")


class RandomModel(nn.Module):
    """A program: each step reads earlier values by their number and gives a new one.

    Attributes:
        steps: what is run, on which values.
        returned: the numbers of the values that are returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, Callable[..., Tensor] | int, tuple[int, ...]]] = []
        self.returned: list[int] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the values that are returned."""
        values = [x]
        for _, step, read in self.steps:
            run = self.layers[step] if isinstance(step, int) else step
            values.append(run(*(values[i] for i in read)))
        return [values[i] for i in self.returned]

    def describe(self) -> str:
        """Return the program, a line a step."""
        lines = [
            f"v{i} = {name}({', '.join(f'v{r}' for r in read)})" for i, (name, _, read) in enumerate(self.steps, 1)
        ]
        return "\n".join([*lines, f"return {', '.join(f'v{i}' for i in self.returned)}"])


class Sometimes(nn.Module):
    """A norm that runs for some inputs only."""

    def __init__(self, norm: nn.Module, name: str) -> None:
        super().__init__()
        self.norm, self.name = norm, name

    def forward(self, x: Tensor) -> Tensor:
        """Return x, normalized or not."""
        return self.norm(x) if _CONDITIONS[self.name](x) else x


_CONDITIONS: dict[str, Callable[[Tensor], bool]] = {
    "more than one": lambda x: len(x) > 1,
    "at most two": lambda x: len(x) <= 2,
    "narrow": lambda x: x.shape[-1] <= _SIDE,
    "positive": lambda x: float(x.detach().mean()) > 0,
}


class Parted(nn.Module):
    """A norm of the first places along an axis; what is behind them, if anything is, stays as it is."""

    def __init__(self, norm: nn.Module, axis: int, size: int) -> None:
        super().__init__()
        self.norm, self.axis, self.size = norm, axis, size

    def forward(self, x: Tensor) -> Tensor:
        """Return x, a part of it normalized."""
        first, *rest = x.tensor_split([self.size], self.axis)
        return torch.cat([self.norm(first), *rest], self.axis)


class _Builder:
    """Grows a program step by step; knows the shapes of its values, (C, H, W) or (C,)."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.torch_rng = torch.Generator().manual_seed(seed)
        self.model = RandomModel()
        self.shapes: list[tuple[int, ...]] = [(self.rng.choice([2, 3, 4]), _SIDE, _SIDE)]

    def layer(self, module: nn.Module, read: int, shape: tuple[int, ...]) -> None:
        self.model.layers.append(module)
        number = len(self.model.layers) - 1
        self.model.steps.append((f"{number}: {module}", number, (read,)))
        self.shapes.append(shape)

    def function(self, name: str, run: Callable[..., Tensor], read: tuple[int, ...], shape: tuple[int, ...]) -> None:
        self.model.steps.append((name, run, read))
        self.shapes.append(shape)

    def grow(self) -> None:
        """Add a step to one of the last values, as far as its shape allows."""
        last = len(self.shapes) - 1
        read = last if self.rng.random() < 0.75 else self.rng.randrange(len(self.shapes))
        steps = _OF_IMAGES if len(self.shapes[read]) == 3 else _OF_ROWS
        self.rng.choice(steps)(self, read)


def _conv(b: _Builder, read: int) -> None:
    c, h, w = b.shapes[read]
    kernel = b.rng.choice([1, 3])
    if min(h, w) < kernel + 1:
        kernel = 1
    padding = b.rng.choice([0, kernel // 2])
    groups = b.rng.choice([1, c]) if b.rng.random() < 0.4 else 1
    out = groups * b.rng.choice([1, 2]) if groups > 1 else b.rng.choice([2, 3, 4])
    mode = b.rng.choice(_MODES) if padding else "zeros"
    conv = nn.Conv2d(c, out, kernel, padding=padding, groups=groups, bias=b.rng.random() < 0.5, padding_mode=mode)
    size = 2 * padding - kernel + 1
    b.layer(conv, read, (out, h + size, w + size))


def _transposed(b: _Builder, read: int) -> None:
    c, h, w = b.shapes[read]
    if h > 2 * _SIDE:
        return
    groups = b.rng.choice([1, c])
    out = c if groups > 1 else b.rng.choice([2, 3, c])
    b.layer(nn.ConvTranspose2d(c, out, 3, padding=1, groups=groups, bias=b.rng.random() < 0.5), read, (out, h, w))


def _norm(b: _Builder, read: int) -> None:
    shape = b.shapes[read]
    kind = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
    b.layer(kind(shape[0], affine=b.rng.random() < 0.85), read, shape)


def _again(b: _Builder, read: int) -> None:
    """Call a layer a second time: one that gives what it gets, in shape."""
    able = [
        i
        for i, layer in enumerate(b.model.layers)
        if (isinstance(layer, nn.BatchNorm2d) and len(b.shapes[read]) == 3 and layer.num_features == b.shapes[read][0])
        or (
            isinstance(layer, nn.Conv2d)
            and len(b.shapes[read]) == 3
            and layer.in_channels == layer.out_channels == b.shapes[read][0]
            and layer.kernel_size == (1, 1)
        )
    ]
    if able:
        number = b.rng.choice(able)
        b.model.steps.append((f"{number} again", number, (read,)))
        b.shapes.append(b.shapes[read])


def _partly(b: _Builder, read: int) -> None:
    """Normalize some inputs, or some places."""
    c, h, w = b.shapes[read]
    if b.rng.random() < 0.5:
        b.layer(Sometimes(nn.BatchNorm2d(c), b.rng.choice(list(_CONDITIONS))), read, (c, h, w))
    else:
        axis, size = b.rng.choice([(0, 2), (0, 4), (2, h), (3, w), (3, w + 3), (3, max(w - 1, 1))])
        b.layer(Parted(nn.BatchNorm2d(c), axis, size), read, (c, h, w))


def _sized(b: _Builder, read: int) -> None:
    """Compute with the sizes of the input."""
    c, h, w = b.shapes[read]
    multiple = b.rng.choice([2, 3, 4])
    padded = (c, h + -h % multiple, w + -w % multiple)
    ways: list[tuple[str, Callable[[Tensor], Tensor], tuple[int, ...]]] = [
        ("over the width", lambda x: x / x.shape[-1], (c, h, w)),
        ("times the batch", lambda x: x * len(x), (c, h, w)),
        ("plus the height", lambda x: x + x.shape[-2], (c, h, w)),
        ("over the root of the area", lambda x: x / (x.shape[-1] * x.shape[-2]) ** 0.5, (c, h, w)),
        ("by blocks of eight", lambda x: x * (x.shape[-1] // 8 + 1), (c, h, w)),
        ("by places", lambda x: x * torch.arange(1, x.shape[-1] + 1).to(x), (c, h, w)),
        ("pooled to half", lambda x: F.adaptive_avg_pool2d(x, (-(-x.shape[-2] // 2), -(-x.shape[-1] // 2))),
         (c, -(-h // 2), -(-w // 2))),
        (f"padded to a multiple of {multiple}",
         lambda x: F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple)), padded),
        ("views", lambda x: x.view(len(x), x.shape[1], -1).view(x.shape), (c, h, w)),
        ("rolled by the batch", lambda x: x.roll(len(x) - 2, 1), (c, h, w)),
    ]  # fmt: skip
    name, run, shape = b.rng.choice(ways)
    b.function(name, run, (read,), shape)


def _activation(b: _Builder, read: int) -> None:
    made: list[nn.Module] = [
        nn.ReLU(), nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.PReLU(), nn.Tanh(), nn.ReLU6(),
        nn.Dropout(0.5),
    ]  # fmt: skip
    layer = b.rng.choice(made)
    if getattr(layer, "inplace", False) and read == 0:
        layer = nn.ReLU()  # the inputs are not the model's to write into
    b.layer(layer, read, b.shapes[read])


def _pool(b: _Builder, read: int) -> None:
    c, h, w = b.shapes[read]
    if min(h, w) < 4:
        return
    pools = [nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AvgPool2d(2, count_include_pad=False)]
    b.layer(b.rng.choice(pools), read, (c, h // 2, w // 2))


def _upsample(b: _Builder, read: int) -> None:
    c, h, w = b.shapes[read]
    if h <= _SIDE:
        mode = b.rng.choice(["nearest", "bilinear"])
        b.layer(nn.Upsample(scale_factor=2, mode=mode), read, (c, 2 * h, 2 * w))


def _join(b: _Builder, read: int) -> None:
    """Add, concatenate or multiply with another value of that size."""
    c, *size = b.shapes[read]
    others = [i for i, shape in enumerate(b.shapes) if list(shape[1:]) == size and len(shape) == len(size) + 1]
    other = b.rng.choice(others)
    joins = ["cat"] if b.shapes[other][0] != c else ["add", "add", "cat", "mul", "sub"]
    join = b.rng.choice(joins)
    if join == "cat":
        if c + b.shapes[other][0] <= 12:
            b.function("cat", lambda x, y: torch.cat([x, y], 1), (read, other), (c + b.shapes[other][0], *size))
        return
    run: dict[str, Callable[..., Tensor]] = {"add": torch.add, "mul": torch.mul, "sub": torch.sub}
    b.function(join, run[join], (read, other), (c, *size))


def _beside(b: _Builder, read: int) -> None:
    """Add a norm and convolutions that all read one value, and that value itself: branches to be made one kernel."""
    c, *_ = shape = b.shapes[read]
    ends = []
    for _ in range(b.rng.choice([1, 1, 2])):
        kernel, dilation = b.rng.choice([(1, 1), (3, 1), (3, 2)])
        settings = {"padding": dilation * (kernel // 2), "dilation": dilation, "groups": b.rng.choice([1, c])}
        kind = nn.Conv2d if b.rng.random() < 0.8 else nn.ConvTranspose2d
        b.layer(kind(c, c, kernel, bias=b.rng.random() < 0.5, **settings), read, shape)
        if b.rng.random() < 0.5:
            _norm(b, len(b.shapes) - 1)
        ends.append(len(b.shapes) - 1)
    _norm(b, read)
    ends.append(len(b.shapes) - 1)
    if b.rng.random() < 0.3:
        b.function("twice", lambda x: 2 * x, (ends.pop(),), shape)
        ends.append(len(b.shapes) - 1)
    if b.rng.random() < 0.3:
        ends.append(read)
    b.rng.shuffle(ends)
    total = ends[0]
    for end in ends[1:]:
        join = b.rng.choice(["add", "add", "sub"])
        b.function(join, torch.add if join == "add" else torch.sub, (total, end), shape)
        total = len(b.shapes) - 1


def _arrange(b: _Builder, read: int) -> None:
    """Shuffle, flip, cut or turn channels."""
    c, *size = b.shapes[read]
    ways: list[tuple[str, Callable[[Tensor], Tensor], tuple[int, ...]]] = [
        ("flip", lambda x: x.flip(1), (c, *size)),
        ("transpose twice", lambda x: x.transpose(1, -1).contiguous().transpose(1, -1), (c, *size)),
        ("twice", lambda x: 2 * x, (c, *size)),
        ("plus one", lambda x: x + 1, (c, *size)),
    ]
    if c > 1:
        ways.append(("first half", lambda x: x.chunk(2, 1)[0], (-(-c // 2), *size)))
        ways.append(("halves swapped", lambda x: torch.cat(x.split([1, c - 1], 1)[::-1], 1), (c, *size)))
    if c % 2 == 0 and size:
        ways.append(("shuffle", lambda x: F.channel_shuffle(x, 2), (c, *size)))
        ways.append(("shuffle by views", lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2), (c, *size)))
    name, run, shape = b.rng.choice(ways)
    b.function(name, run, (read,), shape)


def _flatten(b: _Builder, read: int) -> None:
    c, h, w = b.shapes[read]
    if c * h * w <= 150:
        b.function("flatten", lambda x: x.flatten(1), (read,), (c * h * w,))
    else:
        b.function("mean", lambda x: x.mean((2, 3)), (read,), (c,))


def _linear(b: _Builder, read: int) -> None:
    out = b.rng.choice([2, 3, 4])
    b.layer(nn.Linear(b.shapes[read][0], out, bias=b.rng.random() < 0.5), read, (out,))


_OF_IMAGES = [_conv] * 5 + [_norm] * 6 + [_activation] * 3 + [_join] * 2 + [_arrange] * 2
_OF_IMAGES += [_transposed, _pool, _upsample, _again, _flatten, _beside, _beside, _partly, _sized, _sized]
_OF_ROWS = [_linear] * 3 + [_norm] * 3 + [_activation, _join, _arrange]


def random_model(seed: int, steps: int = 9) -> tuple[RandomModel, tuple[int, ...]]:
    """Return a network in eval mode, float64, and the shape (C, H, W) of its input; the same for the same seed."""
    builder = _Builder(seed)
    while len(builder.model.steps) < steps:
        builder.grow()
    model = builder.model
    read = {i for _, _, values in model.steps for i in values}
    ends = [i for i in range(1, len(builder.shapes)) if i not in read]
    model.returned = ends + ([builder.rng.randrange(1, len(builder.shapes))] if builder.rng.random() < 0.2 else [])
    model.double().eval()
    _make_lively(model, builder)
    return model, builder.shapes[0]


@torch.no_grad()
def _make_lively(model: nn.Module, builder: _Builder) -> None:
    """Give weights, statistics, γ (of either sign, and zeros) and β values of their own."""

    def noise(like: Any) -> Tensor:
        return torch.randn(like.shape, generator=builder.torch_rng, dtype=torch.float64)

    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.copy_(noise(parameter))
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(noise(module.running_mean))
            module.running_var.copy_(noise(module.running_var).square() + 0.05)
            if module.affine and builder.rng.random() < 0.5:
                module.weight.abs_()  # so that some cross a ReLU
            if module.affine and builder.rng.random() < 0.2:
                module.weight[0] = 0.0
