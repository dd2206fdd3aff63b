"""Settings of Sphinx: ``sphinx-build --quiet --fail-on-warning docs docs/_build/html``."""

import sys
from pathlib import Path

import netwright

sys.path.insert(0, str(Path(__file__).resolve().parent / "ext"))

project = "Netwright"
author = "The Netwright authors"
project_copyright = author
version = release = netwright.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "api_pages",
    "coverage_check",
    "gallery",
    "offline_math",
    "results_page",
]
exclude_patterns = ["_build"]
suppress_warnings = ["config.cache"]
smartquotes_action = "qe"  # not dashes: headings hold commands

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"Netwright {release}"
html_math_renderer = "offline"
html_copy_source = False
