"""The fine-tuning recipe: what starts anew, what does not, and how it trains."""

import io
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.errors import SettingError
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.optim._blocks import find_blocks
from netwright.optim.finetune_recipe import BertAdam, WarmupLinear, finetune_recipe, prepare, reinitialize_top
from netwright.testing import check_optimizer

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def bert(**changes):
    return transformers.BertModel(
        transformers.BertConfig(vocab_size=20, max_position_embeddings=12, **(SMALL | changes))
    )


class Classifier(nn.Module):
    """A Transformers model within a module of one's own."""

    def __init__(self, encoder=None):
        super().__init__()
        self.encoder = encoder or bert()
        self.head = nn.Linear(16, 2)

    def forward(self, ids):
        return self.head(self.encoder(input_ids=ids, attention_mask=(ids > 0).long()).pooler_output)


def models():
    gpt = transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=8, vocab_size=20)
    llama = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, **SMALL)
    vit = transformers.ViTConfig(image_size=8, patch_size=4, **SMALL)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return {
        "encoder.layer": bert(),
        "encoder.encoder.layer": Classifier(),
        "h": transformers.GPT2Model(gpt),
        "layers": transformers.LlamaModel(llama),
        "0.layers": nn.Sequential(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(16, 2)),
        "vit": transformers.ViTModel(vit),
    }


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("name", list(models()))
def test_blocks_are_found_and_only_the_top_starts_anew(name):
    model = models()[name]
    where, blocks = find_blocks(model)
    assert where == name or name == "vit"
    assert len(blocks) == 3
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.full_like(param, 5.0))
    before = values(model)
    names = reinitialize_top(model, 2, seed=0)
    assert names[:2] == [f"{where}.1", f"{where}.2"]
    expected = {key for key, _ in model.named_parameters() if any(key.startswith(f"{entry}.") for entry in names)}
    assert changed(model, before) == expected
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_new_weights_are_drawn_as_the_model_draws_them():
    model = Classifier(bert(hidden_size=64, intermediate_size=128, initializer_range=0.07))
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(9.0)
    assert reinitialize_top(model, 1, seed=0) == ["encoder.encoder.layer.2", "encoder.pooler"]
    for part in (model.encoder.encoder.layer[2], model.encoder.pooler):
        for name, param in part.state_dict().items():
            if "LayerNorm" in name:
                assert torch.equal(param, torch.full_like(param, float(name.endswith("weight"))))
            elif name.endswith("bias"):
                assert torch.equal(param, torch.zeros_like(param))
            else:
                assert float(param.std()) == pytest.approx(0.07, rel=0.05)
                assert abs(float(param.mean())) < 0.005


def test_without_a_rule_of_the_model_parts_reset_themselves():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(9.0)
    reinitialize_top(model, 1, seed=0)
    top = model.layers[2]
    bound = math.sqrt(6 / (32 + 96))  # Glorot's, of the joint input projection
    assert 0.9 * bound < float(top.self_attn.in_proj_weight.detach().abs().max()) <= bound
    assert torch.equal(top.self_attn.out_proj.bias, torch.zeros(32))
    assert torch.equal(top.norm1.weight, torch.ones(32))
    assert float(top.linear1.weight.detach().abs().max()) <= 1 / math.sqrt(32)


def test_loaded_weights_start_anew_too(tmp_path):
    """Transformers marks what it loaded, and its initialization leaves that alone."""
    bert().save_pretrained(tmp_path)
    model = transformers.BertModel.from_pretrained(tmp_path)
    for param in model.parameters():
        param._is_hf_initialized = True
    before = values(model)
    reinitialize_top(model, 1, seed=0)
    assert "encoder.layer.2.attention.self.query.weight" in changed(model, before)
    assert all(param._is_hf_initialized for param in model.parameters())


def test_seeds_decide_and_the_global_generator_stays():
    found = []
    for seed in (1, 1, 2):
        model = bert()
        torch.manual_seed(7)
        reinitialize_top(model, 1, seed=seed)
        found.append(model.encoder.layer[2].output.dense.weight.detach().clone())
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    torch.manual_seed(7)
    reinitialize_top(bert(), 1)  # without a seed it draws on
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert not torch.equal(torch.rand(1), drawn)


