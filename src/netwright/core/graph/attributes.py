"""Sizes that modules remember as attributes, brought in line with parameters that have become smaller."""

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["LEAVES", "fit_attributes", "knows_its_sizes", "submodule"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CHANNEL_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)

LEAVES: tuple[type[nn.Module], ...] = (
    *_CONVOLUTIONS,
    *_TRANSPOSED,
    *_CHANNEL_NORMS,
    nn.Linear,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.Embedding,
)
"""Modules whose ``forward`` is one operation on their own parameters."""


def fit_attributes(model: nn.Module, literals: Mapping[str, Mapping[str, object]]) -> None:
    """Set the size attributes of all known modules from their parameters and from the rewritten graph.

    Args:
        model: changed in place.
        literals: for module names the lengths that their operation now has (``groups``, ``num_groups``,
            ``normalized_shape``, ``num_features``).
    """
    for name, module in model.named_modules():
        own = literals.get(name, {})
        weight = getattr(module, "weight", None)
        if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)) and isinstance(weight, Tensor):
            module.groups = _int(own.get("groups"), module.groups)
            first, second = weight.shape[0], weight.shape[1] * module.groups
            transposed = isinstance(module, _TRANSPOSED)
            module.in_channels, module.out_channels = (first, second) if transposed else (second, first)
        elif isinstance(module, nn.Linear) and isinstance(weight, Tensor):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, _CHANNEL_NORMS):
            sized = weight if isinstance(weight, Tensor) else module.running_mean
            known = sized.shape[0] if isinstance(sized, Tensor) else own.get("num_features")
            module.num_features = _int(known, module.num_features)
        elif isinstance(module, nn.Embedding) and isinstance(weight, Tensor):
            module.num_embeddings, module.embedding_dim = weight.shape
        elif isinstance(module, nn.GroupNorm):
            module.num_groups = _int(own.get("num_groups"), module.num_groups)
            if isinstance(weight, Tensor):
                module.num_channels = weight.shape[0]
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            shape = weight.shape if isinstance(weight, Tensor) else own.get("normalized_shape")
            if isinstance(shape, tuple | list):
                module.normalized_shape = tuple(int(size) for size in shape)
        elif _is_transposed_linear(module) and isinstance(weight, Tensor):
            module.nx, module.nf = weight.shape


def knows_its_sizes(module: nn.Module) -> bool:
    """Whether :func:`fit_attributes` sets the sizes of this module from its parameters."""
    return isinstance(module, LEAVES) or _is_transposed_linear(module)


def _is_transposed_linear(module: nn.Module) -> bool:
    """The linear layer of GPT-2 in Transformers, whose weight is ``(in, out)``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _int(value: object, default: int) -> int:
    return value if isinstance(value, int) else default


def submodule(source: nn.Module, path: str) -> nn.Module | None:
    """The module of that name, None where there is none (a graph may remember modules that a model no longer has)."""
    try:
        return source.get_submodule(path)
    except AttributeError:
        return None
