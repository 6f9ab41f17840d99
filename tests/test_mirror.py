"""Tests mirror sources, path by path; and what several of them use stands in no test file."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
SOURCES = ROOT / "src" / "batchnorm"

DECLARATIONS = {"cli/options.py", "demo/stations.py", "report/document.py"}
"""Data and declarations, which decide nothing that a test could find wrong."""

OF_THE_WHOLE = {"test_mirror.py", "test_public_api.py", "test_readme.py", "native/test_self_test.py"}
"""Tests of the repository, and of the kernels, as a whole."""

# These two lists only shrink: what is on them is still to be mended, and nothing is added.
WITHOUT_TESTS = set(
    """
    folding/fold_model.py
    folding/planning/absorbing_layer.py
    folding/planning/merged_parameters.py
    folding/planning/multiply_add.py
    folding/planning/removable_norm.py
    folding/planning/replacement.py
    folding/planning/shared_memory.py
    folding/program/constants.py
    folding/program/layers.py
    folding/program/open.py
    folding/program/state.py
    folding/program/write_back.py
    folding/proving/proved_plan.py
    folding/report/sections.py
    folding/writing/record.py
    folding/writing/rewrite.py
    """.split()  # noqa: SIM905
)
WITHOUT_SOURCES = set(
    """
    dataflow/test_verbs_at_other_sizes.py
    nn/test_blocks_in_a_forward.py
    nn/test_layouts.py
    """.split()  # noqa: SIM905
)


def files(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern)}


def modules() -> set[str]:
    """Return the modules of the package; an ``__init__`` only gathers what the files beside it define."""
    return {path for path in files(SOURCES, "*.py") if not path.endswith("__init__.py")}


def path_of_its_test(source: str) -> Path:
    path = TESTS / source
    return path.with_name(f"test_{path.stem.strip('_')}.py")


def names_in(folder: Path) -> set[str]:
    """Return the names of the modules and packages that the tests in a folder may be of."""
    place = ROOT / folder if folder.parts[:1] == ("benchmarks",) else SOURCES / folder
    return {path.stem.strip("_") for path in place.iterdir() if path.suffix == ".py" or path.is_dir()}


def test_every_module_has_a_test_of_its_name() -> None:
    lacking = {source for source in modules() - DECLARATIONS if not path_of_its_test(source).exists()}
    assert sorted(lacking - WITHOUT_TESTS) == [], "write tests/<room>/test_<module>.py"
    assert sorted(WITHOUT_TESTS - lacking) == [], "take off the list what has a test now, or is gone"
    assert modules() >= DECLARATIONS


def test_every_test_file_is_named_for_a_source() -> None:
    """``test_<source>.py``, or ``test_<source>_<topic>.py`` for another topic of the same source."""
    strange = set()
    for path in files(TESTS, "test_*.py") - OF_THE_WHOLE:
        name = Path(path).stem.removeprefix("test_")
        sources = names_in(Path(path).parent)
        if not any(name == source or name.startswith(f"{source}_") for source in sources):
            strange.add(path)
    assert sorted(strange) == sorted(WITHOUT_SOURCES)


IMPORT = re.compile(
    r"^ *(?:from +(?P<module>tests[\w.]*) +import +(?P<names>\([^)]*\)|.*)|import +(?P<whole>tests.*))", re.MULTILINE
)


def imported_by(path: Path) -> set[str]:
    """Return what a file imports of the tests, as modules with their dots; names of functions may be among them."""
    found: set[str] = set()
    for line in IMPORT.finditer(path.read_text()):
        if line["whole"]:
            found |= set(re.findall(r"tests[\w.]*", line["whole"]))
        else:
            found |= {line["module"], *(f"{line['module']}.{name}" for name in re.findall(r"\w+", line["names"]))}
    return found


def test_no_test_imports_from_a_test_file() -> None:
    test_files = {"tests." + path[: -len(".py")].replace("/", ".") for path in files(TESTS, "test_*.py")}
    imported = set().union(*(imported_by(TESTS / path) for path in files(TESTS, "*.py"))) & test_files
    assert sorted(imported) == [], "what several tests use stands in a helper beside them"
