"""Costs: times against a clock that the test moves, memory against counts by hand and against a real process."""

import gc
import json
import subprocess
import sys

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.core import timing
from netwright.core.cost import compare, compare_onnx, measure, measure_onnx, with_batch
from netwright.core.errors import ArtifactError, NetwrightError
from netwright.core.graph.export import export_model
from netwright.core.onnx_export import export_onnx
from netwright.core.onnx_memory import peak_memory
from netwright.core.timing import compare_calls, percentiles, time_call


class Clock:
    """Time that only moves when a call says so; ``pace`` says how slow the machine is at a moment."""

    def __init__(self, monkeypatch, pace=lambda now: 1.0):
        self.now, self.pace = 0, pace
        monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: self.now)

    def call(self, *lengths):
        turns = iter(range(10**9))

        def run():
            self.now += round(lengths[next(turns) % len(lengths)] * self.pace(self.now))

        return run


def test_time_call_reads_the_clock(monkeypatch):
    clock = Clock(monkeypatch)
    times = time_call(clock.call(1_000_000, 2_000_000, 3_000_000), repeats=30)
    assert len(times) == 30
    assert percentiles(times) == pytest.approx((1.0, 2.0, 3.0))


def test_time_call_goes_on_for_the_time_asked(monkeypatch):
    times = time_call(Clock(monkeypatch).call(1_000_000), seconds=0.1)
    assert len(times) == pytest.approx(100, abs=2)
    assert len(time_call(Clock(monkeypatch).call(10**9), seconds=0.1)) == 5


def test_time_call_leaves_warm_up_out(monkeypatch):
    clock = Clock(monkeypatch, pace=lambda now: 50.0 if now < 20_000_000 else 1.0)
    assert set(time_call(clock.call(100_000), seconds=0.5)) == {100_000}


@pytest.mark.parametrize("ratio", [0.1, 0.97, 3.0])
def test_ratio_is_exact_on_a_machine_that_slows_down(monkeypatch, ratio):
    clock = Clock(monkeypatch, pace=lambda now: 1 + now / 4e9)  # a quarter slower every second
    base = 200_000
    found = compare_calls(clock.call(base * ratio), clock.call(base), clock.call(base), seconds=1.0)
    assert found.median == pytest.approx(ratio, rel=0.02)
    assert found.self_ratio == pytest.approx(1.0, abs=0.01)
    assert not found.noisy
    assert found.low <= found.median <= found.high
    assert found.repeats == 20


def test_ratio_says_noisy_when_the_baseline_differs_from_itself(monkeypatch):
    clock = Clock(monkeypatch)
    found = compare_calls(clock.call(50_000), clock.call(100_000), clock.call(110_000), seconds=0.2)
    assert found.noisy
    assert found.self_ratio == pytest.approx(1.1)
    assert found.median == pytest.approx(0.5)
    assert json.loads(json.dumps(found.to_dict()))["noisy"] is True


def test_garbage_collection_is_as_it_was():
    seen = []
    time_call(lambda: seen.append(gc.isenabled()), repeats=3, seconds=0.001)
    assert seen[-3:] == [False] * 3
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), timing.no_garbage_collection():
        _ = 1 / 0
    assert gc.isenabled()


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sizes = {"small": 32, "large": 512}
    for name, width in sizes.items():
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
        export_onnx(model, torch.zeros(1, 64), folder / f"{name}.onnx")
    return folder / "small.onnx", folder / "large.onnx"


def test_compare_files_knows_the_faster(two_files):
    small, large = two_files
    inputs = torch.randn(1, 64)
    assert compare_onnx(small, large, inputs, batch=32, seconds=0.3).median < 0.8
    assert compare_onnx(large, small, inputs, batch=32, seconds=0.3).median > 1.25


def test_a_file_against_itself(two_files):
    for _ in range(5):  # a busy machine may be noisy, and must then say so
        found = compare_onnx(two_files[1], two_files[1], torch.randn(1, 64), batch=8, seconds=0.4)
        if abs(found.median - 1) <= 0.05 and not found.noisy:
            return
    assert found.noisy


def test_measure_fills_every_field():
    model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10)).train()
    cost = measure(model, torch.randn(1, 100), batch=4, seconds=0.05)
    assert model.training
    assert cost.macs == 100 * 50 + 50 * 10
    assert cost.parameters == 100 * 50 + 50 + 50 * 10 + 10
    assert 4 * cost.parameters < cost.size_bytes < 4 * cost.parameters + 1000
    assert cost.memory_bytes == 4 * cost.parameters + 4 * 4 * (100 + 50)
    assert 0 < cost.latency.p10_ms <= cost.latency.median_ms <= cost.latency.p90_ms
    assert cost.latency.repeats >= 5
    found = json.loads(json.dumps(cost.to_dict()))
    assert set(found) == {"latency_ms", "memory_bytes", "size_bytes", "macs", "parameters"}
    assert {"median", "p10", "p90", "batch", "threads", "runtime"} <= set(found["latency_ms"])
    assert found["latency_ms"]["batch"] == 4
    assert found["latency_ms"]["runtime"] == "onnxruntime"


