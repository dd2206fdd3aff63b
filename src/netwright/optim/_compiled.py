"""The compiled kernels of ``_fused.cpp``: built once by the machine's C++ compiler, kept in the user's cache folder.

Nothing here is needed: where there is no compiler or no safe folder, the reason is logged at level DEBUG, and torch's
own operations do the work.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["cache_folder", "load", "missing"]

_log = logging.getLogger("netwright.optim")

_SOURCE = Path(__file__).with_name("_fused.cpp")
_NATIVE = ["-march=native"]
_FLAGS = [
    "-std=c++11",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-pthread",
]
_SECONDS = 120  # after which a compiler is given up


class UnavailableError(Exception):
    """Why there are no compiled kernels."""


def load() -> ctypes.CDLL | None:
    """The library of kernels, compiled where it is not yet; None where that is not possible."""
    return _attempt()[0]


def missing() -> str:
    """Why :func:`load` gives None; empty where it does not."""
    return _attempt()[1]


@functools.cache
def _attempt() -> tuple[ctypes.CDLL | None, str]:
    try:
        return _load(), ""
    except (UnavailableError, OSError, ValueError, subprocess.SubprocessError) as cause:
        _log.debug("Optimizers go without compiled kernels: %s", cause)
        return None, str(cause)


def _load() -> ctypes.CDLL:
    if sys.platform == "win32":
        raise UnavailableError("they are not built on Windows.")
    compiler = _compiler()
    source = _SOURCE.read_bytes()
    native, target = _target(compiler)
    flags = [*_FLAGS, *native]
    key = hashlib.sha256(b"\0".join([source, " ".join([*compiler, *flags]).encode(), target])).hexdigest()[:32]
    path = cache_folder() / f"fused-{key}.so"
    if path.exists():
        _require_private(path)
        try:
            return _opened(path)
        except (OSError, AttributeError) as cause:  # cut short by a crash or a full disk
            _log.debug("%s cannot be loaded and is built again: %s", path, cause)
    _build([*compiler, *flags], path)
    return _opened(path)


def _opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.netwright_run.restype = ctypes.c_double
    library.netwright_run.argtypes = [
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
    ]
    return library


def cache_folder() -> Path:
    """The folder ``netwright`` in the user's cache folder, made where it is not there.

    Raises:
        UnavailableError: it belongs to somebody else, or others may write into it.
        OSError: it cannot be made.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    usual = os.path.expanduser("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    folder = Path(given if os.path.isabs(given) else usual) / "netwright"
    if not folder.is_absolute():
        raise UnavailableError("this user has no home folder. Set XDG_CACHE_HOME.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    _require_private(folder)
    return folder


def _require_private(path: Path) -> None:
    """Raise unless ``path`` is a real file or folder of this user that nobody else may write."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise UnavailableError(f"{path} is a symbolic link. Remove it.")
    if found.st_uid != os.getuid():
        raise UnavailableError(f"{path} belongs to another user. Set XDG_CACHE_HOME to a folder of your own.")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnavailableError(f"{path} can be written by other users. Run chmod go-w on it.")


def _compiler() -> list[str]:
    """The command of the C++ compiler."""
    commands = [shlex.split(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"]]
    for command in commands:
        if command and shutil.which(command[0]):
            return command
    raise UnavailableError("there is no C++ compiler (tried $CXX, c++, g++, clang++). Install one.")


def _target(compiler: Sequence[str]) -> tuple[list[str], bytes]:
    """The flags that aim at this processor, and a text that names compiler and processor.

    The text is all that the compiler predefines: its version and each instruction set it may use.
    """
    for native in (_NATIVE, []):  # some compilers know no "native"
        done = _call([*compiler, *native, "-dM", "-E", "-x", "c++", os.devnull])
        if done.returncode == 0:
            return native, done.stdout
    raise UnavailableError(f"{shlex.join(compiler)} does not work: {_last_line(done.stderr)}")


def _build(command: Sequence[str], path: Path) -> None:
    """Compile to ``path``, which is whole or not there: processes that build at once replace equal files."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        fresh = Path(folder) / path.name
        done = _call([*command, str(_SOURCE), "-o", str(fresh)])
        if done.returncode != 0:
            raise UnavailableError(f"{shlex.join(command)} failed: {_last_line(done.stderr)}")
        fresh.chmod(0o700)
        with fresh.open("rb") as written:
            os.fsync(written.fileno())
        fresh.replace(path)


def _call(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_SECONDS, check=False)


def _last_line(text: bytes) -> str:
    lines = [line for line in text.decode(errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
