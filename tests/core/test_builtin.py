"""The tasks that come with Netwright."""

import functools
import gzip
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from netwright.core.builtin import fashion_mnist, python_source
from netwright.core.builtin.networks import CharTransformer, ResNet
from netwright.core.errors import DataError, MissingDataError
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.task import Task, load_task


def tensors(task: Task) -> dict[str, tuple[torch.Tensor, ...]]:
    found = {}
    for name, split in task.data.splits().items():
        assert isinstance(split, TensorDataset)
        found[name] = split.tensors
    return found


@pytest.mark.parametrize(
    ("name", "sizes", "shape", "parameters"),
    [
        ("digits", (1100, 300, 397), (1, 8, 8), 1_226_442),
        ("breast-cancer", (341, 114, 114), (30,), 74_242),
        ("python-source", (4096, 256, 512), (128,), 834_657),
    ],
)
def test_sizes_and_repeatability(name: str, sizes: tuple[int, ...], shape: tuple[int, ...], parameters: int) -> None:
    task, again = load_task(name), load_task(name)
    assert tuple(len(split) for split in task.data.splits().values()) == sizes
    assert task.data.train[0][0].shape == shape
    assert sum(p.numel() for p in task.build().parameters()) == parameters
    for split, (inputs, targets) in tensors(task).items():
        assert torch.equal(inputs, tensors(again)[split][0])
        assert torch.equal(targets, tensors(again)[split][1])
    assert task.description
    assert task.recipe is not None


def test_digits_are_scaled_stratified_and_disjoint() -> None:
    splits = tensors(load_task("digits"))
    seen: set[bytes] = set()
    for images, labels in splits.values():
        assert images.min() == 0
        assert images.max() == 1
        shares = torch.bincount(labels, minlength=10) / len(labels)
        assert float((shares - 0.1).abs().max()) < 0.012
        rows = {row.numpy().tobytes() for row in images}
        assert not rows & seen
        seen |= rows


def test_breast_cancer_is_standardized_by_its_training_patients() -> None:
    task = load_task("breast-cancer")
    train, _ = tensors(task)["train"]
    assert torch.allclose(train.mean(0), torch.zeros(30), atol=1e-5)
    assert torch.allclose(train.std(0, correction=0), torch.ones(30), atol=1e-5)
    assert float(tensors(task)["test"][0].mean(0).abs().max()) > 0.01
    assert evaluate(fit(task.build(), task).model, task, "test") > 0.93


def test_python_source_predicts_the_next_character_of_other_files() -> None:
    splits = tensors(load_task("python-source"))
    for inputs, targets in splits.values():
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert int(inputs.max()) < python_source.VOCABULARY
    text = "".join(python_source.decode(row) for row in splits["train"][0][:50])
    assert "import" in text or "def " in text
    lines = {name: set("".join(map(python_source.decode, inputs)).split("\n")) for name, (inputs, _) in splits.items()}
    for other in ("val", "test"):
        rare = [line for line in lines[other] if len(line) > 60]
        assert sum(line in lines["train"] for line in rare) < 0.05 * len(rare)


def test_python_source_symbols() -> None:
    text = "\tdef f(x):\n    return 'é'\r\n"
    assert python_source.decode(python_source.encode(text)) == "    def f(x):\n    return '\ufffd'\ufffd\n"


