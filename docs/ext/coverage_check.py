"""Sphinx extension: the build fails when a public name is undocumented.

Every name in the ``__all__`` of a public module of the packages in ``public_names.PACKAGES`` needs a docstring and a
place in the built pages. What lacks one is a warning, and warnings end the build.
"""

from collections.abc import Collection
from typing import Any

from public_names import PACKAGES, Export, described, exports, public_modules
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

__all__ = ["complaints", "public_exports", "setup"]

_logger = logging.getLogger(__name__)


def public_exports() -> tuple[Export, ...]:
    """Every public name of every package with a page."""
    return tuple(export for package in PACKAGES for module in public_modules(package) for export in exports(module))


def complaints(found: Collection[Export], documented: Collection[str]) -> list[str]:
    """One sentence for every name without a docstring or without a place among the ``documented`` full names."""
    undescribed = [
        f"{export.module}.{export.name} is public and has no docstring."
        for export in found
        if export.home == export.module and not described(export)
    ]
    missing = [
        f"{export.module}.{export.name} is public and stands on no page as {export.target}."
        for export in found
        if export.target not in documented
    ]
    return [*undescribed, *missing]


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    for sentence in complaints(public_exports(), env.domains.python_domain.objects):
        _logger.warning(sentence, type="coverage")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("env-check-consistency", _check)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
