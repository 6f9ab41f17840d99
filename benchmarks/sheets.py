"""Pages of the manual written from templates: a number that a template asks for and nobody gives is an error.

What is published was measured by code that a reader can look up: rows of a tree with changes of its own, or of a
library that is not this checkout's, are refused, and a page names every commit that its rows come from.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2

__all__ = ["ChangedTreeError", "commits", "page_options", "write_page"]


class ChangedTreeError(SystemExit):
    """Rows were measured by code that no commit holds; a report ends with that sentence."""


def page_options(description: str | None) -> argparse.ArgumentParser:
    """Return the options that every report has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--changed", action="store_true", help="take rows of a changed tree too: to look at a page, not to publish it"
    )
    return parser


def commits(rows: Iterable[Mapping[str, Any]], *, changed: bool = False) -> list[str]:
    """Return the commits that rows come from, each once.

    Args:
        rows: each with the column ``commit``, as :func:`benchmarks.train_step.rows.machine` gives it.
        changed: take those of a changed tree too, under the commit's name with that mark.

    Raises:
        ChangedTreeError: there are such rows.
    """
    found = Counter(str(row["commit"]) for row in rows)
    refused = {commit: count for commit, count in found.items() if not re.fullmatch("[0-9a-f]{7,40}", commit)}
    if refused and not changed:
        listed = "; ".join(f"{count} of {commit or 'no commit'}" for commit, count in refused.items())
        raise ChangedTreeError(
            f"{sum(refused.values())} of {found.total()} rows were measured by code that no commit holds ({listed}). "
            "Commit what has changed and measure them again; --changed writes the page all the same."
        )
    return list(found)


def write_page(
    page: Path, template: Path, facts: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], *, changed: bool = False
) -> Path:
    """Write the page that a template makes of facts, and return where it is.

    Args:
        page: where it goes.
        template: may ask for the facts, and for ``commits``, which it has to name.
        facts: made from the rows.
        rows: all that the facts are made from.
        changed: as for :func:`commits`.

    Raises:
        ChangedTreeError: as for :func:`commits`; nothing is written.
        ValueError: the page does not name all commits.
    """
    known = commits(rows, changed=changed)
    sheets = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = sheets.get_template(template.name).render({**facts, "commits": known})
    unnamed = [commit for commit in known if commit not in text]
    if unnamed:
        raise ValueError(f"{template.name} names no {', '.join(unnamed)}: write {{{{ commits }}}} in it.")
    page.write_text(text)
    return page
