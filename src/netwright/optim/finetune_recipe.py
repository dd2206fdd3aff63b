"""Few-sample fine-tuning of a pretrained encoder: fresh top layers, corrected moments, enough iterations."""

import math
from contextlib import nullcontext
from typing import Any

from torch import nn

from netwright.core.errors import SettingError
from netwright.core.randomness import isolated
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.optim._bert_adam import BertAdam
from netwright.optim._blocks import find_blocks, initialize
from netwright.optim._warmup_linear import WarmupLinear

__all__ = ["BertAdam", "WarmupLinear", "finetune_recipe", "prepare", "reinitialize_top"]

_HERE = "netwright.optim.finetune_recipe"


def reinitialize_top(
    model: nn.Module, layers: int = 1, *, pooler: bool = True, stack: str | None = None, seed: int | None = None
) -> list[str]:
    """Give the last blocks of a pretrained encoder, and its pooler, fresh weights in place.

    Reach for it before fine-tuning on few samples: the top layers are specialized to pretraining, and starting them
    anew learns faster and varies less between seeds. Try 1 to half of the layers.

    The blocks are the entries of the ``nn.ModuleList`` of equal modules that holds the most parameters (so of BERT,
    GPT-2, Llama, ViT, ``nn.TransformerEncoder``); the pooler is every module named ``pooler`` outside of them. Each is
    initialized by the model's own rule: ``_init_weights`` of the Transformers model around it, else
    ``reset_parameters`` of its parts.

    Cost: one copy of the weights concerned.

    Args:
        model: any module that holds an encoder.
        layers: blocks to initialize, counted from the top; 0 for none.
        pooler: the pooler too, where there is one.
        stack: name of the list of blocks, where it is another than the largest.
        seed: source of the new weights; None draws on from torch's global generator.

    Returns:
        The names of the modules that were initialized.

    Raises:
        SettingError: no such blocks, fewer than ``layers``, weights that other parts share, or a part without a rule;
            the model is then as before.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))
        >>> reinitialize_top(model, 2, seed=0)
        ['1.layers.1', '1.layers.2']

    Source: paper 216, Tianyi Zhang, Felix Wu, Arzoo Katiyar, Kilian Q. Weinberger and Yoav Artzi, Revisiting Few-sample
    BERT Fine-tuning, 2020, arXiv 2006.05987.

    Differs: works on any encoder, by the model's own initialization instead of a list of model types.
    """
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 0:
        raise SettingError(f"reinitialize_top: layers must be a non-negative integer, got {layers!r}.")
    chosen: dict[str, nn.Module] = {}
    where = ""
    if layers:
        where, blocks = find_blocks(model, stack)
        if layers > len(blocks):
            raise SettingError(f"reinitialize_top: {where} has {len(blocks)} blocks, so layers={layers} is too many.")
        first = len(blocks) - layers
        chosen = {f"{where}.{place}": blocks[place] for place in range(first, len(blocks))}
    if pooler:
        for name, module in model.named_modules():
            inside = where and name.startswith(f"{where}.")
            if name.rpartition(".")[2] == "pooler" and not inside and any(True for _ in module.parameters()):
                chosen[name] = module
    with nullcontext() if seed is None else isolated(seed, next(model.parameters()).device):
        initialize(model, chosen)
    return list(chosen)


def prepare(
    model: nn.Module,
    layers: int = 1,
    *,
    lr: float,
    pooler: bool = True,
    layer_decay: float = 1.0,
    weight_decay: float = 0.0,
    stack: str | None = None,
    seed: int | None = None,
) -> list[dict[str, Any]]:
    """Initialize the top of ``model`` in place, and sort its parameters into groups; what a recipe names.

    Args:
        model: as for :func:`reinitialize_top`, as are ``layers``, ``pooler``, ``stack`` and ``seed``.
        layers: blocks to initialize.
        lr: learning rate of the top (head, pooler and all that is no block and no embedding).
        pooler: initialize it too.
        layer_decay: each block further down has its learning rate times this once more, embeddings last.
        weight_decay: of weights; biases, norms and other vectors have none.
        stack: name of the list of blocks.
        seed: source of new weights.

    Returns:
        Groups for an optimizer, with ``lr`` and ``weight_decay``, the top first.
    """
    reinitialize_top(model, layers, pooler=pooler, stack=stack, seed=seed)
    where, blocks = ("", nn.ModuleList()) if layer_decay == 1 else find_blocks(model, stack)
    embeddings = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    embeddings += [f"{name}." for name, _ in model.named_modules() if name.rpartition(".")[2] == "embeddings"]
    sorted_by: dict[tuple[int, bool], list[nn.Parameter]] = {(0, True): [], (0, False): []}
    for name, param in model.named_parameters():
        depth = 0
        if layer_decay != 1 and name.startswith(f"{where}."):
            depth = len(blocks) - int(name[len(where) + 1 :].partition(".")[0])
        elif layer_decay != 1 and name.startswith(tuple(embeddings)):
            depth = len(blocks) + 1
        sorted_by.setdefault((depth, param.ndim > 1), []).append(param)
    return [
        {"params": params, "lr": lr * layer_decay**depth, "weight_decay": weight_decay if decays else 0.0}
        for (depth, decays), params in sorted(sorted_by.items(), key=lambda item: (item[0][0], not item[0][1]))
        if params
    ]


