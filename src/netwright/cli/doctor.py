"""``netwright doctor``."""

import importlib.metadata
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from netwright.cli.app import app
from netwright.core.cost import compare_onnx
from netwright.core.errors import MissingDataError
from netwright.core.graph import trace
from netwright.core.machine import machine
from netwright.core.onnx_export import export_onnx
from netwright.core.task import builtin_tasks, load_task

__all__ = ["doctor_command"]

_PACKAGES = ("torch", "onnxruntime", "onnx", "onnxscript", "optuna", "bokeh", "ray", "transformers")


@app.command("doctor")
def doctor_command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Tell what is installed, what the machine can do, and run a self-test of a few seconds.

    Ends with 1 when the self-test fails.
    """
    found: dict[str, Any] = {
        "machine": machine(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.cuda.is_available(),
        "tasks": {name: _available(name) for name in builtin_tasks()},
        "self_test": _self_test(),
    }
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _print(found)
    sys.exit(0 if found["self_test"]["passed"] else 1)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _available(name: str) -> str:
    try:
        load_task(name)
    except MissingDataError as error:
        return str(error)
    return "ready"


def _self_test() -> dict[str, Any]:
    """Trace, prune, export and time a small network: zeroed and shrunk must agree, and a ratio to itself be 1."""
    start = time.perf_counter()
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 16, 16)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 256, 10)
    ).eval()
    graph = trace(model, inputs)
    units = {graph.groups[0].name: [0, 3, 7]}
    with torch.no_grad():
        gap = (graph.zero(model, units)(inputs) - graph.shrink(model, units)(inputs)).abs().max().item()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, inputs, path)
        ratio = compare_onnx(path, path, inputs, seconds=0.5)
    return {
        "passed": gap < 1e-4,
        "shrink_error": gap,
        "self_ratio": ratio.median,
        "noisy": ratio.noisy,
        "seconds": round(time.perf_counter() - start, 2),
    }


def _print(found: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    system, test = found["machine"], found["self_test"]
    console.print(f"[bold]Machine[/]   {system['cpu']}, {system['cores']} cores, {system['memory_bytes'] / 1e9:.0f} GB")
    console.print(f"          {system['os']}, Python {system['python']}, CUDA {'yes' if found['cuda'] else 'no'}")
    console.print(f"          instruction sets: {', '.join(system['isa']) or 'none of those that matter'}")
    console.print(
        "[bold]Packages[/]  " + ", ".join(f"{name} {value or '-'}" for name, value in found["packages"].items())
    )
    for name, state in found["tasks"].items():
        console.print(f"[bold]Task[/]      {name}: {state}")
    verdict = "[green]passed[/]" if test["passed"] else "[red]FAILED[/]"
    console.print(
        f"[bold]Self-test[/] {verdict} in {test['seconds']} s: shrink error {test['shrink_error']:.1e}, "
        f"a model against itself {test['self_ratio']:.3f}" + (" (noisy machine)" if test["noisy"] else "")
    )
