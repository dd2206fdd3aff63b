"""What can be tried of a run before its hours of training."""

import copy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from netwright.core.errors import NetwrightError
from netwright.core.graph.export import export_model
from netwright.core.onnx_export import export_onnx
from netwright.core.onnx_module import OnnxModule
from netwright.core.portable import packed
from netwright.core.task import Task
from netwright.workshop.local import cause

__all__ = ["rehearse"]

_READER = [sys.executable, "-m", "netwright.workshop.reader"]


def rehearse(model: nn.Module, task: Task) -> None:
    """Go once through what comes after the training: reading the task in another process, export, and scoring.

    Args:
        model: the untrained model; it is left as it is.
        task: what it is for.

    Raises:
        NetwrightError: a task that cannot be handed to a worker process or read there, or a model that cannot be
            exported or scored.

    Cost: an export; the start of a process, most of it beside that.
    """
    payload = packed(task, f"Task {task.name!r}")
    with subprocess.Popen(
        _READER, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:  # reads, once it has started, which takes as long as the export
        try:
            _export_and_score(model, task)
            _, said = process.communicate(payload)
        finally:
            process.kill()
    if process.returncode:
        lines = said.decode(errors="replace").strip().splitlines()
        why = lines[-1] if process.returncode == 1 and lines else f"the process {cause(process.returncode)}"
        raise NetwrightError(f"Task {task.name!r} cannot be read in a worker process: {why.rstrip('.')}.")


def _export_and_score(model: nn.Module, task: Task) -> None:
    model, example = copy.deepcopy(model).eval(), task.example(2)
    with TemporaryDirectory(prefix="netwright-") as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(export_model(model, example), example, path)
        task.outputs(OnnxModule(path), example)
