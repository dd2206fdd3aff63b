"""Python's own standard library, character by character, and a small causal transformer.

Every machine that runs Netwright has this text. It differs a little between versions of Python, and so do the figures.
"""

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.core.builtin.networks import CharTransformer
from netwright.core.data import Data
from netwright.core.errors import MissingDataError
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy
from netwright.core.task import Task

__all__ = ["CONTEXT", "VOCABULARY", "data", "decode", "encode", "model", "task"]

CONTEXT = 128
"""Characters that the model sees."""

_ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(_ALPHABET) + 1
"""Symbols: newline, printable ASCII, and one for everything else."""

_WINDOWS = {"train": 4096, "val": 256, "test": 512}
_OMITTED = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3"}
_CODES = torch.full((128,), VOCABULARY - 1, dtype=torch.long)
_CODES[[ord(character) for character in _ALPHABET]] = torch.arange(len(_ALPHABET))


def task() -> Task:
    """The task ``python-source``: predict the next character; the score is the share predicted right.

    4096 windows of 128 characters to train on, 256 to choose on and 512 to report on, of different files.

    Raises:
        MissingDataError: a Python whose standard library is not there as source files.

    Example:
        >>> inputs, targets = task().data.val[0]
        >>> tuple(inputs.shape), bool((inputs[1:] == targets[:-1]).all())
        ((128,), True)
    """
    return Task(
        name="python-source",
        model=model,
        data=data(),
        loss=_loss,
        score=accuracy,
        recipe=Recipe(
            epochs=3,
            batch_size=16,
            optimizer_settings={"lr": 2e-3, "fused": True, "weight_decay": 0.01},
            schedule_settings={"max_lr": 2e-3},
            clip_norm=1.0,
        ),
        description="The next character of Python source code; the score is the share predicted right.",
    )


def model() -> CharTransformer:
    """The untrained baseline: 4 layers of width 128, 0.8M parameters."""
    return CharTransformer(VOCABULARY, context=CONTEXT, dim=128, layers=4, heads=4)


def data(folder: Path | None = None) -> Data:
    """The three splits; inputs are ``(128,)`` characters, targets the same text one character further.

    Which split a file belongs to is decided by a hash of its path, as is the order in which files are read until
    there are enough windows.

    Args:
        folder: where the source files are; None is this Python's standard library.

    Raises:
        MissingDataError: not enough source text.
    """
    place = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    files = _files(place)
    shares = {"test": range(2), "val": range(2, 3), "train": range(3, 20)}
    found = {
        split: _windows((path for digest, path in files if digest % 20 in share), _WINDOWS[split])
        for split, share in shares.items()
    }
    short = [split for split, windows in found.items() if len(windows) < _WINDOWS[split]]
    if short:
        raise MissingDataError(
            f"{place} holds too little Python source for the task python-source. Use a Python whose standard library "
            "is installed as .py files."
        )
    return Data(*(TensorDataset(found[split][:, :-1], found[split][:, 1:]) for split in ("train", "val", "test")))


def encode(text: str) -> Tensor:
    r"""Symbols of a text, ``(characters,)``; a tab counts as four spaces.

    Example:
        >>> decode(encode("x = 1\n"))
        'x = 1\n'
    """
    points = torch.tensor([min(ord(character), 127) for character in text.expandtabs(4)], dtype=torch.long)
    return _CODES[points]


def decode(symbols: Tensor) -> str:
    """The text of some symbols; the replacement character stands for what is outside the alphabet."""
    return "".join((_ALPHABET + "\N{REPLACEMENT CHARACTER}")[symbol] for symbol in symbols.tolist())


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), target.flatten())


def _files(folder: Path) -> list[tuple[int, Path]]:
    paths = [path for path in folder.rglob("*.py") if not _OMITTED & set(path.relative_to(folder).parts)]
    return sorted((_digest(path.relative_to(folder)), path) for path in paths)


def _digest(path: Path) -> int:
    return int.from_bytes(hashlib.sha256(path.as_posix().encode()).digest()[:8], "big")


def _windows(paths: Iterable[Path], count: int) -> Tensor:
    """``(count, CONTEXT + 1)`` pieces that do not overlap, or fewer where the text ends."""
    length, parts, have = CONTEXT + 1, [torch.empty(0, dtype=torch.long)], 0
    for path in paths:
        if have >= count * length:
            break
        part = encode(path.read_text(encoding="utf-8", errors="replace"))
        parts.append(part)
        have += len(part)
    symbols = torch.cat(parts)[: count * length]
    return symbols[: len(symbols) // length * length].reshape(-1, length)
