"""What was cut where: one row for each layer of the baseline."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from netwright.compress._quantizers import WeightQuantizer
from netwright.core.data import Inputs
from netwright.core.graph.export import export_model
from netwright.core.graph.macs import count_macs
from netwright.workshop.evaluation import is_low_precision
from netwright.workshop.point import Step

__all__ = ["layer_table", "precisions"]


def layer_table(
    baseline: nn.Module, chosen: nn.Module, inputs: Inputs, precision: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Shapes, MACs and parameters of every layer with a weight, before and after.

    Args:
        baseline: the model before.
        chosen: it after its structural steps; parameters keep their names.
        inputs: a batch that both take.
        precision: how the weights of layers are stored, by the layer's name, where that is not "float32". Layers that
            share a weight need one name.
    """
    before, after = baseline.state_dict(), chosen.state_dict()
    macs_before, macs_after = (count_macs(export_model(model, inputs)) for model in (baseline, chosen))
    places = {weight: value.data_ptr() for weight, value in before.items()}
    stored = {places[_weight(name)]: how for name, how in precision.items() if _weight(name) in places}
    rows = []
    for name, module in baseline.named_modules():
        weight = _weight(name)
        if weight not in before or any(module.children()):
            continue
        new = after.get(weight)
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
                "precision": stored.get(places[weight], "float32"),
            }
        )
    return rows


def precisions(model: nn.Module, steps: Sequence[Step]) -> dict[str, str]:
    """How weights are stored that are not float32, by the name of their layer.

    Args:
        model: the model as it was built, with all its steps.
        steps: these steps.
    """
    label = _label(steps)
    if label is None:
        return {}
    rounded = [path.rpartition(".")[0] for path, part in model.named_modules() if isinstance(part, WeightQuantizer)]
    coded = [path for path, part in model.named_modules() if parametrize.is_parametrized(part, "weight")]
    return dict.fromkeys([*rounded, *coded], label)


def _label(steps: Sequence[Step]) -> str | None:
    for step in steps:
        if is_low_precision(step.build()):
            if step.method.endswith(":Codebooks"):
                return f"{step.settings['bits']}-bit codebook"
            bits = step.settings.get("weight_bits", 8)
            return "int8" if bits == 8 else f"int8, {bits}-bit weights"
    return None


def _weight(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"


def _count(state: dict[str, Any], name: str) -> int:
    prefix = f"{name}." if name else ""
    return sum(state[key].numel() for key in (f"{prefix}weight", f"{prefix}bias") if state.get(key) is not None)
