"""Sphinx extension: one page for each package, with every public name, generated from the docstrings.

The pages are written to ``api/generated`` before the sources are read. A name is described once, on the page of the
module where it is at home; modules that merely pass it on link there.
"""

import importlib
from pathlib import Path
from typing import Any

from public_names import PACKAGES, Export, exports, public_modules
from sphinx.application import Sphinx

__all__ = ["page", "setup", "write_pages"]


def page(package: str, summary: str) -> str:
    """The Markdown source of the page of ``package``."""
    parts = [f"# {package}\n\n{summary}\n"]
    parts += [_section(module) for module in public_modules(package)]
    return "\n".join(parts)


def write_pages(folder: Path) -> None:
    """Write the page of every package; pages that did not change keep their time, those of no package go."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {f"{package}.md": page(package, summary) for package, summary in PACKAGES.items()}
    for stale in folder.glob("*.md"):
        if stale.name not in wanted:
            stale.unlink()
    for name, text in wanted.items():
        place = folder / name
        if not place.exists() or place.read_text(encoding="utf-8") != text:
            place.write_text(text, encoding="utf-8")


def _section(module: str) -> str:
    found = exports(module)
    here = [export for export in found if export.home == module]
    elsewhere = [export for export in found if export.home != module]
    lines = [f"## `{module}`", "", "```{eval-rst}", f".. automodule:: {module}"]
    if here:
        lines += [f"   :members: {', '.join(export.name for export in here)}"]
    lines += ["", *(_link(export) for export in sorted(elsewhere, key=lambda export: export.name)), "```", ""]
    return "\n".join(lines)


def _link(export: Export) -> str:
    value = getattr(importlib.import_module(export.module), export.name)
    kind = "class" if isinstance(value, type) else "func" if callable(value) else "obj"
    return f"* :py:{kind}:`{export.name} <{export.target}>` from :py:mod:`{export.home}`"


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / "api" / "generated"))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
