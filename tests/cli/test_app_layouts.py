"""Checkpoints whose tensors lie in memory in every way that a tensor can, through the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.layouts import LAYOUTS

VERBS = {
    "diagnose": ("-d", "images.npz", "-b", 30, "--json"),
    "recalibrate": ("-d", "images.npz", "-b", 30, "-o", "out.pt"),
    "fold": ("-i", "4,3,32,32", "-o", "out.pt"),
}


@pytest.mark.every(6)
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_verb_reads_a_checkpoint_by_its_values(
    command: Callable[..., Any], here: Path, weights: Path, verb: str, layout: str
) -> None:
    state = {key: LAYOUTS[layout](value) if value.dim() else value for key, value in torch.load(weights).items()}
    for key, value in state.items():
        if key.endswith("running_var") and bool((value <= 0).any()):
            state[key] = value.abs() + 0.5
    torch.save(state, here / "laid.pt")
    torch.save(
        {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}, here / "plain.pt"
    )
    told = []
    for name in ("laid.pt", "plain.pt"):
        done = command(verb, "-m", "net:build", "-w", name, *VERBS[verb])
        assert done.code in ((0, 1) if verb == "diagnose" else (0,)), done.err
        told.append(done.out if verb == "diagnose" else torch.load(here / "out.pt"))
        (here / "out.pt").unlink(missing_ok=True)
    if verb == "diagnose":
        assert told[0].replace("laid.pt", "plain.pt") == told[1]
        return
    assert told[0].keys() == told[1].keys()
    for key, value in told[1].items():
        assert torch.equal(told[0][key], value), key
