"""Pages of the manual written from templates: a number that a template asks for and nobody gives is an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

__all__ = ["render"]


def render(template: Path, facts: Mapping[str, Any]) -> str:
    """Return the text that a template makes of facts."""
    sheets = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return sheets.get_template(template.name).render(facts)