def test_python_source_without_source(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text("x = 1\n")
    with pytest.raises(MissingDataError, match="too little Python source"):
        python_source.data(tmp_path)


def test_the_transformer_looks_back_only() -> None:
    model = CharTransformer(10, context=8, dim=16, layers=2, heads=2).eval()
    text = torch.randint(10, (1, 8))
    other = text.clone()
    other[0, 5] = (other[0, 5] + 1) % 10
    a, b = model(text), model(other)
    assert torch.allclose(a[0, :5], b[0, :5], atol=1e-6)
    assert not torch.allclose(a[0, 5:], b[0, 5:], atol=1e-4)
    assert model(text[:, :3]).shape == (1, 3, 10)


def test_the_resnet_halves_the_resolution_twice() -> None:
    model = ResNet(3, 8, 4)
    assert model.blocks(torch.zeros(2, 8, 28, 28)).shape == (2, 32, 7, 7)


# Fashion-MNIST, in a miniature of four files with checksums of their own.


@pytest.fixture
def miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "origin"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    checksums = {}
    for name in fashion_mnist.FILES:
        count = 6000 if name.startswith("train") else 40
        shape = (count, 4, 4) if "images" in name else (count,)
        header = bytes([0, 0, 8, len(shape)]) + b"".join(length.to_bytes(4, "big") for length in shape)
        content = header + bytes(torch.randint(10, shape, generator=generator).flatten().tolist())
        (folder / name).write_bytes(gzip.compress(content))
        checksums[name] = fashion_mnist.checksum(content)
    monkeypatch.setattr(fashion_mnist, "FILES", checksums)
    return folder


@pytest.fixture
def server(miniature: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
            pass

    handler = functools.partial(Quiet, directory=str(miniature))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_fashion_mnist_is_split_without_overlap(miniature: Path) -> None:
    data = fashion_mnist.data(miniature)
    sizes = {name: len(split) for name, split in data.splits().items()}
    assert sizes == {"train": 1000, "val": 5000, "test": 40}
    assert isinstance(data.train, TensorDataset)
    images, labels = data.train.tensors
    assert images.shape == (1000, 1, 4, 4)
    assert images.dtype == torch.float32
    assert float(images.max()) == pytest.approx(9 / 255)
    assert labels.dtype == torch.int64
    raw = gzip.decompress((miniature / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
    assert isinstance(data.val, TensorDataset)
    assert sorted(raw) == sorted([*labels.tolist(), *data.val.tensors[1].tolist()])


def test_fashion_mnist_is_downloaded_when_asked(server: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "fashion"
    assert fashion_mnist.download(folder, source=server) == folder
    assert sorted(path.name for path in folder.iterdir()) == sorted(fashion_mnist.FILES)
    assert len(fashion_mnist.data(folder).test) == 40
    fashion_mnist.download(folder, source="http://127.0.0.1:1")  # whole files are kept: nothing is fetched
    damaged = folder / "t10k-labels-idx1-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(DataError, match="is damaged"):
        fashion_mnist.data(folder)
    fashion_mnist.download(folder, source=server)
    assert len(fashion_mnist.data(folder).test) == 40


def test_a_download_that_fails_leaves_nothing(server: str, miniature: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with pytest.raises(MissingDataError, match="cannot be read"):
        fashion_mnist.download(folder, source=f"{server}/nowhere")
    (miniature / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(DataError, match="checksum differs"):
        fashion_mnist.download(folder, source=server)
    assert list(folder.iterdir()) == []


def test_fashion_mnist_is_found_where_the_environment_says(
    miniature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETWRIGHT_DATA", str(miniature))
    assert len(load_task("fashion-mnist").data.test) == 40
    monkeypatch.setenv("NETWRIGHT_DATA", str(tmp_path / "empty"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "PREFIXES", ())
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with pytest.raises(MissingDataError) as caught:
        load_task("fashion-mnist")
    for remedy in ("dataset-fashion-mnist", "NETWRIGHT_DATA", "--download"):
        assert remedy in str(caught.value)
    assert str(tmp_path / "empty" / "fashion-mnist") in str(caught.value)
    places = fashion_mnist.folders({"XDG_CACHE_HOME": "/c"}, "darwin")
    assert places[-1] == tmp_path / "Library" / "Caches" / "netwright" / "fashion-mnist"
    assert fashion_mnist.folders({}, "linux")[-1] == tmp_path / ".cache" / "netwright" / "fashion-mnist"


def test_the_command_that_looks_and_fetches(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "here" / "fashion-mnist"
    monkeypatch.setattr(fashion_mnist, "SOURCE", server)
    monkeypatch.setattr(fashion_mnist, "PREFIXES", ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NETWRIGHT_DATA", str(tmp_path / "here"))
    assert fashion_mnist.main([]) == 2
    assert "--download" in capsys.readouterr().err
    assert fashion_mnist.main(["--download", "--folder", str(folder)]) == 0
    assert fashion_mnist.main([]) == 0


def test_the_real_fashion_mnist_where_it_is_installed() -> None:
    try:
        task = load_task("fashion-mnist")
    except MissingDataError:
        pytest.skip("Fashion-MNIST is not on this machine")
    assert [len(split) for split in task.data.splits().values()] == [55_000, 5_000, 10_000]
    assert sum(p.numel() for p in task.build().parameters()) == 1_226_442
    images, labels = tensors(task)["test"]
    assert images.shape[1:] == (1, 28, 28)
    assert torch.bincount(labels).tolist() == [1000] * 10


def test_nothing_is_fetched_by_importing() -> None:
    code = "import urllib.request, socket; socket.socket.connect = None; import netwright.core.builtin.fashion_mnist"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
