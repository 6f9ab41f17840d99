"""``memory=`` bounds by how much the process grows, measured from outside of what the library counts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from batchnorm.statistics.sequential.resident import Resident, _trim, resident

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")

MB = 10**6
SCRIPT = """
import ctypes, json, sys, torch
from torch import nn
import batchnorm

torch.set_num_threads(1)
limit, kind = int(sys.argv[1]), sys.argv[2]

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

def begin():
    open("/proc/self/clear_refs", "w").write("5")
    return status("VmRSS:")

def batch(i):
    return torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(i))

class Loader:
    def __iter__(self):
        return map(batch, range(60))

def endless():
    one = batch(0)
    while True:
        yield one

def layer(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())

model = nn.Sequential(layer(3, 12), layer(12, 12), layer(12, 12))
batchnorm.recalibrate(model, [batch(0), batch(1)], progress=False)  # what is imported on the way
stream = {"list": list(map(batch, range(60))), "loader": Loader(), "endless": endless()}[kind]
base = begin()
with torch.no_grad():
    model.eval()(batch(0))
forward = status("VmHWM:") - base
base = begin()
try:
    batchnorm.recalibrate(model, stream, memory=limit, progress=False)
    said = ""
except batchnorm.errors.StateError as error:
    said = str(error)
print(json.dumps({"peak": status("VmHWM:") - base, "forward": forward, "said": said}))
"""


@linux
@pytest.mark.parametrize(
    "kind", ["list", *(pytest.param(kind, marks=pytest.mark.sweep) for kind in ("loader", "endless"))]
)
def test_the_process_grows_by_no_more_than_the_limit(kind: str) -> None:
    limit = 100 * MB  # unbounded, 60 batches with 3.1 MB a layer would take 190 MB, and as much once more in holes
    script = [sys.executable, "-c", SCRIPT, str(limit), kind]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] - found["forward"] <= 1.1 * limit + 16 * MB, found
    assert ("islice" in found["said"]) == (kind == "endless")


@linux
def test_empty_pages_are_given_back() -> None:
    assert resident() is not None
    trim = _trim()
    if trim is not None:
        trim(0)  # what earlier tests left would be given back in the middle of this one
    watch = Resident()
    assert watch.within(0)  # 16 MiB are nothing
    kept = torch.ones(40 * MB, dtype=torch.uint8)
    assert not watch.within(20 * MB)
    assert watch.within(100 * MB)
    del kept
    assert watch.within(20 * MB)
