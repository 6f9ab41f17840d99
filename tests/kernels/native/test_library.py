from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchnorm.errors import UnknownNameError
from batchnorm.kernels.native import calls
from batchnorm.kernels.native.library import (
    INTERFACE,
    _address_of_parallel_for,
    available_isas,
    isa,
    library,
    missing,
    use_isa,
)

native = pytest.mark.skipif(missing is not None, reason=str(missing))

DIGEST = "54081adc081a1105"


def run(code, **environment):
    """Run Python code in a process of its own; return its exit status, output and errors."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    return done.returncode, done.stdout.strip(), done.stderr


WITHOUT = """
import sys
sys.modules["batchnorm._native"] = None
"""


@native
def test_the_best_instruction_set_is_taken_at_first():
    code = "from batchnorm.kernels.native import available_isas, isa; print(available_isas()[-1] == isa())"
    assert run(code, BATCHNORM_ISA="")[:2] == (0, "True")


@native
def test_a_plain_build_is_always_there():
    assert available_isas()[0] == "baseline"
    assert len(set(available_isas())) == len(available_isas())


@native
@pytest.mark.parametrize("name", available_isas())
def test_an_instruction_set_is_used_in_its_context_only(name):
    before = isa()
    with pytest.raises(KeyboardInterrupt), use_isa(name):  # noqa: PT012
        assert isa() == name
        raise KeyboardInterrupt
    assert isa() == before


@native
def test_an_unknown_instruction_set_is_refused_and_changes_nothing():
    before = isa()
    with pytest.raises(UnknownNameError, match=r"'baselin': .*there are baseline.*did you mean 'baseline'"):
        use_isa("baselin")
    assert isa() == before


@pytest.mark.every(2)
@native
@pytest.mark.parametrize("name", available_isas())
def test_the_environment_chooses_the_instruction_set(name):
    assert run("from batchnorm.kernels.native import isa; print(isa())", BATCHNORM_ISA=name)[:2] == (0, name)


@native
def test_an_unknown_one_in_the_environment_is_an_error_that_says_what_there_is():
    status, _, errors = run("import batchnorm.functional", BATCHNORM_ISA="mmx")
    assert status == 1
    assert "BATCHNORM_ISA=mmx: this machine runs baseline" in errors


def test_without_the_extension_everything_runs_on_torch_and_says_why():
    code = f"""{WITHOUT}
import torch
from batchnorm.kernels.native import available_isas, isa, missing
from batchnorm.functional import active_backend, backends, batch_norm
x = torch.randn(64, 16, 100)
y = batch_norm(x, None, None, training=True, activation="relu", residual=x)
expected = torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True) + x)
assert available_isas() == () and isa() is None and "native" not in backends()
assert torch.equal(y, expected) and active_backend(x) == "torch"
print(missing)
"""
    status, output, errors = run(code)
    assert status == 0, errors
    assert output.startswith("the package was installed without native kernels") or "does not load" in output
    assert "pip install" in output or "does not load" in output


STALE = """
import sys, types
{}
sys.modules["batchnorm._native"] = stale
import torch
from batchnorm.kernels.native import available_isas, missing
from batchnorm.functional import active_backend, backends, batch_norm
x = torch.randn(64, 16, 100)
batch_norm(x, None, None, training=True, activation="relu", residual=x)
layer = torch.nn.BatchNorm1d(16)
import batchnorm
batchnorm.convert(torch.nn.Sequential(layer)).model(x).sum().backward()
assert available_isas() == () and "native" not in backends() and active_backend(x) == "torch"
print(missing)
"""


@pytest.mark.every(3)
@pytest.mark.parametrize(("build", "got"), [
    ("stale = types.ModuleType('_native')", "None"),
    ("import batchnorm._native as stale; stale.interface = 0", "0"),
    ("import batchnorm._native as stale; stale.interface = '1'", "1"),
], ids=["of before there were numbers", "another number", "no number"])  # fmt: skip
def test_kernels_of_another_version_are_not_called_and_it_says_why(build, got):
    if "import batchnorm" in build and missing is not None:
        pytest.skip(missing)
    status, output, errors = run(STALE.format(build))
    assert status == 0, errors
    assert f"of another version: expected interface {INTERFACE}; got {got}. Rebuild them: pip install" in output


def test_the_number_is_another_one_where_the_interface_is():
    """Fails where names or arguments in ``native/bindings.cpp`` have changed: count up there and in ``library.py``."""
    text = (Path(__file__).parents[3] / "native" / "bindings.cpp").read_text(encoding="utf-8")
    names = re.findall(r'"\w+"_a|def\(\s*"\w+"|at<\w+>|\bint\w*_t \w+|\b(?:double|int|View|Parameters) \w+', text)
    digest = hashlib.sha256(" ".join(" ".join(name.split()) for name in names).encode()).hexdigest()[:16]
    assert (digest, INTERFACE) == (DIGEST, 1)
    assert f'm.attr("interface") = {INTERFACE};' in text


@native
def test_torchs_threads_run_the_kernels():
    x, threads = torch.randn(64, 16, 100), torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(calls.train_forward(x, None, None, None, 1e-5, None)[0])
        library.set_parallel_for(0)  # none to be had: the calling thread does it all
        results.append(calls.train_forward(x, None, None, None, 1e-5, None)[0])
    finally:
        torch.set_num_threads(threads)
        library.set_parallel_for(_address_of_parallel_for())
    assert _address_of_parallel_for() != 0
    # whole channels are finished by one thread, in the same order whoever it is
    assert all(torch.equal(y, results[0]) for y in results)
