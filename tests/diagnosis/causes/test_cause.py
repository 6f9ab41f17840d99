from __future__ import annotations

import inspect
from importlib import import_module

import pytest

from batchnorm.diagnosis.causes import CAUSES
from batchnorm.diagnosis.causes.cause import SECTIONS


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.key)
def test_every_cause_has_a_page_in_a_file_of_its_name(cause) -> None:
    assert tuple(cause.sections()) == SECTIONS
    assert all(cause.sections().values())
    assert inspect.getmodule(cause) is import_module(f"batchnorm.diagnosis.causes.{cause.key}")


def test_keys_are_unique_and_stale_is_the_last_resort() -> None:
    keys = [cause.key for cause in CAUSES]
    assert len(set(keys)) == len(keys) == 24
    assert keys[-3:] == ["stale", "not_the_norms", "kept_statistics"]
