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
from netwright.core.errors import ArtifactError, TraceError
from netwright.core.graph.export import export_model


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


@pytest.mark.parametrize(
    ("arguments", "result", "names"),
    [
        ("output", "self.layer(output)", ["output_out"]),
        ("output_0, output_2", "(output_0, 2 * output_2, 3 * output_0)", ["output_0_out", "output_1", "output_2_out"]),
        ("a, a_out", "{'a': a, 'a_out': 2 * a_out}", ["a_out_out", "a_out_out_out"]),
        ("a, b", "{'a': a, 'a_out': 2 * b}", ["a_out_out", "a_out"]),
        ("a, b", "(a, b)", ["output_0", "output_1"]),
    ],
)
def test_outputs_that_are_called_like_an_input(tmp_path: Any, arguments: str, result: str, names: list[str]) -> None:
    model, path = forwarding(arguments, result), tmp_path / "model.onnx"
    count = len(arguments.split(", "))
    inputs = tuple(torch.randn(count, 4, 3, generator=torch.Generator().manual_seed(0)))
    export_onnx(model, inputs, path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert [value.name for value in onnx.load(path).graph.output] == names
    torch.testing.assert_close(OnnxModule(path)(*inputs), model(*inputs))


def test_positional_inputs_keep_their_letters(tmp_path: Any) -> None:
    model = forwarding("X, pair, inputEmb, *more", "X + 2 * inputEmb + 3 * pair[0] + 5 * more[0] + self.x")
    x, other, embedded, rest = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "model.onnx"
    export_onnx(model, (x, (other,), embedded, rest), path)
    assert [value.name for value in onnx.load(path).graph.input] == ["X", "pair_0", "inputEmb", "more_0"]
    expected = model(x, (other,), embedded, rest)
    torch.testing.assert_close(OnnxModule(path)(x, (other,), embedded, rest), expected)
    torch.testing.assert_close(OnnxModule(path)(X=x, pair_0=other, inputEmb=embedded, more_0=rest), expected)


def test_nested_inputs_by_name_are_measured_and_run(tmp_path: Any) -> None:
    model = forwarding("X, state, scale=1.0", "self.layer(X) + state['A'] * self.x + 2 * state['list'][1] * scale")
    x, a, b, c = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0))
    inputs = {"X": x, "state": {"list": [c, b], "A": a}, "scale": 3.0}
    assert measure(model, inputs, repeats=3, seconds=0.02).parameters == 12
    assert measure(model, inputs, repeats=3, seconds=0.02, runtime="torch").latency.batch == 1
    path = tmp_path / "model.onnx"
    export_onnx(model, inputs, path)
    assert {value.name for value in onnx.load(path).graph.input} == {"X", "state_a", "state_list_0", "state_list_1"}
    expected, again = model(**inputs), OnnxModule(path)
    torch.testing.assert_close(again(**inputs), expected)
    torch.testing.assert_close(again(x, state=inputs["state"]), expected)
    torch.testing.assert_close(again(state_a=a, state_list_1=b, state_list_0=c, X=x), expected)
    with pytest.raises(ArtifactError, match="takes 4 inputs"):
        again(X=x, state={"A": a})


@pytest.mark.parametrize("arguments", ["**batch", "X, **batch", "*, mask, **batch"])
def test_inputs_in_keywords_that_forward_does_not_name(tmp_path: Any, arguments: str) -> None:
    part = {"X": "X", "mask": "mask"}
    x, mask = (part[name] if name in arguments else f"batch['{name}']" for name in part)
    model = forwarding(arguments, f"self.layer({x}) - 2 * {mask} + self.x")
    inputs = dict(zip(part, torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)), strict=True))
    path = tmp_path / "model.onnx"
    export_onnx(model, inputs, path)
    assert "forward" not in vars(model)
    assert {value.name for value in onnx.load(path).graph.input} == {"X", "mask"}
    five = {name: torch.cat([value, value[:1]]) for name, value in inputs.items()}
    torch.testing.assert_close(OnnxModule(path)(**five), model(**five))


def test_a_forward_of_the_instance_is_put_back() -> None:
    model = forwarding("**batch", "1 / 0")
    own = model.forward = lambda **batch: batch["X"].item() and model.layer(batch["X"])
    with pytest.raises(TraceError, match="cannot be traced"):
        export_model(model, {"X": torch.ones(4, 3)})
    assert model.forward is own
    own = model.forward = lambda **batch: model.layer(batch["X"])
    program = export_model(model, {"X": torch.ones(4, 3)})
    assert model.forward is own
    x = torch.rand(7, 3)
    torch.testing.assert_close(program.module()(X=x), model.layer(x))


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
