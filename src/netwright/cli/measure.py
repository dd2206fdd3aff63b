"""``netwright measure``."""

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from netwright.cli.app import app
from netwright.core.artifact import load_weights
from netwright.core.cost import Cost, compare, measure
from netwright.core.task import load_task

__all__ = ["Runtime", "measure_command"]


class Runtime(StrEnum):
    """What runs the model."""

    onnxruntime = "onnxruntime"
    torch = "torch"


@app.command("measure")
def measure_command(
    task: Annotated[str, typer.Argument(help="A built-in task, file.py:name, or module:name.", show_default=False)],
    weights: Annotated[Path | None, typer.Option(help="Weights (.safetensors) to load.", show_default=False)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Items in a call.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a call.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.05, help="About how long to time each runtime.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what a task's model costs on this machine, in ONNX Runtime and in torch.

    The last line compares the model with itself: how far from 1.00 it is tells how noisy the machine is.
    """
    weights = weights and weights.absolute()  # loading a task may change the working directory
    found = load_task(task)
    model = found.build(seed=0)
    if weights is not None:
        load_weights(model, weights)
    inputs = found.example(max(batch, 2))
    costs = {
        runtime.value: measure(model, inputs, batch=batch, threads=threads, runtime=runtime.value, seconds=seconds)
        for runtime in Runtime
    }
    ratio = compare(model, model, inputs, batch=batch, threads=threads, seconds=seconds)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    **{name: cost.to_dict() for name, cost in costs.items()},
                    "self_ratio": {"median": ratio.median, "low": ratio.low, "high": ratio.high, "noisy": ratio.noisy},
                }
            )
        )
        return
    console = Console()
    console.print(_table(task, costs))
    noise = "this machine is too noisy now for ratios within 5%" if ratio.noisy else "ratios are good to within 5%"
    console.print(f"The model against itself: {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]; {noise}.")


def _table(task: str, costs: dict[str, Cost]) -> Table:
    table = Table(title=task, title_justify="left")
    table.add_column("")
    for name in costs:
        table.add_column(name, justify="right")
    rows: dict[str, Callable[[Cost], str]] = {
        "latency, median": lambda cost: f"{cost.latency.median_ms:.4g} ms",
        "p10 to p90": lambda cost: f"{cost.latency.p10_ms:.4g} to {cost.latency.p90_ms:.4g} ms",
        "peak memory": lambda cost: f"{cost.memory_bytes / 1e6:.3g} MB",
        "size on disk": lambda cost: f"{cost.size_bytes / 1e3:.4g} KB",
        "MACs": lambda cost: f"{cost.macs / 1e6:.4g} M",
        "parameters": lambda cost: f"{cost.parameters:,}",
    }
    for name, text in rows.items():
        table.add_row(name, *(text(cost) for cost in costs.values()))
    return table
