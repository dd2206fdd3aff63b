"""What was cut where: one row for each layer of the baseline."""

from typing import Any

from torch import nn

from netwright.core.data import Inputs
from netwright.core.graph.export import export_model
from netwright.core.graph.macs import count_macs

__all__ = ["layer_table"]


def layer_table(
    baseline: nn.Module, chosen: nn.Module, inputs: Inputs, low_precision: str | None
) -> list[dict[str, Any]]:
    """Shapes, MACs and parameters of every layer with a weight, before and after.

    Args:
        baseline: the model before.
        chosen: it after its structural steps; parameters keep their names.
        inputs: a batch that both take.
        low_precision: how the multiplying layers of the chosen model are stored, None for "float32".
    """
    before, after = baseline.state_dict(), chosen.state_dict()
    macs_before, macs_after = (count_macs(export_model(model, inputs)) for model in (baseline, chosen))
    rows = []
    for name, module in baseline.named_modules():
        weight = f"{name}.weight" if name else "weight"
        if weight not in before or any(module.children()):
            continue
        new = after.get(weight)
        multiplies = name in macs_before
        rows.append(
            {
                "layer": name or type(module).__name__,
                "kind": type(module).__name__,
                "baseline_shape": list(before[weight].shape),
                "chosen_shape": None if new is None else list(new.shape),
                "baseline_macs": macs_before.get(name, 0),
                "chosen_macs": macs_after.get(name, 0),
                "baseline_parameters": _count(before, name),
                "chosen_parameters": _count(after, name),
                "precision": low_precision if low_precision and multiplies else "float32",
            }
        )
    return rows


def _count(state: dict[str, Any], name: str) -> int:
    prefix = f"{name}." if name else ""
    return sum(state[key].numel() for key in (f"{prefix}weight", f"{prefix}bias") if state.get(key) is not None)
