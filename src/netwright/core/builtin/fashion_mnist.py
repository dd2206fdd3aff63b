"""Fashion-MNIST: 70,000 images of clothes, 28x28, from files that stand on this machine, and a ResNet.

The data are not part of Netwright. They are looked for in the folder that ``NETWRIGHT_DATA`` names, in the system's
data folders (the Debian package ``dataset-fashion-mnist`` puts them there), and in the user's cache. Nothing is
downloaded unless asked for: ``python -m netwright.core.builtin.fashion_mnist --download``.
"""

import argparse
import gzip
import hashlib
import os
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.core.builtin.networks import ResNet
from netwright.core.data import Data
from netwright.core.errors import DataError, MissingDataError, NetwrightError
from netwright.core.files import atomic_write
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy
from netwright.core.task import Task

__all__ = ["checksum", "data", "download", "folders", "model", "task"]

SOURCE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"

# SHA-256 of the unpacked files: Debian's package and the original site pack the same bytes under different headers.
FILES = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

_COMMAND = "python -m netwright.core.builtin.fashion_mnist --download"

PREFIXES = ("/usr/share", "/usr/local/share", "/opt/homebrew/share", "/home/linuxbrew/.linuxbrew/share")

Opener: TypeAlias = Callable[[str], IO[bytes]]


def task() -> Task:
    """The task ``fashion-mnist``: 55,000 images to train on, 5,000 to choose on, 10,000 to report on.

    Raises:
        MissingDataError: the files are nowhere on this machine; the message names three remedies.
        DataError: files that are damaged.
    """
    return Task(
        name="fashion-mnist",
        model=model,
        data=data(),
        loss=functional.cross_entropy,
        score=accuracy,
        recipe=Recipe(
            epochs=0.6,
            batch_size=64,
            optimizer_settings={"lr": 2e-3, "fused": True},
            schedule_settings={"max_lr": 2e-3},
        ),
        description="Clothes of 28x28 pixels in ten classes; the score is accuracy.",
    )


def model() -> ResNet:
    """The untrained baseline."""
    return ResNet(channels_in=1, width=64, classes=10)


def data(folder: Path | None = None) -> Data:
    """The three splits; images are ``(1, 28, 28)`` in [0, 1], 220 MB in all.

    Args:
        folder: where the four files are; None looks in :func:`folders`.

    Raises:
        MissingDataError: the files are not there.
        DataError: files that are damaged.
    """
    place = _find() if folder is None else folder
    images, labels = _split(place, "train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    val, train = order[:5000].sort().values, order[5000:].sort().values
    return Data(
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[val], labels[val]),
        TensorDataset(*_split(place, "t10k")),
    )


def folders(environment: Mapping[str, str] | None = None, platform: str = sys.platform) -> tuple[Path, ...]:
    """Where the files are looked for, in order; the last is the user's cache, where :func:`download` puts them.

    Args:
        environment: variables to read ``NETWRIGHT_DATA`` and ``XDG_CACHE_HOME`` from; None is the process's own.
        platform: as ``sys.platform``.

    Example:
        >>> [str(path) for path in folders({"NETWRIGHT_DATA": "/data", "XDG_CACHE_HOME": "/cache"}, "linux")][::6]
        ['/data/fashion-mnist', '/cache/netwright/fashion-mnist']
    """
    known = os.environ if environment is None else environment
    named = known.get("NETWRIGHT_DATA")
    own = (Path(named) / "fashion-mnist", Path(named)) if named else ()
    system = (Path(prefix) / "datasets" / "fashion-mnist" for prefix in PREFIXES)
    if platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(known.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (*own, *system, cache / "netwright" / "fashion-mnist")


def download(folder: Path | None = None, *, source: str | None = None, opener: Opener = urllib.request.urlopen) -> Path:
    """Fetch the four files (31 MB) over the network; only ever called when the user asks for it.

    Each file is checked before it takes its name, so that a broken download leaves nothing behind. Files that are
    already there and whole are kept.

    Args:
        folder: where to put them; None is the user's cache.
        source: address of the folder that holds them; None is the data's own site.
        opener: opens an address for reading.

    Returns:
        The folder.

    Raises:
        MissingDataError: an address that cannot be read.
        DataError: a file that is not what it should be.
        RunDirectoryError: a full disk.
    """
    place = folders()[-1] if folder is None else folder
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MissingDataError(f"{place} cannot be made: {error.strerror or error}. Name another folder.") from error
    for name in FILES:
        if (place / name).is_file() and _matches((place / name).read_bytes(), name):
            continue
        address = f"{(source or SOURCE).rstrip('/')}/{name}"
        try:
            with opener(address) as response:
                content = response.read()
        except OSError as error:
            raise MissingDataError(f"{address} cannot be read: {error}. Is there a network?") from error
        if not _matches(content, name):
            raise DataError(f"{address} is not the expected file: its checksum differs. Nothing was kept of it.")
        with atomic_write(place / name) as temporary:
            temporary.write_bytes(content)
    return place


def checksum(content: bytes) -> str:
    """The SHA-256 of an unpacked file, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m netwright.core.builtin.fashion_mnist [--download] [--folder FOLDER]``."""
    parser = argparse.ArgumentParser(description="Find Fashion-MNIST on this machine, or fetch it.")
    parser.add_argument("--download", action="store_true", help="fetch the four files (31 MB) over the network")
    parser.add_argument("--folder", type=Path, help="where to put them (default: the user's cache)")
    chosen = parser.parse_args(arguments)
    console = Console()
    try:
        place = download(chosen.folder) if chosen.download else _find()
    except NetwrightError as error:
        Console(stderr=True).print(str(error), markup=False)
        return 2
    console.print(f"Fashion-MNIST is in {place}", markup=False)
    return 0


def _find() -> Path:
    places = folders()
    for place in places:
        if all((place / name).is_file() for name in FILES):
            return place
    raise MissingDataError(
        "Fashion-MNIST is not on this machine. Either install the Debian package dataset-fashion-mnist; or set "
        "NETWRIGHT_DATA to the folder that holds its four idx-ubyte.gz files; or fetch them (31 MB) with "
        f"{_COMMAND}. Looked in {', '.join(map(str, places))}."
    )


def _split(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    images = _idx(folder / f"{name}-images-idx3-ubyte.gz", 3)
    labels = _idx(folder / f"{name}-labels-idx1-ubyte.gz", 1)
    return torch.from_numpy(images).unsqueeze(1).float().div_(255), torch.from_numpy(labels).long()


def _idx(path: Path, axes: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """The array of an IDX file: two zero bytes, type 8 (bytes), the number of axes, each length, the bytes."""
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise MissingDataError(f"{path} cannot be read: {error.strerror or error}.") from error
    content = _unpack(packed)
    if content is None or checksum(content) != FILES[path.name]:
        raise DataError(f"{path} is damaged: its checksum differs. Fetch it again with {_COMMAND}.")
    shape = np.frombuffer(content, dtype=">u4", count=axes, offset=4).astype(int)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def _matches(packed: bytes, name: str) -> bool:
    content = _unpack(packed)
    return content is not None and checksum(content) == FILES[name]


def _unpack(packed: bytes) -> bytes | None:
    try:
        return gzip.decompress(packed)
    except (OSError, EOFError, ValueError):
        return None


if __name__ == "__main__":
    sys.exit(main())
