from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import batchnorm
from batchnorm.functional import backends, use_backend
from batchnorm.kernels import native


def test_it_says_what_is_installed_and_what_it_runs_on(command: Callable[..., Any]) -> None:
    found = json.loads(command("info", "--json").out)
    assert found["batchnorm"] == batchnorm.__version__
    assert found["location"] == str(Path(batchnorm.__file__).parent)
    assert found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["devices"][0].startswith("cpu")
    assert found["backends"] == list(backends())
    expected = "torch" if native.missing else "native"
    assert found["active"]["cpu"] == {"training": expected, "eval": expected, "masked": "reference"}
    assert found["native"].startswith(f"none: {native.missing}" if native.missing else f"{native.isa()} (")


def test_it_says_which_backend_really_serves(command: Callable[..., Any]) -> None:
    with use_backend("reference"):
        found = json.loads(command("info", "--json").out)
    assert set(found["active"]["cpu"].values()) == {"reference"}


def test_the_text_says_the_same(command: Callable[..., Any]) -> None:
    done = command("info")
    assert done.code == 0
    assert done.err == ""
    assert torch.__version__ in done.out
    assert str(Path(batchnorm.__file__).parent) in done.out
