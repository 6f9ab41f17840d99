from __future__ import annotations

import pytest

from batchnorm.models.prefixes import wrapper_prefix


@pytest.mark.parametrize(("names", "own", "prefix"), [
    (["module.a", "module.b"], ["a", "b"], "module."),
    (["_orig_mod.module.a"], ["a"], "_orig_mod.module."),
    (["module.a", "b"], ["a", "b"], ""),
    (["a"], ["a"], ""),
    (["module.a"], ["module.a"], ""),  # the model has a submodule of that name
    ([], ["a"], ""),
])  # fmt: skip
def test_what_all_names_start_with(names: list[str], own: list[str], prefix: str) -> None:
    assert wrapper_prefix(names, own) == prefix
