"""Modules that stand beside a task file, which imports them as a script would."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

__all__ = ["neighbourhood", "neighbours"]

_folders: set[str] = set()  # of the task files that were read


@contextmanager
def neighbourhood(folder: str) -> Iterator[None]:
    """Inside, what stands in ``folder`` is imported before all else; after a good end, after all else but for good.

    Of several such folders the last one comes first. A module that was imported from another one is forgotten where
    this one has something of the same name, so that each task file gets its own; what was made of it lives on.

    Args:
        folder: the absolute path, links resolved.
    """
    _forget_namesakes(folder)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    place = len(sys.path)
    while place and sys.path[place - 1] in _folders:
        place -= 1
    sys.path.insert(place, folder)
    sys.path[:] = dict.fromkeys(sys.path)
    _folders.add(folder)


def neighbours() -> dict[str, ModuleType]:
    """By name, the modules that were imported from beside a task file so far, those inside packages included."""
    modules = {name: module for name, module in list(sys.modules.items()) if isinstance(module, ModuleType)}
    top = {
        name for name, module in modules.items() if "." not in name and name != "__main__" and _home(module) in _folders
    }
    return {name: module for name, module in modules.items() if name.partition(".")[0] in top}


def _forget_namesakes(folder: str) -> None:
    known = neighbours()
    for name in known:
        top = name.partition(".")[0]
        here = Path(folder, top)
        if _home(known[top]) != folder and (here.is_dir() or Path(folder, f"{top}.py").is_file()):
            del sys.modules[name]


def _home(module: ModuleType) -> str:
    """The folder that a module or package outside any other package stands in."""
    places = [*(module.__dict__.get("__path__") or ()), module.__dict__.get("__file__") or ""]
    return str(Path(places[0]).parent)
