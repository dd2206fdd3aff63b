"""The deliberately ordinary networks of the built-in tasks."""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CharTransformer", "ResNet", "mlp"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection, ``(n, inputs, h, w) -> (n, outputs, h/stride, w/stride)``.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``relu(f(x) + shortcut(x))``."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A small residual network, ``(n, channels_in, h, w) -> (n, classes)``; 1.2M parameters at width 64.

    A 3x3 stem, three basic blocks of ``width``, ``2 width`` and ``4 width`` channels of which the last two halve the
    resolution, global average pooling and a linear layer.

    Args:
        channels_in: channels of the image.
        width: channels of the first block.
        classes: logits that come out.

    Example:
        >>> sum(p.numel() for p in ResNet(1, 64, 10).parameters())
        1226442
        >>> ResNet(1, 8, 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels_in: int = 1, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels_in, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            BasicBlock(width, width), BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 4 * width, 2)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``x``."""
        y: Tensor = self.blocks(functional.relu(self.norm(self.stem(x))))
        logits: Tensor = self.head(self.pool(y).flatten(1))
        return logits


def mlp(inputs: int, hidden: tuple[int, ...], classes: int) -> nn.Sequential:
    """Linear layers with ReLU between, ``(n, inputs) -> (n, classes)``.

    Example:
        >>> mlp(4, (8,), 2)(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(inputs, size), nn.ReLU()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


class TransformerBlock(nn.Module):
    """Causal self-attention and a feed-forward layer, each after a layer norm and added to the stream ``(n, t, dim)``.

    Args:
        dim: width of the stream.
        heads: attention heads; ``dim`` is a multiple of it.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.norm1 = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """The stream after attention and feed-forward."""
        n, t, _ = x.shape
        y = self.norm1(x)
        query, key, value = (
            layer(y).view(n, t, -1, self.head_dim).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, -1))
        y = self.down(functional.gelu(self.up(self.norm2(x))))
        return torch.add(x, y)


class CharTransformer(nn.Module):
    """A causal transformer over symbols, ``(n, t) -> (n, t, vocabulary)`` logits of the next symbol.

    Args:
        vocabulary: number of symbols.
        context: longest ``t``.
        dim: width of the stream.
        layers: blocks.
        heads: attention heads in each.

    Example:
        >>> CharTransformer(100, context=16, dim=32, layers=1)(torch.zeros(2, 16).long()).shape
        torch.Size([2, 16, 100])
    """

    def __init__(self, vocabulary: int, context: int = 128, dim: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(torch.randn(context, dim) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the symbol that follows each position of ``x``."""
        y: Tensor = self.blocks(self.embed(x) + self.position[: x.shape[1]])
        logits: Tensor = self.head(self.norm(y))
        return logits