def test_what_cannot_start_anew_is_refused_and_left_alone():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.linear = nn.Linear(4, 4)

    ruleless = nn.Sequential(nn.ModuleList([Scaled() for _ in range(2)]))
    before = values(ruleless)
    with pytest.raises(
        SettingError, match=r"No rule initializes 0\.1\.scale: give its module a method reset_parameters"
    ):
        reinitialize_top(ruleless, 1, seed=0)
    assert changed(ruleless, before) == set()
    tied = bert()
    tied.encoder.layer[2].output.dense = tied.encoder.layer[0].output.dense
    before = values(tied)
    with pytest.raises(SettingError, match=r"encoder.layer.2.output.dense.weight is shared with encoder.layer.0"):
        reinitialize_top(tied, 1, seed=0)
    assert changed(tied, before) == set()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reinitialize_top(bert(), 4), "encoder.layer has 3 blocks, so layers=4 is too many"),
        (lambda: reinitialize_top(bert(), -1), "layers must be a non-negative integer, got -1"),
        (lambda: reinitialize_top(bert(), True), "layers must be a non-negative integer"),
        (lambda: reinitialize_top(nn.Linear(2, 2), 1), "Linear has no nn.ModuleList of equal blocks"),
        (
            lambda: reinitialize_top(bert(), 1, stack="layers"),
            "'layers' is no nn.ModuleList of the model; there are enc",
        ),
        (lambda: finetune_recipe(0), "task must be a Task or a positive number of samples, got 0"),
        (lambda: finetune_recipe("digits"), "task must be a Task"),
        (lambda: finetune_recipe(100, batch_size=0), "batch_size must be a positive integer, got 0"),
        (lambda: finetune_recipe(100, steps=1.5), "steps must be a positive integer"),
        (lambda: finetune_recipe(100, lr=0.0), "lr must be a positive number, got 0.0"),
        (lambda: finetune_recipe(100, lr=math.nan), "lr must be a positive number"),
        (lambda: finetune_recipe(100, least_epochs=0), "least_epochs must be a positive number"),
        (lambda: finetune_recipe(100, weight_decay=-0.1), "weight_decay must be a non-negative number"),
        (lambda: finetune_recipe(100, layer_decay=1.1), "layer_decay must be at most 1, got 1.1"),
        (lambda: finetune_recipe(100, layers=-1), "layers must be a non-negative integer, got -1"),
        (lambda: finetune_recipe(100, warmup=1.0), r"warmup must be a share in \[0, 1\), got 1.0"),
        (lambda: WarmupLinear(torch.optim.SGD([torch.zeros(1)]), 0), "total_steps must be a positive integer, got 0"),
        (lambda: WarmupLinear(torch.optim.SGD([torch.zeros(1)]), 5, -0.1), r"warmup must be a share in \[0, 1\)"),
        (
            lambda: BertAdam([torch.zeros(1)], betas=(0.9, 1.0)),
            r"betas\[1\] must be a number at least 0 and less than 1",
        ),
        (lambda: BertAdam([torch.zeros(1)], eps=-1.0), "eps must be a number at least 0"),
        (lambda: BertAdam([torch.zeros(1)], weight_decay=math.inf), "weight_decay must be"),
    ],
)
def test_bad_settings_are_refused(call, message):
    with pytest.raises(SettingError, match=message):
        call()


def test_groups_hold_every_parameter_once_with_its_rate():
    model = Classifier()
    groups = prepare(model, 1, lr=0.1, layer_decay=0.5, weight_decay=0.01, seed=0)
    held = [param for group in groups for param in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    rate = {param: group["lr"] for group in groups for param in group["params"]}
    decay = {param: group["weight_decay"] for group in groups for param in group["params"]}
    encoder = model.encoder
    expected = {
        model.head.weight: 0.1,
        encoder.pooler.dense.weight: 0.1,
        encoder.encoder.layer[2].output.dense.weight: 0.05,
        encoder.encoder.layer[1].output.dense.weight: 0.025,
        encoder.encoder.layer[0].output.LayerNorm.bias: 0.0125,
        encoder.embeddings.word_embeddings.weight: 0.00625,
        encoder.embeddings.LayerNorm.weight: 0.00625,
    }
    for param, lr in expected.items():
        assert rate[param] == pytest.approx(lr)
    assert groups[0]["lr"] == 0.1
    assert all(decay[param] == (0.01 if param.ndim > 1 else 0.0) for param in held)
    assert len(prepare(model, 0, lr=0.1, pooler=False)) == 2


def data(count=40):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 20, (count, 6), generator=generator)
    return TensorDataset(ids, (ids[:, 0] > 10).long())


def task(model):
    split = Data(data(), data(8), data(8))
    return Task(
        "words", model, split, nn.functional.cross_entropy, lambda o, t: float((o.argmax(1) == t).float().mean())
    )