def test_torch_runtime_runs_as_asked_and_puts_things_back():
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            if not torch.compiler.is_compiling() and type(x) is torch.Tensor:
                seen.append((x.shape[0], torch.get_num_threads(), torch.is_inference_mode_enabled(), self.training))
            return super().forward(x)

    model, before = Spy(8, 8).train(), torch.get_num_threads()
    cost = measure(model, torch.randn(1, 8), batch=3, threads=2, runtime="torch", repeats=5)
    assert seen[-1] == (3, 2, True, False)
    assert (cost.latency.runtime, cost.latency.threads, cost.latency.repeats) == ("torch", 2, 5)
    assert model.training
    assert torch.get_num_threads() == before
    assert compare(nn.Linear(4, 4), nn.Linear(4, 4), torch.zeros(1, 4), runtime="torch", seconds=0.02).median > 0


@pytest.mark.parametrize(
    ("wrong", "word"), [({"batch": 0}, "batch"), ({"threads": -1}, "threads"), ({"seconds": 0}, "seconds")]
)
def test_impossible_settings(wrong, word):
    with pytest.raises(NetwrightError, match=f"{word} must be positive"):
        measure(nn.Linear(2, 2), torch.zeros(1, 2), **wrong)


def test_unknown_runtime_and_wrong_file(two_files, tmp_path):
    with pytest.raises(NetwrightError, match="runtime must be"):
        measure(nn.Linear(2, 2), torch.zeros(1, 2), runtime="abacus")
    with pytest.raises(ArtifactError, match="No ONNX file"):
        compare_onnx(two_files[0], tmp_path / "none.onnx", torch.zeros(1, 64))
    program = export_model(nn.Linear(64, 4), torch.zeros(1, 64))
    with pytest.raises(ArtifactError, match="takes 1 inputs"):
        measure_onnx(two_files[0], (torch.zeros(1, 64), torch.zeros(1)), program)


def test_with_batch_repeats_and_leaves_out():
    x = torch.arange(3)[:, None]
    assert with_batch(x, 5)[:, 0].tolist() == [0, 1, 2, 0, 1]
    assert with_batch({"x": x, "n": torch.tensor(7)}, 2)["x"][:, 0].tolist() == [0, 1]
    left, right = with_batch((x, [x, x]), 1)
    assert left.shape == right[1].shape == (1, 1)


def peak_of(model, inputs, tmp_path, batch=1):
    export_onnx(model, inputs, tmp_path / "model.onnx")
    return peak_memory(tmp_path / "model.onnx", batch)


def test_memory_of_a_residual_block_by_hand(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return x + self.two(functional.relu(self.one(x)))

    image, weights = 4 * 4 * 6 * 6, 4 * 2 * (4 * 4 * 9 + 4)
    for batch in (1, 5):  # the input is held across, with an activation and its ReLU beside it
        assert peak_of(Block(), torch.randn(2, 4, 6, 6), tmp_path, batch) == weights + 3 * image * batch


def test_memory_follows_reshapes_and_lifetimes(tmp_path):
    class Widen(nn.Module):
        def forward(self, x):
            wide = torch.cat([x] * 8, 1)
            return wide.reshape(-1, 4, 16).flatten(1).exp()[:, :1] + x[:, :1]

    peak = peak_of(Widen(), torch.randn(2, 8), tmp_path, 3)
    assert 4 * 3 * (8 + 64 + 64) <= peak <= 4 * 3 * (8 + 64 + 64) + 200  # a few constants for shapes


def test_memory_of_missing_and_broken_files(tmp_path):
    with pytest.raises(ArtifactError, match="No ONNX file"):
        peak_memory(tmp_path / "none.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"\xff\xff broken")
    with pytest.raises(ArtifactError, match="not a readable ONNX file"):
        peak_memory(tmp_path / "broken.onnx")


def resident(path, shape):
    """Bytes that loading and running a file adds to a process which has the runtime already."""
    script = (
        "import sys, re, numpy, onnxruntime as ort; from pathlib import Path;"
        "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]);"
        "options = ort.SessionOptions(); options.intra_op_num_threads = 1;"
        "ort.InferenceSession(sys.argv[2], options); before = peak();"
        "x = numpy.zeros([int(n) for n in sys.argv[3:]], 'float32');"
        "session = ort.InferenceSession(sys.argv[1], options);"
        "session.run(None, {session.get_inputs()[0].name: x}); print(peak() - before)"
    )
    tiny = path.with_name("tiny.onnx")
    export_onnx(nn.Linear(2, 2), torch.zeros(1, 2), tiny)
    command = [sys.executable, "-c", script, str(path), str(tiny), *map(str, shape)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_computed_memory_against_a_process(tmp_path):
    path = tmp_path / "model.onnx"
    wide = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Sigmoid(), nn.Conv2d(32, 32, 3, padding=1), nn.Sigmoid())
    export_onnx(wide, torch.zeros(2, 3, 64, 64), path)  # nearly all activations
    shape = (16, 3, 256, 256)
    proto = onnx.load(path)
    for value, size in zip(proto.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        value.dim_value = size
    path.write_bytes(proto.SerializeToString())
    computed, real = peak_memory(path, 16), resident(path, shape)
    assert computed == pytest.approx(4 * 16 * 256 * 256 * 64, rel=0.02)
    assert 0.8 < real / computed < 1.8, real / computed
    deep = nn.Sequential(*(nn.Linear(1500, 1500) for _ in range(6)))  # nearly all weights
    export_onnx(deep, torch.zeros(1, 1500), path)
    computed, real = peak_memory(path), resident(path, (1, 1500))
    assert computed == pytest.approx(4 * 6 * 1500 * 1501, rel=0.01)
    assert 0.8 < real / computed < 3, real / computed  # the runtime holds weights in two layouts for a while
