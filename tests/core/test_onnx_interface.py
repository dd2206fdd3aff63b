"""What an exported model takes and returns: names as the caller writes them, and None beside tensors."""

from typing import Any

import onnx
import pytest
import torch
from google.protobuf.message import EncodeError
from torch import Tensor, nn

from netwright.core import onnx_export, onnx_quantized
from netwright.core.artifact import OnnxModule, export_onnx
from netwright.core.cost import measure
from netwright.core.errors import ArtifactError


class Returns(nn.Module):
    """What ``make`` makes of ``(x, 2x)``."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x + 1, 2 * x)


def forwarding(arguments: str, result: str) -> nn.Module:
    """A model that takes these arguments, a layer, and a buffer that is called like an input in lower case."""
    found: dict[str, Any] = {}
    exec(f"def forward(self, {arguments}): return {result}", found)
    model: nn.Module = type("Upper", (nn.Module,), {"forward": found["forward"]})()
    model.layer = nn.Linear(3, 3)
    model.register_buffer("x", torch.full((3,), 5.0), persistent=False)
    return model


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda a, b: (a, None), ["output_0"]),
        (lambda a, b: (None, a, None, b, None), ["output_1", "output_3"]),
        (lambda a, b: {"logits": a, "loss": None}, ["logits"]),
        (lambda a, b: {"loss": None, "b": b, "hidden": None, "x": a}, ["b", "x_out"]),
        (lambda a, b: (a, b), ["output_0", "output_1"]),
        (lambda a, b: (b,), ["output_0"]),
        (lambda a, b: {"b": b, "a": a}, ["b", "a"]),
        (lambda a, b: a, ["output"]),
    ],
)
def test_none_comes_back_in_its_place(tmp_path: Any, make: Any, names: list[str]) -> None:
    model, path = Returns(make), tmp_path / "model.onnx"
    export_onnx(model, torch.zeros(2, 3), path)
    assert [value.name for value in onnx.load(path).graph.output] == names
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    expected, found = model(x), OnnxModule(path)(x)
    torch.testing.assert_close(found, expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)


@pytest.mark.parametrize(
    ("form", "expected"),
    [(None, "tensor"), ("tuple", "tuple"), ('["logits"]', "dict")],
)
def test_files_of_earlier_versions(tmp_path: Any, form: str | None, expected: str) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(nn.Identity(), torch.zeros(2, 3), path)
    proto = onnx.load(path)
    assert not proto.metadata_props
    if form is not None:
        onnx.helper.set_model_props(proto, {"outputs": form})
        onnx.save(proto, path)
    x = torch.ones(2, 3)
    found = OnnxModule(path)(x)
    torch.testing.assert_close(found, {"tensor": x, "tuple": (x,), "dict": {"logits": x}}[expected])


def test_only_none_changes_the_form(tmp_path: Any) -> None:
    path = tmp_path / "model.onnx"
    forms: list[tuple[Any, str]] = [
        (lambda a, b: (a, b), "tuple"),
        (lambda a, b: {"p": a, "q": b}, '["p", "q"]'),
        (lambda a, b: {"p": a, "q": None}, '{"keys": ["p", "q"], "none": [1]}'),
        (lambda a, b: (None, b), '{"keys": null, "none": [0]}'),
    ]
    for make, form in forms:
        export_onnx(Returns(make), torch.zeros(2, 3), path)
        (entry,) = onnx.load(path).metadata_props
        assert (entry.key, entry.value) == ("outputs", form)


def test_other_values_are_refused(tmp_path: Any) -> None:
    for make, said in ((lambda a, b: (a, 3), "returns 3"), (lambda a, b: {"a": a, "kind": "mean"}, "returns 'mean'")):
        with pytest.raises(ArtifactError, match=said + r"\. Only tensors and None can be written"):
            export_onnx(Returns(make), torch.zeros(2, 3), tmp_path / "model.onnx")


def test_names_of_inputs_keep_their_letters(tmp_path: Any) -> None:
    x, mask, other = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0))
    model = forwarding("mask, X, pair, scale=1.0", "scale * (X - mask) + pair['A'] * self.x")
    path = tmp_path / "model.onnx"
    export_onnx(model, {"X": x, "pair": {"A": other}, "scale": 2.0, "mask": mask}, path)
    assert {value.name for value in onnx.load(path).graph.input} == {"X", "mask", "pair_a"}
    found = OnnxModule(path)(mask=mask, pair_a=other, X=x)
    torch.testing.assert_close(found, model(mask, x, {"A": other}, 2.0))


def test_a_model_of_upper_case_inputs_is_measured() -> None:
    inputs = {"X": torch.ones(4, 3), "mask": torch.zeros(4, 3)}
    assert measure(forwarding("mask, X", "self.layer(X) - mask + self.x"), inputs, repeats=3).parameters == 12


class Uncounted:
    """A file whose size protobuf refuses to count, as it does from 2 GiB on."""

    def __init__(self, proto: Any) -> None:
        self.proto = proto

    def __getattr__(self, name: str) -> Any:
        if name == "ByteSize":
            raise EncodeError("Failed to serialize proto")
        return getattr(self.proto, name)


@pytest.mark.parametrize("sizes", [(40,), (25, 25)], ids=["one tensor", "all of them"])
def test_more_weights_than_a_file_holds(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]) -> None:
    convert, model = onnx_export._convert, nn.Sequential(*(nn.Linear(size, size) for size in sizes))
    monkeypatch.setattr(onnx_export, "_convert", lambda program: Uncounted(convert(program)))
    monkeypatch.setattr(onnx_export, "_LIMIT", 4096)
    with pytest.raises(ArtifactError, match="a single file holds less than 2"):
        export_onnx(model, torch.zeros(2, sizes[0]), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_that_nothing_reads_go() -> None:
    names = ["a", "b", "c", "d"]
    node = onnx.helper.make_node("Add", ["b", "d"], ["y"])
    idle = onnx.helper.make_node("Add", ["a", "c"], ["z"])
    weights = [onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [1], [float(ord(name))]) for name in names]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([idle, node], "g", [], [output], weights)
    onnx_quantized.drop_unused(graph)
    assert [item.name for item in graph.initializer] == ["b", "d"]
    assert [item.output[0] for item in graph.node] == ["y"]
