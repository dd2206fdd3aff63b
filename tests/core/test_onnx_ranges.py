"""Fake quantizers of any range: the file rounds to the same integers, or is refused."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from netwright.core.artifact import OnnxModule, export_onnx
from netwright.core.errors import ArtifactError


class Rounded(nn.Module):
    """A linear layer whose input, and whose weight by channel, are rounded to integers of a range."""

    scale: Tensor
    zero: Tensor
    steps: Tensor
    zeros: Tensor

    def __init__(self, low: int, high: int, *, axis: int | None = None, weights: tuple[int, int] = (-127, 127)) -> None:
        super().__init__()
        self.range, self.weights, self.axis = (low, high), weights, axis
        self.layer = nn.Linear(6, 4, bias=False)
        middle = (low + high + 1) // 2
        count = 1 if axis is None else 6
        self.register_buffer("scale", (torch.arange(count) + 2.0)[0 if axis is None else slice(None)] / 16)
        self.register_buffer("zero", torch.full_like(self.scale, middle, dtype=torch.int32))
        self.register_buffer("steps", (torch.arange(4) + 1.0) / 64)
        self.register_buffer("zeros", torch.full((4,), (weights[0] + weights[1]) // 2, dtype=torch.int32))

    def rounded(self, x: Tensor) -> Tensor:
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, *self.range)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero, self.axis, *self.range)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rounded(x)
        weight = torch.fake_quantize_per_channel_affine(self.layer.weight, self.steps, self.zeros, 0, *self.weights)
        return nn.functional.linear(x, weight)


def inputs(*shape: int) -> Tensor:
    """Some inside of every range, many beyond."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 2, shape[0])[:, None]


def agree(model: nn.Module, x: Tensor, path: Path) -> list[str]:
    torch.manual_seed(0)
    export_onnx(model, x[:2], path)
    torch.testing.assert_close(OnnxModule(path)(x), model(x).detach(), atol=1e-4, rtol=1e-5)
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("bounds", [(0, 15), (0, 127), (1, 255), (0, 254), (-8, 7), (-127, 127), (-128, 126)])
@pytest.mark.parametrize("axis", [None, 1])
def test_an_activation_of_fewer_integers_is_clipped(tmp_path: Path, bounds: tuple[int, int], axis: int | None) -> None:
    nodes = agree(Rounded(*bounds, axis=axis), inputs(64, 6), tmp_path / "model.onnx")
    assert nodes.count("Clip") == 1


@pytest.mark.parametrize(
    ("low", "high", "clips"),
    [(-8, 7, 1), (-8.4, 7.4, 1), (0, 6, 1), (-8, 8, 2), (-9, 7, 2), (None, 7, 2), (-8, None, 2)],
)
def test_what_is_clipped_already_is_not_clipped_again(
    tmp_path: Path, low: float | None, high: float | None, clips: int
) -> None:
    model = Rounded(0, 15)  # steps of an eighth, eight of them below zero
    rounded, ends = model.rounded, [None if end is None else end / 8 for end in (low, high)]
    model.rounded = lambda x: rounded(x.clamp(*ends))  # type: ignore[method-assign]
    assert agree(model, inputs(64, 6), tmp_path / "model.onnx").count("Clip") == clips


@pytest.mark.parametrize("bounds", [(0, 255), (-128, 127)])
@pytest.mark.parametrize("weights", [(-127, 127), (-7, 7), (-128, 127), (0, 255), (1, 255), (0, 15)])
def test_all_of_8_bits_need_no_clip(tmp_path: Path, bounds: tuple[int, int], weights: tuple[int, int]) -> None:
    nodes = agree(Rounded(*bounds, weights=weights), inputs(64, 6), tmp_path / "model.onnx")
    assert "Clip" not in nodes


@pytest.mark.parametrize("bounds", [(0, 255), (0, 15)])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_channels_of_an_activation_on_any_axis(tmp_path: Path, axis: int, bounds: tuple[int, int]) -> None:
    model = Rounded(*bounds, axis=axis)
    model.forward = model.rounded  # type: ignore[method-assign]
    x = inputs(64, 6 * 6 * 6).reshape(64, 6, 6, 6)
    agree(model, x, tmp_path / "model.onnx")


@pytest.mark.parametrize("bounds", [(0, 256), (-129, 127), (-1, 128), (0, 65535), (-32768, 32767)])
def test_more_than_8_bits_are_refused(tmp_path: Path, bounds: tuple[int, int]) -> None:
    low, high = bounds
    for model in (Rounded(low, high), Rounded(0, 255, weights=bounds)):
        with pytest.raises(ArtifactError, match=rf"integers from {low} to {high}; an ONNX file holds -128 to 127"):
            export_onnx(model, inputs(2, 6), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Padded(nn.Module):
    """A convolution whose input is rounded, padded and rounded again."""

    scale: Tensor
    zero: Tensor

    def __init__(self, inner: tuple[int, int], outer: tuple[int, int]) -> None:
        super().__init__()
        self.inner, self.outer = inner, outer
        self.layer = nn.Conv2d(2, 3, 3)
        self.register_buffer("scale", torch.tensor(0.25))
        self.register_buffer("zero", torch.tensor(0, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, *self.inner)
        x = nn.functional.pad(x, (1, 1, 1, 1))
        return self.layer(torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, *self.outer))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("outer", "pads"), [((0, 255), 0), ((0, 15), 1)])
def test_padding_is_taken_only_between_equal_ranges(tmp_path: Path, outer: tuple[int, int], pads: int) -> None:
    x = 4 * torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    nodes = agree(Padded((0, 255), outer), x, tmp_path / "model.onnx")
    assert nodes.count("Pad") == pads
