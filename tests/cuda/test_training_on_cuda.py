"""Training, averaging, resuming and rewriting on a CUDA device, each against the CPU or against itself."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.core.builtin.networks import ResNet
from netwright.core.checkpoint import load_checkpoint
from netwright.core.evaluate import evaluate
from netwright.core.fit import Record, fit
from netwright.core.task import Task
from netwright.optim import AutoClip, SwitchEMA, available, create
from netwright.param import (
    BackwardModulation,
    architecture_scaling,
    fold,
    geometric_parameterization,
    orthonormal,
    orthonormal_,
    weight_conditioning,
)
from tests.cuda.pictures import StopError, images, make_task

pytestmark = pytest.mark.cuda


def pictures(**recipe: Any) -> Task:
    return make_task(lambda: nn.Sequential(ResNet(1, 8, 3), nn.Dropout(0.1)), **recipe)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


RECIPES = {
    "plain": {},
    "bfloat16": {"precision": "bfloat16"},
    "average": {"average": 0.9},
    "switch-ema": {"average": 0.9, "average_method": "netwright.optim:SwitchEMA"},
    "clip": {"clip": "netwright.optim:AutoClip"},
    "lion": {"optimizer": "netwright.optim:Lion", "optimizer_settings": {"lr": 1e-3}},
    "kfac": {"optimizer": "netwright.optim:KFAC"},
    "mfac": {"optimizer": "netwright.optim:MFAC", "optimizer_settings": {"window": 4, "lr": 0.02}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_fit_repeats_and_resumes_to_the_last_bit(name: str, tmp_path: Any) -> None:
    task = pictures(**RECIPES[name])
    whole = fit(task.build(0), task, seed=5).model
    assert next(whole.parameters()).device.type == "cpu"  # it comes home
    assert torch.equal(weights(whole), weights(fit(task.build(0), task, seed=5).model))

    def stop(record: Record) -> None:
        if record.step >= 13:
            raise StopError

    path = tmp_path / "fit.ckpt"
    with pytest.raises(StopError):
        fit(task.build(0), task, seed=5, callbacks=[stop], checkpoint=path, checkpoint_seconds=0)
    assert 0 < load_checkpoint(path)["step"] < 24
    resumed = fit(task.build(0), task, seed=5, checkpoint=path)
    assert torch.equal(weights(whole), weights(resumed.model))


def test_a_fit_on_cuda_learns_what_one_on_the_cpu_learns() -> None:
    task = pictures(epochs=10)
    there, here = (fit(task.build(0), task, seed=1, device=device).model for device in ("cuda", "cpu"))
    assert evaluate(there, task, "val") == pytest.approx(evaluate(here, task, "val"), abs=0.15)
    assert evaluate(there, task, "val") > 0.6


def test_a_model_that_lives_on_cuda_stays_there_and_leaves_the_generator_alone() -> None:
    task = pictures(epochs=1)
    before = torch.cuda.get_rng_state()
    model = fit(task.build(0).cuda(), task, seed=1, teacher=task.build(1)).model
    assert all(value.is_cuda for value in model.state_dict().values())
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert evaluate(model, task, "val") == pytest.approx(evaluate(copy.deepcopy(model).cpu(), task, "val"), abs=0.05)


@pytest.mark.parametrize("name", available())
def test_every_optimizer_steps_a_network_there_as_on_the_cpu(name: str) -> None:
    settings = {"sgd": {"lr": 0.1}, "optimistic-amsgrad": {"span": 3}, "mfac": {"window": 4}}.get(name, {})
    inputs = torch.randn(20, 6, dtype=torch.float64)
    targets = torch.randn(20, 2, dtype=torch.float64)
    ends = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 2)).double().to(device)
        optimizer = create(name, model, **settings)
        kind = available()[name].closure
        x, y = inputs.to(device), targets.to(device)

        def outputs(model=model, x=x, y=y):
            found = model(x)
            return functional.mse_loss(found, y), found

        def usual(optimizer=optimizer, outputs=outputs):
            optimizer.zero_grad()
            loss = outputs()[0]
            loss.backward()
            return loss

        for _ in range(6):
            optimizer.step({"outputs": outputs, "graph": lambda o=outputs: o()[0]}.get(kind, usual))
        ends.append(weights(model).cpu())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=1e-8)


def test_clipping_and_averaging_there() -> None:
    ends = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Linear(10, 2)).double().to(device)
        clip, average = AutoClip(), SwitchEMA(model, 0.9)
        x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(6):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            clip(model.parameters())
            optimizer.step()
            average.update(model)
        average.end_epoch(model)
        ends.append(weights(model).cpu())
    torch.testing.assert_close(ends[1], ends[0])


@pytest.mark.parametrize(
    "rewrite",
    [
        weight_conditioning,
        geometric_parameterization,
        BackwardModulation,
        lambda model: architecture_scaling(model, torch.zeros_like(images(2, 0).tensors[0])).initialize(model, seed=0),
    ],
    ids=["weight_conditioning", "geometric_parameterization", "modulation", "architecture_scaling"],
)
def test_a_rewritten_network_computes_and_learns_there_as_on_the_cpu(rewrite: Any) -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    ends = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(first).to(device)
        torch.manual_seed(1)
        rewrite(model)
        model = model.double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = images(8, 0).tensors
        for _ in range(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(x.double().to(device)), y.to(device)).backward()
            optimizer.step()
        ends.append(fold(model)(x.double().to(device)).detach().cpu())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


def test_orthonormal_filters_there() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(6, 5)).cuda()
    penalty = orthonormal(model, strength=1.0)
    assert float(penalty()) == pytest.approx(float(orthonormal(copy.deepcopy(model).cpu(), strength=1.0)()), rel=1e-4)
    orthonormal_(model)
    assert float(penalty()) < 1e-8
