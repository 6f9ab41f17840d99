"""Restoring is exact to the bit, writes only what changed, and survives an interrupt of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from batchnorm.models.snapshot import Snapshot, untouched


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("odd", torch.tensor([float("nan"), -0.0, 1e-42]))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("waves", torch.tensor([1 + 2j]))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("slanted", torch.arange(6.0).view(2, 3).t())


def bits(model: nn.Module) -> dict[str, Any]:
    return {n: (id(b), b.contiguous().numpy().tobytes()) for n, b in model.named_buffers()}


def test_a_change_of_sign_of_zero_is_a_change() -> None:
    model = Odd()
    before = bits(model)
    snapshot = Snapshot(model)
    model.odd.abs_()
    model.flags.logical_not_()
    model.waves.conj_physical_()
    model.slanted.zero_()
    assert bits(model) != before
    snapshot.restore()
    assert bits(model) == before


def test_what_did_not_change_is_not_written() -> None:
    model = Odd()
    versions = {name: b._version for name, b in model.named_buffers()}
    snapshot = Snapshot(model)
    model.count += 1
    versions["count"] = model.count._version
    snapshot.restore()
    assert {name for name, b in model.named_buffers() if b._version != versions[name]} == {"count"}


def test_meta_tensors_and_modules_without_a_mode_do_not_stand_in_the_way() -> None:
    without_mode = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.BatchNorm1d(2)).eval()))
    for model in (nn.BatchNorm1d(2, device="meta"), without_mode):
        Snapshot(model).restore()


def test_a_second_interrupt_while_restoring_restores_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Odd()
    before = bits(model)
    real, calls = torch.Tensor.copy_, []

    def copy_(self: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)

    def zero_all() -> None:
        with untouched(model):
            for buffer in (model.odd, model.count, model.slanted):
                buffer.zero_()

    with pytest.raises(KeyboardInterrupt):
        zero_all()
    assert bits(model) == before
