"""What every page is made of: templates, the plotting library, data inside a script element."""

import json
from functools import cache

from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["embedded", "environment", "library"]


def embedded(content: object) -> Markup:
    """JSON that is safe inside a script element: no ``<`` survives, so no text of a run can end the element."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@cache
def library() -> Markup:
    """The plotting library's core as script elements; its widgets, tables and other parts are left out."""
    return Markup(Resources(mode="inline", components=["bokeh"], log_level="fatal").render_js())


@cache
def environment() -> Environment:
    """Templates of this package; what is put into them is escaped, and a name that is missing is an error."""
    return Environment(
        loader=PackageLoader("netwright.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
