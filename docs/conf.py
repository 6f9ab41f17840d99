from __future__ import annotations

import inspect
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any, cast

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import batchnorm
from batchnorm import __version__
from batchnorm.checks import RULES
from batchnorm.checks.rule import Rule
from batchnorm.diagnosis.causes import CAUSES
from batchnorm.diagnosis.causes.cause import Cause
from batchnorm.kernels import ACCURACY

# The callback is described where Lightning is not installed too; what it inherits is not part of the description.
sys.modules["lightning.pytorch"] = cast("Any", SimpleNamespace(Callback=object))

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


class PublicNames(SphinxDirective):
    """Every public name of a module, with a link to where it is described and the first sentence of that.

    A name that no page describes is a warning, and so an error.
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module = import_module(self.arguments[0])
        items = [self._item(module.__name__, name, getattr(module, name)) for name in sorted(module.__all__)]
        return [nodes.definition_list("", *(item for item in items if item is not None))]

    def _item(self, home: str, name: str, value: Any) -> nodes.Node | None:
        # a function that two modules offer is described, and listed, in one
        other = batchnorm.functional if home == "batchnorm" else batchnorm
        if inspect.ismodule(value) or (home != "batchnorm.functional" and name in other.__all__):
            return None
        target = f"{value.__module__}.{value.__qualname__}" if inspect.isclass(value) else f"{home}.{name}"
        link = addnodes.pending_xref(
            "", refdomain="py", reftype="obj", reftarget=target, refexplicit=True, refwarn=True, refdoc=self.env.docname
        )
        link += nodes.literal("", name)
        first = (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ")
        text, _ = self.state.inline_text(first, self.lineno)
        return nodes.definition_list_item(
            "", nodes.term("", "", link), nodes.definition("", nodes.paragraph("", "", *text))
        )


def setup(app: Sphinx) -> None:
    app.add_directive("accuracy-table", AccuracyTable)
    app.add_directive("cause-pages", CausePages)
    app.add_directive("public-names", PublicNames)
    app.add_directive("rule-pages", RulePages)
