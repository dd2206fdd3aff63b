"""What a run hands back: files that load without Netwright.

``model.onnx`` for any runtime, ``model.pt2`` for ``torch.export.load``, ``model.safetensors`` for the weights alone.
Nothing is pickled, nothing is read back by unpickling, and each file appears whole or not at all.
"""

import io
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from netwright.core.data import Inputs
from netwright.core.errors import ArtifactError
from netwright.core.files import atomic_write
from netwright.core.graph.export import export_model
from netwright.core.onnx_export import export_onnx
from netwright.core.onnx_module import OnnxModule

__all__ = ["OnnxModule", "export_onnx", "load_weights", "save_program", "save_weights"]

_ALIASES = "netwright.tied."  # metadata: a name left out of the file -> the name that holds its tensor


def save_program(model: nn.Module, inputs: Inputs, path: str | Path) -> None:
    """Write the traced model, weights and all, so that plain torch runs it.

    Reach for it to hand a model to someone without its code: ``torch.export.load(path).module()`` is an ordinary
    module again. The batch dimension stays dynamic. Of ``inputs`` only shapes and types are written.

    Args:
        model: any module that ``torch.export`` traces.
        inputs: a batch to trace with.
        path: the file to write, by custom ``.pt2``.

    Raises:
        TraceError: a model that cannot be traced.
        ArtifactError: a path that cannot be written, or a full disk.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_program(nn.Linear(3, 2), torch.zeros(1, 3), folder + "/model.pt2")
        ...     torch.export.load(folder + "/model.pt2").module()(torch.zeros(5, 3)).shape
        torch.Size([5, 2])

    Cost: one trace, and one copy of the weights in memory and one on disk.
    """
    program = export_model(model, inputs)
    args, kwargs = pytree.tree_map_only(Tensor, torch.zeros_like, program.example_inputs)
    program.example_inputs = args, kwargs  # they are written as well, and were the user's data
    buffer = io.BytesIO()  # torch's writer of archives hides why it could not write
    torch.export.save(program, buffer)
    with atomic_write(Path(path), ArtifactError) as place:
        place.write_bytes(buffer.getbuffer())


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the parameters and buffers of ``model`` as safetensors.

    A tensor that the model holds under several names (tied weights) is written once; the file's metadata says
    which names share it.

    Args:
        model: any module.
        path: the file to write, by custom ``.safetensors``.

    Raises:
        ArtifactError: a path that cannot be written.

    Example:
        >>> import tempfile
        >>> one, two = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(one, folder + "/model.safetensors")
        ...     load_weights(two, folder + "/model.safetensors")
        >>> torch.equal(one.weight, two.weight)
        True
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[tuple[object, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ArtifactError(
                f"{type(model).__name__} keeps {name!r}, a {type(value).__name__}, in its state; only tensors can be "
                "saved."
            )
        owner = owners.setdefault(_storage(value, name), name)
        if owner == name:
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        else:
            aliases[_ALIASES + name] = owner
    metadata = {"format": "pt", **aliases}
    with atomic_write(Path(path), ArtifactError) as place:
        place.write_bytes(safetensors.torch.save(tensors, metadata))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Read weights written by :func:`save_weights` into ``model``, in place.

    Nothing is changed unless every name and shape fits.

    Args:
        model: a module of the same architecture.
        path: a safetensors file.

    Raises:
        ArtifactError: a file that is missing, truncated or corrupt, or whose names or shapes differ from the
            model's; the message names them.
    """
    tensors, tied = _read(Path(path))
    state = model.state_dict()
    for name, owner in tied.items():
        if name in state and owner in tensors:
            tensors[name] = tensors[owner]
    missing = sorted(set(state) - set(tensors))
    extra = sorted(set(tensors) - set(state) - set(tied))
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, the model's {tuple(value.shape)}"
        for name, value in state.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    problems = [
        *([f"missing {_listed(missing)}"] if missing else []),
        *([f"unknown {_listed(extra)}"] if extra else []),
        *([f"of another shape: {_listed(wrong)}"] if wrong else []),
    ]
    if problems:
        raise ArtifactError(
            f"{path} does not hold the weights of this {type(model).__name__}: {'; '.join(problems)}. Build the model "
            "that the weights were saved from."
        )
    model.load_state_dict({name: tensors[name] for name in state})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise ArtifactError(f"No weights file {path}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is not a readable safetensors file: {error}.") from error
    tied = {key.removeprefix(_ALIASES): value for key, value in metadata.items() if key.startswith(_ALIASES)}
    return tensors, tied


def _storage(value: Tensor, name: str) -> tuple[object, ...]:
    if value.numel() == 0:
        return (name,)
    return value.data_ptr(), value.dtype, tuple(value.shape), value.stride()


def _listed(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
