"""Renders a page: one HTML file that opens anywhere, without a network.

Invariant: whatever a value says stands on the page as text (autoescape), and the page may load
nothing (its Content-Security-Policy), so that opening it sends nothing to anybody.
"""

from pathlib import Path
from typing import Any

import jinja2

_HERE = Path(__file__).parent


def render(template: Path, **values: Any) -> str:
    """Return the page of a template, which extends `base.html.j2` beside this file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)
