"""Codebooks: start against exhaustive search, learning against dense one-hot mappings, files against their bytes."""

import copy
import dataclasses
import itertools

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sparse_reference import ITEMS, RATE, network, regression
from torch import nn
from torch.nn import functional

from netwright.compress._codebook_learning import LearnedCodebooks, MappingSteps, mapping_slopes
from netwright.compress._codebook_start import alike, kmeans, nearest
from netwright.compress._codebook_storage import StoredCodebooks, attach, codebook_bytes, packed, unpacked
from netwright.compress.codebooks import Codebooks
from netwright.core.artifact import OnnxModule, export_onnx, load_weights, save_program, save_weights
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.fit import fit
from netwright.core.onnx_codebooks import find_codebooks
from netwright.core.parametrized import fold_parametrizations
from netwright.testing import check_transform, small_tasks
from tests.compress.test_low_rank import task_for
from tests.graph.zoo import build


@given(st.integers(1, 8), st.integers(1, 40), st.randoms())
def test_indices_survive_packing(bits, count, random) -> None:
    index = torch.tensor([random.randrange(2**bits) for _ in range(count)])
    planes = packed(index, bits)
    assert planes.shape == (bits, -(-count // 8))
    assert unpacked(planes, count).tolist() == index.tolist()


@settings(deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=4, max_size=9), st.integers(2, 4))
def test_kmeans_ends_at_a_fixed_point_near_the_best_of_all(values, words) -> None:
    values = np.sort(np.array(values, float))
    centres = kmeans(torch.tensor(values), words).numpy()
    assert (np.diff(centres) >= 0).all()
    own = abs(values[:, None] - centres).argmin(1)
    assert (nearest(torch.tensor(values), torch.tensor(centres)).numpy() - own).max() <= 0 or len(set(centres)) < words
    for word in set(own):
        assert (
            centres[word] == pytest.approx(values[own == word].mean(), abs=1e-9)
            or np.isin(centres[word], centres).any()
        )
    error = (abs(values[:, None] - centres).min(1) ** 2).sum()
    best = min(
        sum(((part - part.mean()) ** 2).sum() for part in np.split(values, cuts) if len(part))
        for cuts in itertools.combinations_with_replacement(range(len(values) + 1), words - 1)
    )
    assert best - 1e-9 <= error <= ((values - values.mean()) ** 2).sum() + 1e-9
    spread = np.concatenate([np.arange(5.0) + 100 * group for group in range(words)])
    assert kmeans(torch.tensor(spread), words).tolist() == [2 + 100 * group for group in range(words)]


def test_rows_of_one_distribution_share_a_group() -> None:
    torch.manual_seed(0)
    scales = torch.tensor([0.1, 1.0, 0.1, 5.0, 1.0, 5.0, 0.1])
    groups = alike(torch.randn(7, 400) * scales[:, None], 3, torch.Generator().manual_seed(0)).tolist()
    assert len(set(groups)) == 3
    assert groups[0] == groups[2] == groups[6]
    assert groups[1] == groups[4]
    assert groups[3] == groups[5]
    assert set(alike(torch.ones(5, 8), 3, torch.Generator()).tolist()) == {0}


def test_slopes_without_the_proximal_search_are_those_of_a_one_hot_mapping() -> None:
    torch.manual_seed(0)
    words, slope = torch.randn(6, 4).double().sort(1).values, torch.randn(6).double()
    chosen = torch.randint(4, (6,))
    mapping = functional.one_hot(chosen, 4).double().requires_grad_()
    weight = (mapping * words).sum(1)
    (weight * slope).sum().backward()
    dense = mapping.grad - mapping.grad.gather(1, chosen[:, None])
    step = torch.full((6,), 0.7).double()
    found = mapping_slopes(slope, weight.detach(), words, step, False)
    torch.testing.assert_close(found, dense / 0.7)
    nearer = mapping_slopes(slope, weight.detach(), words, step, True)
    assert torch.equal(nearer.sign(), found.sign())
    torch.testing.assert_close(nearer[found != 0], (slope[:, None] ** 2 / found)[found != 0])


@pytest.mark.parametrize("proximal", [True, False])
def test_learning_is_that_of_dense_mappings(proximal) -> None:
    """One network moved by fit with the hook, one written with dense one-hot mappings under autograd."""
    task, steps, reach = regression(), 6, 8.0
    model = copy.deepcopy(task.model)
    books = torch.stack([kmeans(model[0].weight.detach()[rows].flatten(), 4) for rows in ([0, 2, 4], [1, 3, 5, 6])])
    groups = torch.tensor([0, 1, 0, 1, 0, 1, 1])
    weight = model[0].weight.detach().clone()
    mapping = LearnedCodebooks(weight, books, groups, tuple(weight.shape))
    attach(model[0], books, mapping)
    parameter = model[0].parametrizations["weight"].original
    hook = MappingSteps([(mapping, parameter)], reach, proximal)
    fit(model, task, task.recipe.replace(epochs=steps), validate=False, hook=hook)

    naive = copy.deepcopy(task.model)
    free = [naive[0].bias, naive[2].weight, naive[2].bias]
    table = books.clone().requires_grad_()
    delta = ((books.max(1).values - books.min(1).values) / 3)[groups][:, None, None]
    logits = -(((books[groups][:, None] - weight[..., None]) / delta) ** 2)
    before = logits.argmax(-1)
    velocity, largest = torch.zeros_like(weight), 0.0
    x, y = task.data.train.tensors
    assert len(x) == ITEMS
    for step in range(steps):
        onehot = functional.one_hot(logits.argmax(-1), 4).double().requires_grad_()
        dense = torch.einsum("rck,rk->rc", onehot, table[groups])
        dense.retain_grad()
        hidden = torch.tanh(x @ dense.T + naive[0].bias)
        loss = functional.mse_loss(hidden @ naive[2].weight.T + naive[2].bias, y)
        loss.backward()
        velocity = 0.9 * velocity + 0.1 * dense.grad
        largest = max(largest, float((velocity**2).mean() ** 0.5))
        distance = (table[groups][:, None] - dense[..., None]).detach() / delta
        shape = torch.where(distance.abs() > 1e-12, 1 / distance, 0.0) if proximal else distance
        logits = logits - 2 * reach / steps * (1 - step / steps) * velocity[..., None] / largest * shape
        with torch.no_grad():
            for value in (table, *free):
                value -= RATE * value.grad
                value.grad = None
    assert not torch.equal(logits.argmax(-1), before)
    assert torch.equal(mapping.index, logits.argmax(-1))
    torch.testing.assert_close(parameter, table, rtol=0, atol=1e-10)
    torch.testing.assert_close(model[2].weight, naive[2].weight, rtol=0, atol=1e-10)


def test_stored_weight_is_the_codewords_and_trains_them() -> None:
    torch.manual_seed(0)
    layer, table = nn.Conv2d(3, 5, 3), torch.randn(2, 8)
    index, groups = torch.randint(8, (5, 27)), torch.tensor([0, 1, 1, 0, 1])
    attach(layer, table, StoredCodebooks(index, groups, 3, (5, 3, 3, 3)))
    naive = torch.stack([table[groups[row]][index[row]] for row in range(5)]).view(5, 3, 3, 3)
    assert torch.equal(layer.weight, naive)
    (layer.weight * torch.arange(135.0).view(5, 3, 3, 3)).sum().backward()
    sums = torch.zeros(2, 8)
    for row, column in itertools.product(range(5), range(27)):
        sums[groups[row], index[row, column]] += 27 * row + column
    torch.testing.assert_close(layer.parametrizations["weight"].original.grad, sums)
    fold_parametrizations(layer)
    assert torch.equal(layer.weight, naive)


@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 6)))
def test_found_codebooks_give_the_matrix_back(matrix) -> None:
    found = find_codebooks(matrix)
    assert np.array_equal(found.table[found.group[:, None], found.index], matrix)
    assert found.table.shape[1] <= len(np.unique(matrix))


