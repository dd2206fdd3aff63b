"""What a model costs on this machine: latency, memory, size, multiply-accumulates, parameters."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from netwright.core.data import Inputs, call
from netwright.core.errors import NetwrightError
from netwright.core.graph.export import export_model
from netwright.core.graph.macs import count_parameters, total_macs
from netwright.core.onnx_export import export_onnx
from netwright.core.onnx_memory import peak_memory
from netwright.core.onnx_module import feed, open_session
from netwright.core.timing import Latency, Ratio, compare_calls, percentiles, time_call

__all__ = ["Cost", "Latency", "Ratio", "Runtime", "compare", "compare_onnx", "measure", "measure_onnx"]

Runtime: TypeAlias = Literal["onnxruntime", "torch"]
"""What runs the model: ONNX Runtime on the exported file, or torch in eager mode."""


@dataclass(frozen=True)
class Cost:
    """What one model costs.

    Args:
        latency: of one call.
        memory_bytes: peak memory of that call: weights as stored plus the most bytes of activations alive at once,
            see :func:`netwright.core.onnx_memory.peak_memory`.
        size_bytes: of the ONNX file on disk.
        macs: multiply-accumulates of one item.
        parameters: elements of all parameters; shared ones count once.
    """

    latency: Latency
    memory_bytes: int
    size_bytes: int
    macs: int
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the keys of a point of ``result.json``."""
        return {
            "latency_ms": self.latency.to_dict(),
            "memory_bytes": self.memory_bytes,
            "size_bytes": self.size_bytes,
            "macs": self.macs,
            "parameters": self.parameters,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Cost":
        """The cost that :meth:`to_dict` wrote; other keys are passed over."""
        latency = Latency.from_dict(data["latency_ms"])
        return cls(latency, data["memory_bytes"], data["size_bytes"], data["macs"], data["parameters"])


def measure(
    model: nn.Module,
    inputs: Inputs,
    *,
    batch: int = 1,
    threads: int = 1,
    runtime: Runtime = "onnxruntime",
    seconds: float = 0.5,
    repeats: int | None = None,
) -> Cost:
    """The cost of ``model`` on this machine.

    Reach for it to know what a model costs; to say by how much one is faster than another, use :func:`compare`,
    for two separate measurements also differ by what the machine did in between.

    Args:
        model: any module that ``torch.export`` traces; it is measured in evaluation mode.
        inputs: a batch of at least one item; items are repeated or left out to make ``batch`` of them.
        batch: items in one timed call.
        threads: threads that one call may use.
        runtime: "onnxruntime" times the exported file, "torch" the module itself in eager mode.
        seconds: about how long to time.
        repeats: number of timed calls, in place of ``seconds``.

    Raises:
        TraceError: a model that cannot be traced.
        ArtifactError: a model that cannot be exported.
        NetwrightError: a batch, a number of threads or a time that is not positive, or an unknown runtime.

    Example:
        >>> cost = measure(nn.Linear(100, 10), torch.zeros(1, 100), repeats=5)
        >>> cost.macs, cost.parameters, cost.latency.runtime
        (1000, 1010, 'onnxruntime')

    Cost: a trace, an export (a second or so for small networks) and the time asked for.
    """
    _check(batch, threads, seconds, runtime)
    program = export_model(model, inputs)
    with tempfile.TemporaryDirectory(prefix="netwright-") as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(program, inputs, path)
        if runtime == "onnxruntime":
            return measure_onnx(path, inputs, program, batch=batch, threads=threads, seconds=seconds, repeats=repeats)
        with _torch_call(model, with_batch(inputs, batch), threads) as run:
            times = time_call(run, seconds=seconds, repeats=repeats)
        return _cost(path, program, times, batch, threads, runtime)


def measure_onnx(
    path: str | Path,
    inputs: Inputs,
    program: ExportedProgram,
    *,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 0.5,
    repeats: int | None = None,
) -> Cost:
    """The cost of an ONNX file in ONNX Runtime; other arguments as in :func:`measure`.

    What is timed is ``session.run`` with a dictionary of arrays, which is what a user calls; about 15 microseconds of
    it are the same for every model.

    Args:
        path: the file.
        inputs: a batch of at least one item.
        program: the trace that the file was exported from; it gives MACs and parameters.
        batch: items in one timed call.
        threads: threads that one call may use.
        seconds: about how long to time.
        repeats: number of timed calls, in place of ``seconds``.

    Raises:
        ArtifactError: a file that cannot be loaded, or inputs that do not match it.

    Example:
        >>> inputs = torch.zeros(1, 100)
        >>> program = export_model(nn.Linear(100, 10), inputs)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(program, inputs, Path(folder) / "model.onnx")
        ...     cost = measure_onnx(Path(folder) / "model.onnx", inputs, program, repeats=5)
        >>> cost.macs, cost.parameters
        (1000, 1010)
    """
    _check(batch, threads, seconds, "onnxruntime")
    times = time_call(_onnx_call(path, with_batch(inputs, batch), threads), seconds=seconds, repeats=repeats)
    return _cost(path, program, times, batch, threads, "onnxruntime")


def compare(
    model: nn.Module,
    baseline: nn.Module,
    inputs: Inputs,
    *,
    batch: int = 1,
    threads: int = 1,
    runtime: Runtime = "onnxruntime",
    seconds: float = 1.0,
    repeats: int = 20,
) -> Ratio:
    """How much longer ``model`` takes than ``baseline``, measured in turns in this process.

    Args:
        model: the one above the line.
        baseline: the one below it.
        inputs: a batch that both take.
        batch: items in one timed call.
        threads: threads that one call may use.
        runtime: "onnxruntime" or "torch".
        seconds: about how long to time, all in all.
        repeats: number of rounds.

    Raises:
        TraceError, ArtifactError, NetwrightError: as :func:`measure`.

    Example:
        >>> ratio = compare(nn.Linear(8, 8), nn.Linear(8, 8), torch.zeros(1, 8), seconds=0.05)
        >>> ratio.low <= ratio.median <= ratio.high
        True
    """
    _check(batch, threads, seconds, runtime)
    if runtime == "torch":
        sized = with_batch(inputs, batch)
        with _torch_call(model, sized, threads) as one, _torch_call(baseline, sized, threads) as two:
            return compare_calls(one, two, two, seconds=seconds, repeats=repeats)
    with tempfile.TemporaryDirectory(prefix="netwright-") as folder:
        paths = Path(folder) / "model.onnx", Path(folder) / "baseline.onnx"
        export_onnx(model, inputs, paths[0])
        export_onnx(baseline, inputs, paths[1])
        return compare_onnx(*paths, inputs, batch=batch, threads=threads, seconds=seconds, repeats=repeats)


def compare_onnx(
    path: str | Path,
    baseline_path: str | Path,
    inputs: Inputs,
    *,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 1.0,
    repeats: int = 20,
) -> Ratio:
    """:func:`compare` for two ONNX files that take the same inputs.

    The noise of the machine is measured in the same rounds, by a second session of the baseline: where that ratio is
    not within 1.00 +- 0.05, the result says ``noisy``.

    Raises:
        ArtifactError: a file that cannot be loaded, or inputs that do not match it.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(nn.Linear(8, 8), torch.zeros(1, 8), Path(folder) / "model.onnx")
        ...     places = [Path(folder) / "model.onnx"] * 2
        ...     ratio = compare_onnx(*places, torch.zeros(1, 8), seconds=0.05)
        >>> ratio.low <= ratio.median <= ratio.high
        True
    """
    _check(batch, threads, seconds, "onnxruntime")
    sized = with_batch(inputs, batch)
    one, two, three = (_onnx_call(place, sized, threads) for place in (path, baseline_path, baseline_path))
    return compare_calls(one, two, three, seconds=seconds, repeats=repeats)


def with_batch(inputs: Inputs, batch: int) -> Inputs:
    """``inputs`` with exactly ``batch`` items, repeating or leaving out items at the end.

    Every tensor with at least one dimension counts its items in the first one.
    """
    if isinstance(inputs, Tensor):
        return inputs[torch.arange(batch) % inputs.shape[0]]
    if isinstance(inputs, Mapping):
        return {key: _resized(value, batch) for key, value in inputs.items()}
    return tuple(_resized(value, batch) for value in inputs)


def _resized(value: Any, batch: int) -> Any:
    if isinstance(value, Tensor):
        return value[torch.arange(batch) % value.shape[0]] if value.ndim else value
    if isinstance(value, Mapping):
        return {key: _resized(item, batch) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_resized(item, batch) for item in value)
    return value


def _cost(
    path: str | Path, program: ExportedProgram, times: list[int], batch: int, threads: int, runtime: Runtime
) -> Cost:
    low, median, high = percentiles(times)
    return Cost(
        latency=Latency(median, low, high, batch, threads, runtime, len(times)),
        memory_bytes=peak_memory(path, batch),
        size_bytes=Path(path).stat().st_size,
        macs=total_macs(program),
        parameters=count_parameters(program),
    )


def _onnx_call(path: str | Path, inputs: Inputs, threads: int) -> Callable[[], object]:
    session = open_session(path, threads)
    arrays = feed(session, inputs)
    return lambda: session.run(None, arrays)


@contextmanager
def _torch_call(model: nn.Module, inputs: Inputs, threads: int) -> Iterator[Callable[[], object]]:
    """The call of a module in evaluation mode on ``threads`` threads; both as they were afterwards."""
    before = torch.get_num_threads()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            yield lambda: call(model, inputs)
    finally:
        torch.set_num_threads(before)
        for module, training in modes.items():
            module.training = training


def _check(batch: int, threads: int, seconds: float, runtime: str) -> None:
    for name, value in (("batch", batch), ("threads", threads), ("seconds", seconds)):
        if not value > 0:
            raise NetwrightError(f"measure: {name} must be positive, got {value!r}.")
    if runtime not in ("onnxruntime", "torch"):
        raise NetwrightError(f"measure: runtime must be 'onnxruntime' or 'torch', got {runtime!r}.")
