from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.errors import StateError
from batchnorm.nn.bordered import bordered, plain

CONVS = [
    lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: nn.Conv1d(4, 6, 4, padding="same", bias=False),
    lambda: nn.Conv2d(4, 6, 3, padding=1), lambda: nn.Conv2d(4, 6, (3, 5), padding=(0, 2), stride=2, groups=2),
    lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), lambda: nn.Conv3d(4, 4, 3, padding=(2, 1, 0), groups=4),
]  # fmt: skip


@pytest.mark.parametrize("make", CONVS)
def test_what_is_padded_with_is_the_border(make) -> None:
    torch.manual_seed(0)
    conv = make().double()
    n = len(conv.kernel_size)
    border = torch.randn(4, dtype=torch.float64)
    x = torch.randn(2, 4, *(7, 6, 5)[:n], dtype=torch.float64)
    columns = border.view(1, -1, *[1] * n)
    # F.pad has one value for all channels: zeros around x − border, and then the border everywhere
    padded = F.pad(x - columns, conv._reversed_padding_repeated_twice) + columns
    inner = copy.deepcopy(conv)
    inner.padding = 0
    torch.testing.assert_close(bordered(conv, border)(x), inner(padded), rtol=1e-12, atol=1e-12)
    assert torch.equal(bordered(conv, torch.zeros(4))(x), conv(x))


@pytest.mark.every(3)
@pytest.mark.parametrize("make", CONVS)
def test_an_exported_program_takes_any_batch_and_size(make) -> None:
    torch.manual_seed(0)
    conv = make()
    n = len(conv.kernel_size)
    twin = bordered(conv, torch.randn(4))
    free = {0: torch.export.Dim.DYNAMIC, **dict.fromkeys(range(2, 2 + n), torch.export.Dim.AUTO)}
    program = torch.export.export(twin, (torch.randn(2, 4, *(7, 6, 5)[:n]),), dynamic_shapes=(free,)).module()
    for x in (torch.randn(5, 4, *(7, 6, 5)[:n]), torch.randn(1, 4, *(9, 10, 8)[:n])):
        assert torch.equal(program(x), twin(x))


def test_channels_last_and_what_has_no_batch_stay_so() -> None:
    twin = bordered(nn.Conv2d(3, 4, 3, padding=1), torch.randn(3))
    x = torch.randn(2, 3, 5, 6)
    y = twin(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(twin(x[0]), y[0])


def test_parameters_are_shared_under_their_names_and_it_pickles() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    twin = bordered(conv, torch.ones(3))
    assert twin.weight is conv.weight
    assert list(twin.state_dict()) == ["weight", "bias", "border"]
    assert "border" not in conv.state_dict()
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(pickle.loads(pickle.dumps(twin))(x), twin(x))
    assert isinstance(twin, nn.Conv2d)
    assert "border" in repr(twin)
    back = plain(twin)
    assert type(back) is nn.Conv2d
    assert torch.equal(back(x), conv(x))


def test_one_border_takes_the_place_of_another() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    again = bordered(bordered(conv, torch.ones(3)), 2 * torch.ones(3))
    assert again.border.tolist() == [2.0, 2.0, 2.0]


class Own(nn.Conv2d):
    pass


@pytest.mark.parametrize("module", [
    nn.Linear(3, 3), nn.ConvTranspose2d(3, 3, 3), Own(3, 3, 3, padding=1),
    nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
], ids=lambda m: type(m).__name__)  # fmt: skip
def test_other_modules_are_refused(module) -> None:
    with pytest.raises(StateError, match="no convolution of torch's that pads with zeros"):
        bordered(module, torch.zeros(3))