@pytest.mark.parametrize("bits", [2, 3])
def test_files_are_small_and_hold_the_same_numbers(bits, tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 64), nn.Tanh(), nn.Linear(64, 64)
    )
    x = torch.randn(4, 3, 8, 8)
    smaller = Codebooks(bits)(model.eval(), task_for(model, x), budget=0)
    layers = [layer for layer in smaller.modules() if hasattr(layer, "parametrizations")]
    assert len(layers) == 3
    sizes = [
        codebook_bytes(len(each.weight), each.weight.numel(), len(each.parametrizations["weight"].original), bits, 4)
        for each in layers
    ]
    weights = sum(each.weight.numel() for each in layers)
    assert sum(sizes) < 1.1 * bits / 8 * weights
    biases = 4 * sum(len(each.bias) for each in layers)
    save_weights(smaller, tmp_path / "w.safetensors")
    export_onnx(smaller, x, tmp_path / "m.onnx")
    save_program(smaller, x, tmp_path / "m.pt2")
    assert (tmp_path / "w.safetensors").stat().st_size < sum(sizes) + biases + 1500
    assert (tmp_path / "m.onnx").stat().st_size < sum(sizes) + biases + 3000
    save_program(model, x, tmp_path / "whole.pt2")
    assert (tmp_path / "m.pt2").stat().st_size < 0.6 * (tmp_path / "whole.pt2").stat().st_size  # the rest is its graph
    torch.testing.assert_close(OnnxModule(tmp_path / "m.onnx")(x), smaller(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(x), smaller(x))
    again = Codebooks(bits)(model, task_for(model, x), budget=0, seed=5)
    load_weights(again, tmp_path / "w.safetensors")
    assert torch.equal(again(x), smaller(x))
    kinds = {item.data_type for item in onnx.load(tmp_path / "m.onnx").graph.initializer if np.prod(item.dims) > 999}
    assert kinds == {onnx.TensorProto.UINT8}


@pytest.mark.parametrize("name", ["vgg", "transformer", "hf-gpt2", "mlp-mixer"])
def test_works_on_architectures(name, tmp_path) -> None:
    model, inputs = build(name)
    task = task_for(model, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    smaller = Codebooks(2, groups=2)(model, task, budget=0)
    export_onnx(smaller, inputs, tmp_path / "m.onnx")
    export_onnx(model, inputs, tmp_path / "whole.onnx")
    got = OnnxModule(tmp_path / "m.onnx")
    for wanted, found in zip(flat(smaller, inputs), flat(got, inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert (tmp_path / "m.onnx").stat().st_size <= (tmp_path / "whole.onnx").stat().st_size
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def flat(model, inputs) -> list[torch.Tensor]:
    with torch.no_grad():
        found = (
            model(**inputs)
            if isinstance(inputs, dict)
            else model(*inputs)
            if isinstance(inputs, tuple)
            else model(inputs)
        )
    found = found.get("logits", next(iter(found.values()))) if isinstance(found, dict) else found
    return list(found) if isinstance(found, tuple | list) else [found]


def test_conforms() -> None:
    check_transform(lambda: Codebooks(2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 0}, "bits must be an integer from 1 to 8, got 0"),
        ({"bits": 9}, "bits must be an integer from 1 to 8, got 9"),
        ({"bits": 2.5}, "bits must be an integer from 1 to 8, got 2.5"),
        ({"groups": 0}, "groups must be a positive integer, got 0"),
        ({"groups": 300}, "groups must be at most 256, got 300"),
        ({"reach": -1.0}, "reach must be a finite number, at least 0, got -1.0"),
        ({"rate": 0.0}, "rate must be a finite number, greater than 0, got 0.0"),
        ({"proximal": 1}, "proximal must be true or false, got 1"),
        ({"distill": None}, "distill must be true or false, got None"),
        ({"exclude": "fc"}, r"exclude must be a sequence of names; write \('fc',\)"),
    ],
)
def test_refuses_settings(given, message) -> None:
    with pytest.raises(TransformError, match=f"Codebooks.{message}"):
        Codebooks(**given)


def test_refuses_models_and_tasks() -> None:
    task = small_tasks()[1]
    with pytest.raises(TransformError, match="exclude names 'head', which Sequential does not have"):
        Codebooks(exclude=["head"])(task.model, task)
    with pytest.raises(
        NothingToPruneError, match=r"codebooks of 3 bits make smaller outside exclude=\['0', '2', '4'\]"
    ):
        Codebooks(exclude=["0", "2", "4"])(task.model, task)
    with pytest.raises(TransformError, match="trains by its own fit="):
        Codebooks()(task.model, dataclasses.replace(task, fit=lambda model, **_: model))
    model = network()
    with pytest.raises(
        NothingToPruneError, match="Sequential has no linear layer or ungrouped convolution that codebooks"
    ):
        Codebooks(8)(model, regression(model))