def test_the_recipe_is_data_and_counts_iterations():
    recipe = finetune_recipe(task(Classifier()), lr=1e-3, batch_size=8, steps=45, layers=2, layer_decay=0.9, seed=3)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.epochs == 9
    assert recipe.parameterization_settings["layers"] == 2
    assert finetune_recipe(1000, batch_size=10, steps=20).epochs == 3.0
    assert finetune_recipe(5, batch_size=32, steps=20).batch_size == 5
    assert finetune_recipe(5, bias_correction=False).optimizer.endswith(":BertAdam")


@pytest.mark.parametrize("bias_correction", [True, False])
def test_it_trains_in_fit(bias_correction):
    model = Classifier(bert(hidden_dropout_prob=0.0))
    given = {"lr": 3e-3, "batch_size": 8, "steps": 60, "layer_decay": 0.9, "bias_correction": bias_correction}
    words = task(model)
    recipe = finetune_recipe(words, **given)
    result = fit(model, words, recipe, seed=1)
    assert result.steps == 60
    assert result.history[-1].train_loss < 0.5 * result.history[0].train_loss
    rates = [record.lr for record in result.history]
    assert max(rates) == pytest.approx(3e-3, rel=0.05)
    assert rates[-1] == pytest.approx(3e-3 / 55, rel=1e-6)


def test_seeds_of_fit_draw_the_new_top():
    tops = []
    for seed, fixed in ((1, None), (1, None), (2, None), (1, 5), (2, 5)):
        model = Classifier()
        model.load_state_dict(tops[0][1]) if tops else None
        start = values(model)
        given = {"lr": 1e-30, "batch_size": 8, "steps": 1, "least_epochs": 0.01, "seed": fixed}
        fit(model, task(model), finetune_recipe(task(model), **given), seed=seed)
        tops.append((model.encoder.encoder.layer[2].output.dense.weight.detach().clone(), start))
    same = [torch.equal(tops[0][0], other[0]) for other in tops[1:]]
    assert same[:2] == [True, False]
    assert torch.equal(tops[3][0], tops[4][0])
    assert not torch.equal(tops[0][0], tops[3][0])


@given(st.integers(1, 60), st.floats(0, 0.99))
def test_the_schedule_is_its_formula(total, share):
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 2.0}, {"params": [torch.zeros(1)], "lr": 0.5}])
    schedule = WarmupLinear(optimizer, total, share)
    top = int(share * total)
    seen = []
    for _ in range(total + 2):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    expected = [
        (t + 1) / top if t < top else (total - t) / (total - top + 1) if top else (total - t) / total
        for t in range(total)
    ]
    np.testing.assert_allclose(seen, [[2.0 * f, 0.5 * f] for f in [*expected, 0.0, 0.0]], rtol=1e-12)
    assert all(0 < rate <= 2.0 for rate, _ in seen[:total])


def test_the_schedule_resumes():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = WarmupLinear(optimizer, 10, 0.2)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), schedule.state_dict()), file)
    file.seek(0)
    other = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    resumed = WarmupLinear(other, 10, 0.2)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for entry, stepped in ((optimizer, schedule), (other, resumed)):
        entry.step()
        stepped.step()
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]


def test_bert_adam_equals_a_transcription():
    start, grads = np.array([1.0, -2.0, 0.5]), np.random.default_rng(0).normal(size=(30, 3))
    param = torch.tensor(start, requires_grad=True)
    optimizer = BertAdam([param], lr=0.03, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    weight, first, second = start.copy(), np.zeros(3), np.zeros(3)
    for grad in grads:
        param.grad = torch.tensor(grad)
        optimizer.step()
        first = 0.8 * first + 0.2 * grad
        second = 0.95 * second + 0.05 * grad**2
        weight = weight - 0.03 * (first / (np.sqrt(second) + 1e-3) + 0.1 * weight)
    np.testing.assert_allclose(param.detach(), weight, rtol=1e-12)


def test_bert_adam_is_adam_with_longer_first_steps():
    """Without eps, Adam with its rate times ``(1 - b1^t) / sqrt(1 - b2^t)``."""
    ours, adams = (torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    plain = torch.optim.Adam([adams], lr=0.01, eps=0.0)
    optimizer = BertAdam([ours], lr=0.01, eps=0.0)
    for step in range(1, 21):
        for param, entry in ((ours, optimizer), (adams, plain)):
            param.grad = param.detach() ** 3 + math.sin(step)
            plain.param_groups[0]["lr"] = 0.01 * (1 - 0.9**step) / math.sqrt(1 - 0.999**step)
            entry.step()
    torch.testing.assert_close(ours, adams, rtol=1e-11, atol=1e-12)
    state = optimizer.state[ours]
    assert sum(entry.numel() for entry in state.values()) == 2 * ours.numel()


def test_bert_adam_conforms():
    check_optimizer(BertAdam, complex=True, sparse=False)
