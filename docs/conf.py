from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from batchnorm import __version__
from batchnorm.checks import RULES
from batchnorm.checks.rule import Rule
from batchnorm.diagnosis.causes import CAUSES
from batchnorm.diagnosis.causes.cause import Cause
from batchnorm.kernels import ACCURACY

project = "batchnorm"
author = "the batchnorm authors"
copyright = "2026, the batchnorm authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"batchnorm {version}"
exclude_patterns = ["_build"]
suppress_warnings = ["misc.highlighting_failure"]


class RulePages(SphinxDirective):
    """Every rule under its code and name: the sections of its docstring."""

    def run(self) -> list[nodes.Node]:
        lines = []
        for rule in RULES:
            lines += [f".. _{rule.code}:", "", *_page(f"{rule.code}: {rule.name}", rule)]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


class CausePages(SphinxDirective):
    """Every cause that ``diagnose`` knows under its key, in the order in which they are looked for."""

    def run(self) -> list[nodes.Node]:
        lines = [line for cause in CAUSES for line in _page(cause.key, cause)]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def _page(title: str, documented: type[Rule] | type[Cause]) -> list[str]:
    lines = [title, "-" * len(title), "", documented.page().splitlines()[0], ""]
    for heading, text in documented.sections().items():
        lines += [f".. rubric:: {heading}", "", text, ""]
    return lines


class AccuracyTable(SphinxDirective):
    """The table of largest errors that the tests of every backend read."""

    def run(self) -> list[nodes.Node]:
        head = "data; computed in; storage; moments; normalize; activation; backward; recovered"
        lines = [".. csv-table::", "   :delim: ;", f"   :header: {head}", ""]
        for a in ACCURACY.values():
            names = [str(dtype).removeprefix("torch.") for dtype in (a.dtype, a.working)]
            units = (a.storage, a.moments, a.normalize, a.activation, a.backward, a.recovered)
            lines.append("   " + "; ".join([*names, *(f"{unit:g}" for unit in units)]))
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> None:
    app.add_directive("accuracy-table", AccuracyTable)
    app.add_directive("cause-pages", CausePages)
    app.add_directive("rule-pages", RulePages)
