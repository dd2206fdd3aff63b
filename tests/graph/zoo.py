"""Small architectures with random weights, one of each kind that the graph has to understand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(inp: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    layers = [
        nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if act else nn.Sequential(*layers)


class PlainCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(8, 12, 3)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return self.fc(F.elu(self.conv2(x)).mean((2, 3)))


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(True), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Linear(12 * 16, 20), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class BasicBlock(nn.Module):
    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(inp, out, 3, stride)
        self.conv2 = conv_bn(out, out, 3, act=False)
        self.skip = conv_bn(inp, out, 1, stride, act=False) if stride > 1 or inp != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(self.conv1(x)) + self.skip(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.layer1 = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 8, 1))
        self.layer2 = nn.Sequential(BasicBlock(8, 12, 2), BasicBlock(12, 12, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.layer2(self.layer1(self.stem(x)))).flatten(1))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1, bias=False) for i in range(3))
        self.transition = nn.Conv2d(18, 9, 1, bias=False)
        self.last = nn.BatchNorm2d(9)
        self.fc = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        x = F.avg_pool2d(self.transition(F.relu(self.norms[3](torch.cat(features, 1)))), 2)
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


class ResNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.reduce = conv_bn(16, 8, 1)
        self.grouped = conv_bn(8, 8, 3, groups=4)
        self.expand = conv_bn(8, 16, 1, act=False)
        self.wide = conv_bn(16, 24, 3, groups=2)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.expand(self.grouped(self.reduce(x))))
        return self.fc(self.wide(x).mean((2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        hidden = inp * 3
        self.residual = stride == 1 and inp == out
        self.expand = conv_bn(inp, hidden, 1)
        self.depthwise = conv_bn(hidden, hidden, 3, stride, groups=hidden)
        self.project = conv_bn(hidden, out, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6, 3, 2)
        self.blocks = nn.Sequential(InvertedResidual(6, 8, 2), InvertedResidual(8, 8, 1))
        self.head = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.blocks(self.stem(x))).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


class EfficientNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 5, 1, 2, groups=16, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.se = SqueezeExcite(16, 4)
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.se(self.depthwise(self.expand(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ShuffleUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1), conv_bn(half, half, 3, groups=half, act=False), conv_bn(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = x.chunk(2, dim=1)
        x = torch.cat([kept, self.branch(worked)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class ShuffleNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2)
        self.units = nn.Sequential(ShuffleUnit(16), ShuffleUnit(16))
        self.head = conv_bn(16, 20, 1)
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.head(self.units(self.stem(x))).mean([2, 3]))


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 3 * dim)
        self.pwconv2 = nn.Linear(3 * dim, dim)
        self.gamma = nn.Parameter(torch.rand(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(ConvNeXtBlock(8), ConvNeXtBlock(8))
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.blocks(self.stem(x)).mean((2, 3))))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = conv_bn(3, 6)
        self.down2 = conv_bn(6, 10)
        self.bottom = conv_bn(10, 12)
        self.up2 = nn.ConvTranspose2d(12, 10, 2, 2)
        self.mix2 = conv_bn(20, 10)
        self.up1 = nn.ConvTranspose2d(10, 6, 2, 2)
        self.mix1 = conv_bn(12, 6)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        b = self.mix2(torch.cat([b, self.up2(c)], 1))
        return self.head(self.mix1(torch.cat([a, self.up1(b)], 1)))


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens = nn.Sequential(nn.Linear(tokens, 10), nn.GELU(), nn.Linear(10, tokens))
        self.channels = nn.Sequential(nn.Linear(dim, 14), nn.GELU(), nn.Linear(14, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class MLPMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(16, 8), MixerBlock(16, 8))
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.fc(self.norm(self.blocks(x)).mean(1))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 8, 3)
        self.table = nn.Linear(6, 10)
        self.joint = nn.Linear(18, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        joint = torch.cat([F.relu(self.image(image)).amax((2, 3)), torch.tanh(self.table(table))], -1)
        return self.fc(F.relu(self.joint(joint)))


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU())
        self.kind = nn.Linear(12, 5)
        self.box = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x)
        return {"kind": self.kind(x), "box": self.box(x).sigmoid()}


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.ReLU())
        self.embed = nn.Linear(10, 12)
        self.compare = nn.Linear(12, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = (self.embed(self.encoder(x).mean((2, 3))) for x in (left, right))
        return self.compare((a - b).abs())


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 32)
        self.down = nn.Linear(16, 8)
        self.gate = nn.Linear(8, 10)
        self.value = nn.Linear(8, 10)
        self.out = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        x = self.down(F.silu(a) * b)
        return self.out(torch.sigmoid(self.gate(x)) * self.value(x))


class GroupNormCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm1 = nn.GroupNorm(8, 16)
        self.conv2 = nn.Conv2d(16, 12, 3, padding=1)
        self.norm2 = nn.GroupNorm(2, 12)
        self.conv3 = nn.Conv2d(12, 8, 3, padding=1)
        self.norm3 = nn.InstanceNorm2d(8, affine=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.fc(F.relu(self.norm3(self.conv3(x))).mean((2, 3)))


class TiedLM(nn.Module):
    """A causal attention written out by hand, and an embedding that is also the output layer."""

    def __init__(self, vocabulary: int = 30, dim: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(torch.randn(1, 9, dim))
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 20), nn.GELU(), nn.Linear(20, dim))
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.full((9, 9), float("-inf")).triu(1), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position[:, : ids.shape[1]]
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) / 2.0 + self.mask[:t, :t]
        x = x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1))
        return self.head(x + self.mlp(x))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(self.embed(x))[:, 0])


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.fc(self.attention(self.query(x), context, context, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 10)
        self.rnn = kind(10, 12, batch_first=True)
        self.hidden = nn.Linear(12, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.hidden(self.rnn(torch.relu(self.embed(x)))[0][:, -1])))


class PixelNet(nn.Module):
    """Super-resolution: pixel shuffle, channels padded with zeros, dilated and asymmetric convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, (3, 1), padding=(1, 0))
        self.conv2 = nn.Conv2d(6, 10, 3, padding=2, dilation=2)
        self.up = nn.Conv2d(10, 16, 1)
        self.shuffle = nn.PixelShuffle(2)
        self.out = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.pad(x, (0, 0, 0, 0, 2, 2)) + F.leaky_relu(self.conv2(x))
        return self.out(F.relu(self.shuffle(self.up(x))))


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=12, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=4, n_positions=12, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=12,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=16, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def hf_resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="bottleneck", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def hf_mobilenet() -> nn.Module:
    config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=3)
    return transformers.MobileNetV2ForImageClassification(config)


