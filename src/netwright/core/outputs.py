"""What a model returns: a tensor, or a tuple or dict of tensors."""

from typing import Any

import torch
from torch import Tensor

from netwright.core.errors import TaskError

__all__ = ["Named", "concatenate", "count_elements", "shapes_of", "take_items", "to_cpu"]


class Named(dict[Any, Any]):
    """A dict of outputs that is also read as an object or a tuple, as a ModelOutput of Transformers is.

    Networks that were exported return plain dicts where the original returned such an object.

    Example:
        >>> result = Named(logits=1, hidden=2)
        >>> result["logits"], result.logits, result[1]
        (1, 1, 2)
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"There is no output {name!r}. There are {', '.join(map(str, self))}.") from None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) or (isinstance(key, int) and key not in self):
            return tuple(self.values())[key]
        return super().__getitem__(key)


def to_cpu(output: Any, name: str) -> Any:
    """An output detached, on the CPU, its half-precision parts in float32.

    Raises:
        TaskError: an output that is not made of tensors.
    """
    if isinstance(output, Tensor):
        output = output.detach().cpu()
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    if isinstance(output, dict):
        return {key: to_cpu(value, name) for key, value in output.items()}
    if isinstance(output, tuple | list):
        return tuple(to_cpu(value, name) for value in output)
    raise TaskError(
        f"Task {name!r}: the model returned a {type(output).__name__} where tensors are needed. "
        "Give Task(output=...) a function that reads the tensor from it."
    )


def concatenate(parts: list[Any], name: str) -> Any:
    """The outputs of many batches as those of one.

    Raises:
        TaskError: parts that do not fit together.
    """
    first = parts[0]
    if isinstance(first, dict):
        return {key: concatenate([part[key] for part in parts], name) for key in first}
    if isinstance(first, tuple):
        return tuple(concatenate([part[i] for part in parts], name) for i in range(len(first)))
    try:
        return torch.cat(parts)
    except RuntimeError as error:
        raise TaskError(
            f"Task {name!r}: the outputs of different batches cannot be concatenated ({error}). The first axis must "
            "be the batch; give Task(output=...) to read such a tensor."
        ) from error


def take_items(outputs: Any, index: Tensor) -> Any:
    """The outputs of the items at ``index``."""
    if isinstance(outputs, dict):
        return {key: take_items(value, index) for key, value in outputs.items()}
    if isinstance(outputs, tuple):
        return tuple(take_items(value, index) for value in outputs)
    return outputs[index]


def count_elements(outputs: Any) -> int:
    """Numbers in an output."""
    if isinstance(outputs, dict):
        return sum(map(count_elements, outputs.values()))
    return sum(map(count_elements, outputs)) if isinstance(outputs, tuple) else int(outputs.numel())


def shapes_of(outputs: Any) -> Any:
    """The shape of every tensor of an output."""
    if isinstance(outputs, dict):
        return {key: shapes_of(value) for key, value in outputs.items()}
    return tuple(map(shapes_of, outputs)) if isinstance(outputs, tuple) else tuple(outputs.shape)
