"""The kernels' own test program: built and run where BATCHNORM_NATIVE_TESTS is set, for it compiles some minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _refusal() -> str | None:
    if not os.environ.get("BATCHNORM_NATIVE_TESTS"):
        return "BATCHNORM_NATIVE_TESTS is not set; `make native-test` runs this by itself"
    if shutil.which("cmake") is None:
        return "no cmake; `make native-test` needs it"
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    if not any(shutil.which(name) for name in compilers if name):
        return "no C++ compiler; `make native-test` needs g++ or clang++"
    return None


@pytest.mark.timeout(1800)
@pytest.mark.skipif(_refusal() is not None, reason=_refusal() or "")
def test_kernels_agree_with_plain_loops() -> None:
    build = ROOT / "build" / "native-test"  # that of `make native-test`, so that the second time nothing is compiled
    options = ["-DBATCHNORM_PYTHON=OFF", "-DBATCHNORM_SELF_TEST=ON"]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(build), *options],
        ["cmake", "--build", str(build), "--parallel", os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "1")],
        [str(build / "test_kernels")],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout[-2000:])
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}"
    assert "all passed" in done.stdout
