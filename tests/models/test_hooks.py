from __future__ import annotations

from torch import nn

from batchnorm.models.hooks import hooks_of


def test_a_kind_without_hooks_is_left_out() -> None:
    module = nn.ReLU()
    assert hooks_of(module) == {}
    before = module.register_forward_pre_hook(lambda *_: None)
    after = module.register_full_backward_hook(lambda *_: None)
    assert set(hooks_of(module)) == {"forward", "backward"}
    before.remove()
    assert set(hooks_of(module)) == {"backward"}
    after.remove()
    assert hooks_of(module) == {}


def test_the_registers_are_those_of_the_module() -> None:
    module = nn.ReLU()
    handle = module.register_forward_hook(lambda *_: None)
    (registers,) = hooks_of(module).values()
    assert [handle.id in register for register in registers] == [True, False]
