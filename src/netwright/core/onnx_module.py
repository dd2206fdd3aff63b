"""An ONNX file that is called like the model it came from."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from netwright.core.data import Inputs
from netwright.core.errors import ArtifactError
from netwright.core.graph.export import arguments
from netwright.core.onnx_export import OUTPUTS_KEY

__all__ = ["OnnxModule", "feed", "open_session"]

_NUMPY: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def open_session(path: str | Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU, with every optimization of the runtime.

    Raises:
        ArtifactError: a file that is missing, corrupt, or that the runtime refuses.
    """
    if not Path(path).is_file():
        raise ArtifactError(f"No ONNX file {path}.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exceptions have no common base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"ONNX Runtime cannot load {path}: {reason[:300]}") from error


def feed(session: onnxruntime.InferenceSession, inputs: Inputs) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays that ``session.run`` takes, by input name: positional ones in order, named ones by name.

    A nested input that is given by name is spread over the file's inputs of its parts: ``state={"a": x}`` is
    ``state_a``.

    Raises:
        ArtifactError: fewer or more tensors than the file has inputs, or an unknown name.
    """
    args, kwargs = arguments(inputs)
    wanted = {entry.name: entry.type for entry in session.get_inputs()}
    tensors = [value for value in pytree.tree_leaves(args) if isinstance(value, Tensor)]
    named = _spread(kwargs)
    unknown = [key for key in named if key not in wanted]
    found = dict(zip([name for name in wanted if name not in named], tensors, strict=False)) | named
    if unknown or len(found) != len(wanted) or len(tensors) + len(named) != len(wanted):
        raise ArtifactError(
            f"The ONNX file takes {len(wanted)} inputs ({', '.join(wanted)}), got {len(tensors)} by position and "
            f"{sorted(named)} by name."
        )
    return {name: _array(found[name], kind) for name, kind in wanted.items()}


def _spread(kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by the names that the trace gives them, where they are nested: their path in lower case."""
    found: dict[str, Tensor] = {}
    for key, value in kwargs.items():
        if isinstance(value, Tensor):
            found[key] = value
        elif isinstance(value, Mapping | tuple | list):
            parts = value if isinstance(value, Mapping) else dict(enumerate(value))
            inner = _spread({f"{key}_{name}": part for name, part in parts.items()})
            found |= {re.sub("[^a-zA-Z0-9]", "_", name).lower(): part for name, part in inner.items()}
    return found


def _array(value: Tensor, kind: str) -> np.ndarray[Any, Any]:
    value = value.detach().cpu()
    array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.ascontiguousarray(array, dtype=_NUMPY.get(kind, array.dtype))


class OnnxModule(nn.Module):
    """An ONNX file behind the call of an ordinary module, for evaluation.

    Reach for it to score what will really be deployed: every function that takes a model takes this too. It has no
    gradients, and one parameter without elements, for code that asks a model's first parameter where the model is;
    copies and pickles are made by opening the file again.

    Args:
        path: a file written by :func:`netwright.core.onnx_export.export_onnx`, or any ONNX file.
        threads: threads that one call may use.

    Raises:
        ArtifactError: a file that cannot be loaded; on a call, inputs that do not match the file's.

    Example:
        >>> import tempfile, torch
        >>> from netwright.core.onnx_export import export_onnx
        >>> linear, batch = torch.nn.Linear(3, 2), torch.ones(4, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(linear, batch, folder + "/model.onnx")
        ...     bool(torch.allclose(OnnxModule(folder + "/model.onnx")(batch), linear(batch), atol=1e-5))
        True
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        super().__init__()
        self.path = Path(path)
        self.threads = threads
        self.session = open_session(self.path, self.threads)
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        form = self.session.get_modelmeta().custom_metadata_map.get(OUTPUTS_KEY, "")
        given = json.loads(form) if form.startswith(("[", '{"keys"')) else None
        self._single = given is None and form != "tuple" and len(self.session.get_outputs()) == 1
        self._keys = given["keys"] if isinstance(given, dict) else given
        self._none = given["none"] if isinstance(given, dict) else []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original returns: a tensor, or a tuple or a dict of tensors, or of None."""
        inputs: Inputs = _one(args, kwargs, [entry.name for entry in self.session.get_inputs()])
        device = next((value.device for value in pytree.tree_leaves(inputs) if isinstance(value, Tensor)), None)
        arrays = self.session.run(None, feed(self.session, inputs))
        outputs: list[Any] = [torch.from_numpy(np.asarray(array)).to(device) for array in arrays]
        for position in self._none:
            outputs.insert(position, None)
        if self._keys is not None:
            return dict(zip(self._keys, outputs, strict=True))
        return outputs[0] if self._single else tuple(outputs)

    def __reduce__(self) -> tuple[Any, ...]:
        return OnnxModule, (self.path, self.threads)


def _one(args: tuple[Any, ...], kwargs: Mapping[str, Any], names: list[str]) -> Inputs:
    if not kwargs:
        return args
    named = _spread(kwargs)
    tensors = [value for value in pytree.tree_leaves(args) if isinstance(value, Tensor)]
    return dict(zip([name for name in names if name not in named], tensors, strict=False)) | named
