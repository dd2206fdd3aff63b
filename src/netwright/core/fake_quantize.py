"""What torch's fake-quantize operations need to be traced and exported.

``torch.fake_quantize_per_tensor_affine`` and ``torch.fake_quantize_per_channel_affine`` round a float tensor to the
values that an integer one could hold, with straight-through gradients. Torch has no shape functions for them, without
which ``torch.export`` refuses them; importing this module registers these. For ONNX they are translated to one node
each of a private domain, which :mod:`netwright.core.onnx_quantized` turns into standard ones.
"""

from typing import Any

import onnx
import torch
from torch import Tensor

__all__ = ["DOMAIN", "OPERATION", "translations"]

DOMAIN = "netwright"
"""Domain of the private ONNX operation; no written file holds it."""
OPERATION = "FakeQuantize"
"""Name of the private ONNX operation."""


def _shapes(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


def _register() -> None:
    for name in (
        "aten::fake_quantize_per_tensor_affine_cachemask",
        "aten::_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
        "aten::fake_quantize_per_channel_affine_cachemask",
    ):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"):
            torch.library.register_fake(name, _shapes)


_register()


def translations() -> dict[Any, Any]:
    """The table ``custom_translation_table`` of ``torch.onnx.export`` for the operations above."""
    operation = _operation()

    def per_tensor(x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> Any:
        return operation(x, scale, zero_point, axis=-1, low=quant_min, high=quant_max)

    def per_channel(x: Any, scale: Any, zero_point: Any, axis: int, quant_min: int, quant_max: int) -> Any:
        return operation(x, scale, zero_point, axis=axis, low=quant_min, high=quant_max)

    aten = torch.ops.aten
    return {
        aten.fake_quantize_per_tensor_affine.tensor_qparams: per_tensor,
        aten.fake_quantize_per_channel_affine.default: per_channel,
    }


def _operation() -> Any:
    """The private ONNX operator ``FakeQuantize(x, scale, zero_point; axis, low, high)``."""
    import onnxscript  # here, since it takes a third as long to import as torch, and only an export needs it

    schema = onnx.defs.OpSchema
    parameter, attribute = schema.FormalParameter, schema.Attribute
    return onnxscript.values.Op(
        onnxscript.values.Opset(DOMAIN, 1),
        OPERATION,
        schema(
            OPERATION,
            DOMAIN,
            1,
            inputs=[parameter("x", "T"), parameter("scale", "T"), parameter("zero_point", "I")],
            outputs=[parameter("y", "T")],
            type_constraints=[("T", ["tensor(float)"], ""), ("I", ["tensor(int32)"], "")],
            attributes=[attribute(name, schema.AttrType.INT, "", required=True) for name in ("axis", "low", "high")],
        ),
    )
