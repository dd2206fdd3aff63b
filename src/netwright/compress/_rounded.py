"""Whether a model has weights that an earlier step has rounded."""

from torch import nn

from netwright.compress._codebook_storage import StoredCodebooks
from netwright.compress._learned_quantizer import FixedQuantizer
from netwright.compress._quantizers import WeightQuantizer

__all__ = ["is_rounded"]


def is_rounded(model: nn.Module) -> bool:
    """Whether a model has weights that a quantizer rounds or that are held in codebooks."""
    return any(isinstance(part, WeightQuantizer | FixedQuantizer | StoredCodebooks) for part in model.modules())
