"""The package in use gives the base class; without one the import says what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

SKIP = "Lightning is not installed (pip install lightning)"


PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""


@pytest.mark.sweep
def test_without_lightning_the_import_says_what_is_missing() -> None:
    code = HIDE.format(hidden={"lightning", "pytorch_lightning"}) + (
        "try: import batchnorm.integrations.lightning\nexcept ImportError as error: print(error)"
    )
    assert run(code) == (
        "batchnorm.integrations.lightning needs Lightning, which is not installed: pip install lightning (or "
        "pytorch-lightning)."
    )


@pytest.mark.sweep
def test_the_library_itself_does_not_import_it() -> None:
    assert run("import sys, batchnorm.statistics; print([n for n in sys.modules if 'lightning' in n])") == "[]"


@pytest.mark.every(4)
@pytest.mark.parametrize(
    ("first", "hidden", "base"),
    [
        ("", set(), "lightning.pytorch"),
        ("import pytorch_lightning", set(), "pytorch_lightning"),
        ("", {"lightning"}, "pytorch_lightning"),
        ("", {"pytorch_lightning"}, "lightning.pytorch"),
    ],
)
def test_the_base_class_is_of_the_package_in_use(first: str, hidden: set[str], base: str) -> None:
    for package in PACKAGES:
        pytest.importorskip(package, reason=SKIP)
    code = HIDE.format(hidden=hidden) + (
        f"{first}\nfrom batchnorm.integrations.lightning import RecalibrateCallback\n"
        "print(RecalibrateCallback.__mro__[1].__module__)"
    )
    assert run(code).startswith(base)
