"""Architecture search on a CUDA device: searches run there, repeat, resume, and leave their networks there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from netwright.core.builtin.networks import ResNet
from netwright.search import GraphHyperNetwork, GrowingNetwork, SuperNet
from netwright.search.amended_darts import AmendedDARTS
from netwright.search.darts import DARTS
from netwright.search.manas import MANAS
from netwright.search.rarts import RARTS
from netwright.search.relaxed import Mixed
from tests.cuda.pictures import StopError, make_task

pytestmark = pytest.mark.cuda

SEARCHES: dict[str, Callable[..., Any]] = {
    "darts": lambda **settings: DARTS(order=2, **settings),
    "amended": AmendedDARTS,
    "rarts": RARTS,
    "manas": MANAS,
}


def mixed() -> nn.Module:
    def edge() -> nn.Module:
        return Mixed({"skip": nn.Identity(), "conv": nn.Conv2d(4, 4, 3, padding=1), "tanh": nn.Tanh()})

    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), edge(), nn.BatchNorm2d(4), edge(), nn.Flatten(), nn.Linear(256, 3)
    )


@pytest.mark.parametrize("name", SEARCHES)
def test_a_relaxed_search_repeats_and_resumes_there(name: str, tmp_path: Path) -> None:
    task = make_task(mixed)
    search = SEARCHES[name](epochs=4, batch_size=16)

    def stop(fraction: float, text: str) -> None:
        if fraction > 0.7:
            raise StopError

    whole = search.search(task.build(0).cuda(), task, seed=1)
    assert all(value.is_cuda for value in whole.network.state_dict().values())
    path = tmp_path / "search.ckpt"
    with pytest.raises(StopError):
        search.search(task.build(0).cuda(), task, seed=1, checkpoint=path, progress=stop)
    resumed = search.search(task.build(0).cuda(), task, seed=1, checkpoint=path)
    assert resumed.scores == whole.scores
    for value, again in zip(whole.network.state_dict().values(), resumed.network.state_dict().values(), strict=True):
        torch.testing.assert_close(value, again)


def test_a_hypernetwork_learns_and_predicts_there() -> None:
    task = make_task(lambda: ResNet(1, 8, 3))
    network = GraphHyperNetwork(3, largest=(16, 16, 3, 3), features=8).cuda()
    losses = network.fit(task, [ResNet(1, 8, 3).cuda(), ResNet(1, 6, 3).cuda()], steps=30, batch_size=16, lr=1e-2)
    assert sum(losses[-5:]) < sum(losses[:5])
    predicted = network.predict(ResNet(1, 8, 3).cuda(), task.example(16))
    assert all(value.is_cuda for value in predicted.state_dict().values())
    assert predicted(task.example(16).cuda()).isfinite().all()


def test_a_network_grows_there() -> None:
    task = make_task(lambda: ResNet(1, 8, 3))
    grown = GrowingNetwork(0.6, rounds=2)(task.build(0).cuda(), task, seed=0)
    assert all(value.is_cuda for value in grown.model.state_dict().values())
    assert grown.macs <= 0.6 * grown.full_macs
    assert grown.model(task.example(4).cuda()).isfinite().all()


def test_a_super_network_trains_and_is_sliced_there() -> None:
    task = make_task(lambda: ResNet(1, 8, 3))
    net = SuperNet(task.build(0).cuda(), task, least=0.5, levels=2)
    net.fit(seed=0)
    small = net.extract(net.smallest())
    assert all(value.is_cuda for value in small.state_dict().values())
    assert small(task.example(4).cuda()).isfinite().all()
