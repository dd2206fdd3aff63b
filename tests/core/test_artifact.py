"""Artifacts: what is written is what the model computes, readable without Netwright, and whole or absent."""

import copy
import pickle
import re
import subprocess
import sys
import zipfile

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from netwright.core import onnx_export
from netwright.core.artifact import OnnxModule, export_onnx, load_weights, save_program, save_weights
from netwright.core.data import call
from netwright.core.errors import ArtifactError, TraceError
from netwright.core.files import atomic_write
from netwright.core.onnx_module import feed


class SmallConv(nn.Module):
    """Convolution, batch norm with statistics of its own, residual, pool, linear."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        x = functional.relu(self.norm(self.first(x)))
        x = functional.relu(self.second(x) + x)
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, left, right):
        return self.left(left), self.right(right)


class Named(nn.Module):
    """Inputs and outputs by name; one output is called like an input."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens, mask):
        hidden = self.table(tokens) * mask[..., None]
        return {"logits": self.head(hidden), "mask": hidden.sum(-1)}


@pytest.fixture
def conv():
    torch.manual_seed(0)
    return SmallConv().eval()


def agree(model, path, inputs):
    with torch.no_grad():
        expected = call(model, inputs)
    found = call(OnnxModule(path), inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_onnx_computes_the_same_at_any_batch(conv, tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(conv, torch.randn(1, 3, 6, 6), path)
    for batch in (1, 3, 7):
        agree(conv, path, torch.randn(batch, 3, 6, 6))


def test_onnx_is_one_small_standard_file(conv, tmp_path, capfd):
    path = tmp_path / "model.onnx"
    conv.train()
    export_onnx(conv, torch.randn(2, 3, 6, 6), path)
    assert conv.training
    assert capfd.readouterr() == ("", "")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain for entry in proto.opset_import} == {""}
    assert not proto.functions
    assert [node.op_type for node in proto.graph.node].count("BatchNormalization") == 0
    assert [value.name for value in proto.graph.input] == ["x"]
    assert [value.name for value in proto.graph.output] == ["output"]
    assert path.stat().st_size < 4 * sum(value.numel() for value in conv.parameters()) + 1500


def test_onnx_several_inputs_by_position_and_by_name(tmp_path):
    model, path = TwoInputs(), tmp_path / "model.onnx"
    export_onnx(model, (torch.zeros(2, 3), torch.zeros(2, 2)), path)
    left, right = torch.randn(4, 3), torch.randn(4, 2)
    agree(model, path, (left, right))
    agree(model, path, {"right": right, "left": left})
    module = OnnxModule(path)
    torch.testing.assert_close(module(left, right=right), module(left, right))


def test_onnx_dict_in_dict_out(tmp_path):
    model, path = Named(), tmp_path / "model.onnx"
    inputs = {"tokens": torch.randint(0, 11, (3, 4)), "mask": torch.rand(3, 4)}
    export_onnx(model, inputs, path)
    agree(model, path, inputs)


def test_onnx_input_returned_and_output_returned_twice(tmp_path):
    class Returns(nn.Module):
        def forward(self, x):
            y = x * 2
            return x, y, y

    export_onnx(Returns(), torch.ones(2, 3), tmp_path / "model.onnx")
    agree(Returns(), tmp_path / "model.onnx", torch.randn(5, 3))


def test_onnx_module_copies_and_pickles(conv, tmp_path):
    path, x = tmp_path / "model.onnx", torch.randn(2, 3, 6, 6)
    export_onnx(conv, x, path)
    module = OnnxModule(path, threads=2).eval()
    assert next(module.parameters()).device == torch.device("cpu"), "code that asks where a model is has an answer"
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.threads == 2
        assert torch.equal(other(x), module(x))


@pytest.mark.parametrize(
    "inputs",
    [torch.zeros(1, 3), (torch.zeros(1, 3),) * 3, {"left": torch.zeros(1, 3), "other": torch.zeros(1, 2)}],
    ids=["too few", "too many", "unknown name"],
)
def test_onnx_module_names_wrong_inputs(tmp_path, inputs):
    export_onnx(TwoInputs(), (torch.zeros(2, 3), torch.zeros(2, 2)), tmp_path / "model.onnx")
    module = OnnxModule(tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match="takes 2 inputs"):
        feed(module.session, inputs)


def test_onnx_module_refuses_missing_and_broken_files(tmp_path):
    with pytest.raises(ArtifactError, match="No ONNX file"):
        OnnxModule(tmp_path / "none.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(ArtifactError, match=r"cannot load .*broken\.onnx"):
        OnnxModule(tmp_path / "broken.onnx")


def test_onnx_errors_leave_nothing(conv, tmp_path, monkeypatch):
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(ArtifactError, match="Cannot write"):
        export_onnx(conv, x, tmp_path / "missing" / "model.onnx")

    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError):
        export_onnx(Branches(), x, tmp_path / "model.onnx")

    class Unknown(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x).real

    with pytest.raises(ArtifactError, match="linalg_eig"):
        export_onnx(Unknown(), x, tmp_path / "model.onnx")
    monkeypatch.setattr(onnx_export, "_LIMIT", 1000)
    with pytest.raises(ArtifactError, match="a single file holds less than 2"):
        export_onnx(conv, x, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_atomic_write_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(place):
        place.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match="No space left on device"), atomic_write(path, ArtifactError) as place:
        fail(place)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_program_runs_in_plain_torch(conv, tmp_path):
    path, x = tmp_path / "model.pt2", torch.randn(5, 3, 6, 6)
    save_program(conv, x[:1], path)
    with torch.no_grad():
        torch.save((x, conv(x)), tmp_path / "expected.pt")
    script = (
        "import sys, torch; from pathlib import Path; place = Path(sys.argv[1]);"
        "x, y = torch.load(place / 'expected.pt', weights_only=True);"
        "torch.testing.assert_close(torch.export.load(place / 'model.pt2').module()(x), y);"
        "assert not any(name.startswith('netwright') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_program_holds_nothing_of_the_data(tmp_path):
    path, generator = tmp_path / "model.pt2", torch.Generator().manual_seed(0)
    mask = torch.rand(3, 4, generator=generator) + 1
    model, inputs = Named(), {"tokens": torch.randint(1, 11, (3, 4), generator=generator), "mask": mask}
    save_program(model, inputs, path)
    content = b"".join(zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist())
    assert model.table.weight.detach().numpy().tobytes() in content
    for row in (*inputs["tokens"], *inputs["mask"]):
        assert row.numpy().tobytes() not in content
    program = torch.export.load(path)
    _, kept = program.example_inputs
    for name, value in inputs.items():
        assert torch.equal(kept[name], torch.zeros_like(value)), "something to call it with"
    for batch in (kept, inputs, {name: value[:1] for name, value in inputs.items()}):
        torch.testing.assert_close(program.module()(**batch), model(**batch))


def test_program_on_a_full_disk(tmp_path):
    script = (
        "import resource, signal, sys, torch; from netwright.core.artifact import save_program;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "save_program(torch.nn.Linear(90, 90), torch.zeros(2, 90), sys.argv[1] + '/model.pt2')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert re.search(r"ArtifactError: Cannot write .*model\.pt2: File too large", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_weights_round_trip_with_ties(tmp_path):
    one, two = Named(), Named()
    save_weights(one, tmp_path / "model.safetensors")
    load_weights(two, tmp_path / "model.safetensors")
    assert torch.equal(one.table.weight, two.table.weight)
    assert two.head.weight is two.table.weight
    assert (tmp_path / "model.safetensors").stat().st_size < 11 * 6 * 4 + 300
    untied = Named()
    untied.head.weight = nn.Parameter(torch.zeros(11, 6))
    load_weights(untied, tmp_path / "model.safetensors")
    assert torch.equal(untied.head.weight, one.table.weight)


@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16]),
)
def test_weights_round_trip_any_shape(tmp_path_factory, shapes, dtype):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    one, two = (nn.Module() for _ in range(2))
    for position, shape in enumerate(shapes):
        one.register_buffer(f"b{position}", torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype))
        two.register_buffer(f"b{position}", torch.zeros(shape, dtype=dtype))
    save_weights(one, path)
    load_weights(two, path)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
        assert two.state_dict()[name].dtype == dtype


def test_weights_of_another_model_are_refused_untouched(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), path)
    other = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3), nn.Linear(3, 1))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ArtifactError, match=r"missing 2\.bias, 2\.weight; of another shape: 1\.weight is \(2, 2\)"):
        load_weights(other, path)
    with pytest.raises(ArtifactError, match=r"unknown 1\.bias, 1\.weight"):
        load_weights(nn.Sequential(nn.Linear(3, 2)), path)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_weights_missing_truncated_corrupt(tmp_path):
    model, path = nn.Linear(30, 20), tmp_path / "model.safetensors"
    with pytest.raises(ArtifactError, match="No weights file"):
        load_weights(model, path)
    save_weights(model, path)
    whole = path.read_bytes()
    for broken in (b"", whole[:100], whole[:-8], b"x" * 64):
        path.write_bytes(broken)
        with pytest.raises(ArtifactError, match="not a readable safetensors file"):
            load_weights(model, path)
    with pytest.raises(ArtifactError, match="Cannot write"):
        save_weights(model, tmp_path / "none" / "model.safetensors")
