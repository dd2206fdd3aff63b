"""Objects as bytes that another process of the same run can read."""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, TypeAlias

import cloudpickle

from netwright.core.errors import NetwrightError
from netwright.core.neighbours import neighbours
from netwright.core.task import FILE_MODULE

__all__ = ["packed", "unpacked"]

_Texts: TypeAlias = dict[str, tuple[str, str]]
"""File and source text of modules, by their names."""


def packed(value: object, what: str) -> bytes:
    """The import path and a value as bytes; a user's own task file and the modules beside it travel along.

    What the file itself defines travels by value, the modules beside it as text, to be imported anew: also on a machine
    that has no such folder. The bytes go from one process of a run to another and never into a file.

    Args:
        value: what is to be handed over.
        what: how it is called in the message.

    Raises:
        NetwrightError: a value that cannot be handed to another process.

    Example:
        >>> path, inner = unpacked(packed({"width": 8}, "A setting"))
        >>> cloudpickle.loads(inner)
        {'width': 8}
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(FILE_MODULE):
            cloudpickle.register_pickle_by_value(module)
    try:
        payload: bytes = cloudpickle.dumps((list(sys.path), _texts(), cloudpickle.dumps(value)))
    except Exception as error:  # pickling runs code of the user's own objects: whatever it raises is theirs to know
        raise NetwrightError(
            f"{what} cannot be handed to a worker process: {type(error).__name__}: {error}. "
            "Give the dataset and the model as plain objects without open files, locks or connections."
        ) from error
    return payload


def unpacked(payload: bytes) -> tuple[list[str], bytes]:
    """The import path, and the value as bytes that cloudpickle reads once that path is in use.

    From now on this process imports the modules that stood beside the task file as they were when it was packed.

    Args:
        payload: of :func:`packed`, straight from the process that packed it.
    """
    found: Any = cloudpickle.loads(payload)  # bytes of the process that started this one, never of a file
    path, texts, inner = found
    _travelled.take(texts)
    return list(path), bytes(inner)


def _texts() -> _Texts:
    """The modules beside task files that are Python text; a package without ``__init__.py`` has an empty one."""
    texts: _Texts = {}
    for name, module in neighbours().items():
        loader = None if module.__spec__ is None else module.__spec__.loader
        if isinstance(loader, importlib.abc.InspectLoader) and not name.startswith(FILE_MODULE):
            text = loader.get_source(name)
            if text is not None:
                texts[name] = (module.__file__ or str(Path(module.__path__[0], "__init__.py")), text)
    return texts


class _Travelled(importlib.abc.MetaPathFinder, importlib.abc.ExecutionLoader):
    """Imports modules from text that came from another process, before any that lie on this machine's path."""

    def __init__(self) -> None:
        self._texts: _Texts = {}

    def take(self, texts: _Texts) -> None:
        """Serve these from now on, and forget modules that were imported from others."""
        for name, text in self._texts.items():
            if texts.get(name) != text:
                sys.modules.pop(name, None)
        self._texts = texts
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in self._texts else None

    def get_filename(self, fullname: str) -> str:
        return self._texts[fullname][0]

    def get_source(self, fullname: str) -> str:
        return self._texts[fullname][1]

    def is_package(self, fullname: str) -> bool:
        return Path(self.get_filename(fullname)).name == "__init__.py"


_travelled = _Travelled()
