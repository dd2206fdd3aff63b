"""Which weights methods refuse."""

import pytest
import torch
from torch import nn

from netwright.compress import Prune
from netwright.compress._settings import check_weights
from netwright.core.errors import TransformError


def test_masks_of_attention_are_no_broken_weights() -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    check_weights(Prune(), model)


@pytest.mark.parametrize(("name", "value"), [("weight", -torch.inf), ("weight", torch.nan), ("mask", torch.inf)])
def test_other_values_that_are_not_finite_are_named(name: str, value: float) -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("mask", torch.zeros(3, 3))
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with torch.no_grad():
        getattr(model, name)[0, 0] = value
    with pytest.raises(TransformError, match=f"Prune: {name} has 1 values that are not finite"):
        check_weights(Prune(), model)
