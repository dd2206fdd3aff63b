"""Sphinx extension: equations as MathML, which browsers draw by themselves, so that no page loads a script.

The conversion is the one that docutils ships. Sizes of delimiters are left to the browser.
"""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

__all__ = ["mathml", "setup"]

_logger = logging.getLogger(__name__)
_DELIMITER_SIZE = re.compile(r"\\[bB]igg?[lmr]?(?![A-Za-z])")


def mathml(text: str, *, block: bool, where: Any = None) -> str:
    """MathML of a formula in LaTeX; one that cannot be converted is a warning and stays as it is."""
    known = _DELIMITER_SIZE.sub("", text.strip()).replace(r"\dots", r"\ldots")
    try:
        return str(tex2mathml(known, as_block=block))
    except MathError as error:
        _logger.warning("Formula %r cannot be shown: %s.", text, error, location=where)
        return text


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext(), block=False, where=node))
    raise nodes.SkipNode


def _block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{mathml(node.astext(), block=True, where=node)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_html_math_renderer("offline", inline_renderers=(_inline, None), block_renderers=(_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
