"""The public names of Netwright: what each module exports, and where each name is at home."""

import ast
import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

__all__ = ["PACKAGES", "Export", "described", "exports", "imports", "public_modules", "sources"]

PACKAGES = {
    "netwright": "The library's face.",
    "netwright.core": "The ground floor: task, data, recipe, fit, cost, front, run directory, errors.",
    "netwright.core.graph": "One trace of a model: groups of units, zeroing, shrinking.",
    "netwright.core.graph.rules": "What each family of operations does to the dimensions of its tensors.",
    "netwright.core.builtin": "The tasks that come with Netwright.",
    "netwright.optim": "How parameters move: optimizers, schedules, clipping, averaging.",
    "netwright.param": "Where parameters start and how they are written.",
    "netwright.compress": "Transforms that make a network smaller and faster.",
    "netwright.search": "Spaces, predictors and samplers: search on any evaluation.",
    "netwright.workshop": "The main job: target and task in, front out.",
    "netwright.report": "The HTML report and the terminal's table, from a run directory.",
    "netwright.testing": "Conformance suites for methods of your own.",
}
"""The packages with API pages, in the order of the contents; each page has the modules of one package."""


@dataclass(frozen=True)
class Export:
    """A name in the ``__all__`` of a public module.

    Args:
        module: the module that exports it.
        name: the name.
        home: the public module whose page describes it: where it is defined, or the first that exports it from a
            private module.
    """

    module: str
    name: str
    home: str

    @property
    def target(self) -> str:
        """Its full name in the pages."""
        return f"{self.home}.{self.name}"


def public_modules(package: str) -> tuple[str, ...]:
    """``package`` and the public modules directly in it that state an ``__all__``, in the order of their names."""
    face = importlib.import_module(package)
    inner = [info.name for info in pkgutil.iter_modules(face.__path__) if not info.ispkg]
    names = [package, *(f"{package}.{name}" for name in inner if not name.startswith("_"))]
    return tuple(name for name in names if hasattr(importlib.import_module(name), "__all__"))


def exports(module: str) -> tuple[Export, ...]:
    """Every name in the ``__all__`` of ``module``, without dunder names."""
    names = importlib.import_module(module).__all__
    return tuple(Export(module, name, _home(module, name)) for name in names if not name.startswith("__"))


def described(export: Export) -> bool:
    """Whether the code says what the name is: a docstring, or for data a string after the assignment."""
    value = getattr(importlib.import_module(export.module), export.name)
    if inspect.isclass(value) or inspect.isroutine(value):
        own = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
        return bool(own and own.strip() and not own.startswith(f"{value.__name__}("))
    if isinstance(value, ModuleType):
        return bool(value.__doc__)
    return export.name in _data_docstrings(_tree(_definition(export.home, export.name)))


def sources(module: str) -> dict[str, str]:
    """For every name that ``module`` imports from another module of Netwright: that module."""
    found = imports(_tree(module))
    return {name: source for name, source in found.items() if source.partition(".")[0] == "netwright"}


def imports(tree: ast.Module) -> dict[str, str]:
    """Name to module for every ``from module import name`` at the top of a file, for type checkers alone or not."""
    checked = [
        node.body for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    return {
        alias.asname or alias.name: node.module
        for node in itertools.chain(tree.body, *checked)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def _home(module: str, name: str) -> str:
    source = sources(module).get(name)
    if source is None or any(part.startswith("_") for part in source.split(".")):
        return module
    return _home(source, name) if name in getattr(importlib.import_module(source), "__all__", ()) else module


def _definition(module: str, name: str) -> str:
    source = sources(module).get(name)
    return module if source is None else _definition(source, name)


def _tree(module: str) -> ast.Module:
    path = importlib.import_module(module).__file__
    assert path is not None
    return ast.parse(Path(path).read_text(encoding="utf-8"))


def _data_docstrings(tree: ast.Module) -> Mapping[str, str]:
    return dict(_pairs(tree))


def _pairs(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        if isinstance(text, str):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Name):
                    yield target.id, text