@dataclass(frozen=True)
class Entry:
    """A model of the zoo and a batch of two for it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]


def _image(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size)


def _ids() -> Tensor:
    return torch.randint(0, 30, (2, 7))


ZOO: dict[str, Entry] = {
    "plain-cnn": Entry(PlainCNN, _image),
    "vgg": Entry(VGG, _image),
    "resnet": Entry(ResNet, _image),
    "densenet": Entry(DenseNet, _image),
    "resnext": Entry(ResNeXt, _image),
    "mobilenet-v2": Entry(MobileNetV2, _image),
    "efficientnet": Entry(EfficientNet, _image),
    "shufflenet-v2": Entry(ShuffleNetV2, _image),
    "convnext": Entry(ConvNeXt, _image),
    "unet": Entry(UNet, _image),
    "mlp-mixer": Entry(MLPMixer, _image),
    "two-inputs": Entry(TwoInputs, lambda: (_image(8), torch.randn(2, 6))),
    "two-outputs": Entry(TwoOutputs, lambda: torch.randn(2, 6)),
    "siamese": Entry(Siamese, lambda: (_image(8), _image(8))),
    "gated-mlp": Entry(GatedMLP, lambda: torch.randn(2, 6)),
    "group-norm": Entry(GroupNormCNN, lambda: _image(8)),
    "tied-lm": Entry(TiedLM, _ids),
    "transformer": Entry(Transformer, lambda: torch.randn(2, 5, 6)),
    "cross-attention": Entry(CrossAttention, lambda: (torch.randn(2, 5, 6), torch.randn(2, 4, 12))),
    "gru": Entry(lambda: Recurrent(nn.GRU), lambda: torch.randn(2, 5, 6)),
    "lstm": Entry(lambda: Recurrent(nn.LSTM), lambda: torch.randn(2, 5, 6)),
    "pixel-shuffle": Entry(PixelNet, lambda: _image(8)),
    "hf-bert": Entry(bert, lambda: {"input_ids": _ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}),
    "hf-gpt2": Entry(gpt2, lambda: {"input_ids": _ids()}),
    "hf-llama": Entry(llama, lambda: {"input_ids": _ids()}),
    "hf-vit": Entry(vit, lambda: {"pixel_values": _image()}),
    "hf-resnet": Entry(hf_resnet, lambda: {"pixel_values": _image(32)}),
    "hf-mobilenet-v2": Entry(hf_mobilenet, lambda: {"pixel_values": _image(32)}),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """A model whose normalizations are random too, so that nothing cancels, and a batch of two."""
    torch.manual_seed(seed)
    model = ZOO[name].build().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.5, 2)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model, ZOO[name].inputs()