def finetune_recipe(
    task: Task | int,
    *,
    lr: float = 2e-5,
    batch_size: int = 32,
    layers: int = 1,
    pooler: bool = True,
    steps: int = 400,
    least_epochs: float = 3.0,
    warmup: float = 0.1,
    layer_decay: float = 1.0,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    bias_correction: bool = True,
    stack: str | None = None,
    seed: int | None = None,
) -> Recipe:
    """The recipe for fine-tuning a pretrained encoder on few samples, such that seeds agree.

    Reach for it where a pretrained transformer is trained on some hundred to some thousand labelled samples and one
    seed works while the next one fails. Three practices make the difference: Adam with bias correction, fresh top
    layers (:func:`reinitialize_top`), and iterations enough to converge, however few the samples. Then
    ``fit(model, task, finetune_recipe(task))``.

    Training has ``max(steps, least_epochs * n / batch_size)`` iterations on ``n`` samples, with linear warm-up and
    linear decay (:class:`WarmupLinear`). The recipe is plain data and names :func:`prepare` as its parameterization.

    The practice that it replaces is ``finetune_recipe(task, bias_correction=False, layers=0, pooler=False, steps=1)``:
    three epochs with :class:`BertAdam`.

    Args:
        task: what is trained, or its number of training samples.
        lr: greatest learning rate.
        batch_size: samples per iteration.
        layers: top blocks to initialize; half a dozen of BERT-large's 24 in the paper, 1 to 3 of a small encoder.
        pooler: initialize the pooler too.
        steps: least number of iterations.
        least_epochs: least number of passes over the data.
        warmup: share of iterations with rising learning rate.
        layer_decay: factor on the learning rate from each block to the one below; 0.95 is usual, 1 is off.
        weight_decay: of weights, not of biases and norms.
        clip_norm: greatest gradient norm, or None.
        bias_correction: False trains with :class:`BertAdam`.
        stack: name of the list of blocks, where it is not the largest.
        seed: source of the new weights; None draws from the seed of ``fit``.

    Raises:
        SettingError: a setting outside its range.

    Example:
        >>> recipe = finetune_recipe(320, layers=2)
        >>> recipe.epochs, recipe.optimizer, Recipe.from_json(recipe.to_json()) == recipe
        (40.0, 'torch.optim:AdamW', True)

    Source: paper 216, Tianyi Zhang, Felix Wu, Arzoo Katiyar, Kilian Q. Weinberger and Yoav Artzi, Revisiting Few-sample
    BERT Fine-tuning, 2020, arXiv 2006.05987.

    Differs: batches smaller than the others are left out of an epoch, as everywhere in ``fit``; the learning rate has
    no step at zero. The paper finds little use in layer-wise decay beside the other three; it is off by default.
    """
    items = len(task.data.train) if isinstance(task, Task) else task
    kinds = {"task": "a Task or a positive number of samples", "layers": "a non-negative integer"}
    for name, value in (("task", items), ("batch_size", batch_size), ("steps", steps), ("layers", layers)):
        if isinstance(value, bool) or not isinstance(value, int) or value < (name != "layers"):
            what = kinds.get(name, "a positive integer")
            raise SettingError(f"finetune_recipe: {name} must be {what}, got {value!r}.")
    numbers = {"lr": lr, "least_epochs": least_epochs, "layer_decay": layer_decay, "weight_decay": weight_decay}
    for name, number in numbers.items():
        fine = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        if not fine or number < 0 or (number == 0 and name != "weight_decay"):
            what = "non-negative" if name == "weight_decay" else "positive"
            raise SettingError(f"finetune_recipe: {name} must be a {what} number, got {number!r}.")
    if isinstance(warmup, bool) or not isinstance(warmup, int | float) or not 0 <= warmup < 1:
        raise SettingError(f"finetune_recipe: warmup must be a share in [0, 1), got {warmup!r}.")
    if layer_decay > 1:
        raise SettingError(f"finetune_recipe: layer_decay must be at most 1, got {layer_decay!r}.")
    per_epoch = max(1, items // batch_size)
    groups = {"lr": lr, "layer_decay": layer_decay, "weight_decay": weight_decay}
    top = {"layers": layers, "pooler": pooler, "stack": stack, "seed": seed}
    return Recipe(
        optimizer="torch.optim:AdamW" if bias_correction else f"{_HERE}:BertAdam",
        optimizer_settings={"lr": lr, "eps": 1e-6, "weight_decay": weight_decay},
        schedule=f"{_HERE}:WarmupLinear",
        schedule_settings={"warmup": warmup},
        parameterization=f"{_HERE}:prepare",
        parameterization_settings={**groups, **top},
        batch_size=min(batch_size, items),
        epochs=max(least_epochs, steps / per_epoch),
        clip_norm=clip_norm,
    )
