"""StableKD: blocks against a composition by hand, no blocks against plain distillation, cuts against gradients."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.compress._blocks import Cut, find_cuts, replaced
from netwright.compress.prune import Prune
from netwright.compress.stable_kd import StableKD, _Adapter, _Blocks, _open_cuts, _Schedule
from netwright.core.data import Data
from netwright.core.errors import TransformError
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy
from netwright.core.task import Task
from netwright.testing import check_transform
from netwright.testing._tasks import small_tasks
from tests.compress.zoo_tasks import zoo_task

HALF = {"method": "netwright.compress:Prune", "settings": {"ratios": 0.5}}


def teacher() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def student() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def unlike() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 7))


AT = (("1", "0"), ("3", "2"))


def task(**changes) -> Task:
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> TensorDataset:
        inputs = torch.randn(count, 4, generator=generator)
        return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long())

    plain = Recipe(optimizer="torch.optim:SGD", optimizer_settings={"lr": 0.1}, schedule=None, batch_size=8, epochs=2)
    base = Task("blobs", teacher, Data(part(64), part(24), part(8)), functional.cross_entropy, accuracy, recipe=plain)
    return dataclasses.replace(base, **changes)


def relative(given, goal):
    return (given - goal).pow(2).sum() / goal.pow(2).sum()


@pytest.mark.parametrize("opened", [2, 1, 0])
def test_every_block_learns_what_it_would_by_hand(opened) -> None:
    torch.manual_seed(1)
    whole, small = teacher().double(), student().double()
    found = task(recipe=Recipe(distill_weight=0.3, distill_temperature=2.0))
    adapter = _Adapter(6, 5, 1, positive=True).double()
    net = _Blocks(small, whole, [Cut(*pair) for pair in AT], [nn.Identity(), adapter])
    hook = _Schedule(StableKD(HALF, feature_weight=0.7), net, found, found.recipe)
    net.opened = opened
    x, y = torch.randn(8, 4).double(), torch.arange(8) % 3
    hook.loss(net(x), y).backward()
    got = [value.grad for value in (*small.parameters(), *adapter.parameters())]

    small, adapter = copy.deepcopy(small), copy.deepcopy(adapter)
    small.zero_grad(), adapter.zero_grad()
    first = whole[1](whole[0](x)).detach()
    second = adapter(whole[3](whole[2](first)).detach())
    loss = torch.zeros((), dtype=torch.float64)
    h = small[0](x)
    if opened == 2:
        loss, h = loss + 0.7 * relative(h, first), first
    h = small[2](small[1](h))
    if opened >= 1:
        loss, h = loss + 0.7 * relative(h, second.detach()), second
    logits, goal = small[3](h), whole(x)
    p, q = (goal / 2).softmax(1), (logits / 2).softmax(1)
    loss = loss + 0.7 * functional.cross_entropy(logits, y) + 0.3 * 4 * (p * (p / q).log()).sum(1).mean()
    loss.backward()
    wanted = [value.grad for value in (*small.parameters(), *adapter.parameters())]
    for one, two in zip(got, wanted, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two)
    assert (wanted[-1] is None) == (opened == 0)
    assert all(value.grad is None for value in whole.parameters())


def test_without_blocks_it_is_plain_distillation() -> None:
    found = task()
    model = found.build(seed=3)
    ours = StableKD(f"{__name__}:student", at=AT, decomposed=0.0, recomposed=0.0)(model, found, seed=4)
    same = task(model=student).build(seed=4)
    plain = fit(same, found, found.recipe, seed=4, teacher=copy.deepcopy(model).eval(), validate=False).model
    for one, two in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
    apart = StableKD(f"{__name__}:student", at=AT)(model, found, seed=4)
    assert not torch.equal(next(apart.parameters()), next(plain.parameters()))


def test_cuts_close_from_the_input_on() -> None:
    steps = [_open_cuts(share / 20, 3, 0.2, 0.5) for share in range(20)]
    assert steps == [3] * 4 + [2] * 2 + [1] * 2 + [0] * 12
    assert _open_cuts(0.3, 2, 0.3, 0.3) == 0
    assert _open_cuts(0.99, 2, 1.0, 1.0) == 2


@pytest.mark.parametrize("name", ["resnet", "mobilenet-v2", "mlp-mixer", "transformer", "hf-bert", "hf-resnet"])
def test_where_it_cuts_nothing_passes_by(name) -> None:
    """No gradient reaches the inputs of a network whose features at the cut are constant."""
    model, found = zoo_task(name)
    small = Prune(0.5)(model, found)
    cuts = find_cuts("test", model, small, found, 4)
    assert len(cuts) == len(set(cuts)) > 0
    for side, net in ((0, model), (1, small)):
        for cut in cuts:
            before = next(value for value in net.parameters() if value.ndim > 1)
            with replaced(net, {cut[side]: lambda output: output.detach()}):
                output = found.outputs(net, found.example())
            (slope,) = torch.autograd.grad(output.square().sum(), before, allow_unused=True)
            assert slope is None or not slope.any()
    trained = StableKD(HALF, blocks=3)(model, found, budget=1)
    assert found.outputs(trained, found.example()).isfinite().all()


def test_conformance() -> None:
    check_transform(lambda: StableKD(HALF))


def test_pairs_survive_json() -> None:
    assert StableKD("a:b", at=[["1", "0"], ["3", "2"]]) == StableKD("a:b", at=AT)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"student": "nowhere"}, "student must be an import path"),
        ({"student": HALF, "blocks": 1}, "blocks must be an integer of at least 2"),
        ({"student": HALF, "decomposed": 1.5}, "decomposed must be a finite number"),
        ({"student": HALF, "decomposed": 0.5, "recomposed": 0.4}, "recomposed must be at least decomposed, 0.5"),
        ({"student": HALF, "feature_weight": -1.0}, "feature_weight must be a finite number"),
        ({"student": HALF, "at": ("1", "2")}, "at must be pairs of module names"),
        ({"student": HALF, "at": ()}, "at must be pairs of module names"),
    ],
)
def test_settings_are_checked(settings, said) -> None:
    with pytest.raises(TransformError, match=said):
        StableKD(**settings)


def test_what_cannot_be_distilled() -> None:
    found = task()
    model = found.build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TransformError, match=r"student's outputs are \(2, 7\) for two items, the teacher's \(2, 3\)"):
        StableKD(f"{__name__}:unlike")(model, found)
    with pytest.raises(TransformError, match="the teacher has no module 'body'"):
        StableKD(f"{__name__}:student", at=(("body", "0"),))(model, found)
    single = task(model=nn.Linear(4, 3))
    with pytest.raises(TransformError, match="no module of teacher and student was found"):
        StableKD(f"{__name__}:student")(single.build(), single)
    images = small_tasks()[0]
    with pytest.raises(TransformError, match="They may differ in one dimension"):
        StableKD(HALF, at=(("0", "4"),))(images.build(), images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Repeated(nn.Module):
    """Two layers, of which one is called as often as is said, and one gives two tensors."""

    def __init__(self, times: int = 2) -> None:
        super().__init__()
        self.first, self.same, self.last = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)
        self.pair, self.times = Pair(), times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for _ in range(self.times):
            x = self.same(x)
        return self.last(self.pair(x)[0])


class Pair(nn.Module):
    """Gives two tensors."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.relu(), x


class Once(Repeated):
    """Each layer runs once."""

    def __init__(self) -> None:
        super().__init__(1)


class Never(Repeated):
    """A layer does not run."""

    def __init__(self) -> None:
        super().__init__(0)


@pytest.mark.parametrize(
    ("model", "pupil", "at", "said"),
    [
        (Repeated, "Once", "same", "the teacher's module 'same' runs 2 times in a pass"),
        (Once, "Repeated", "same", "the student's module 'same' runs 2 times in a pass"),
        (Never, "Once", "same", "the teacher's module 'same' runs 0 times in a pass"),
        (Once, "Once", "pair", "the teacher's module 'pair' gives a tuple"),
    ],
)
def test_cuts_are_where_one_tensor_passes_once(model, pupil, at, said) -> None:
    found = task(model=model)
    with pytest.raises(TransformError, match=said):
        StableKD(f"{__name__}:{pupil}", at=((at, at),))(found.build(seed=0), found, budget=0)


def test_what_is_changed_in_place_is_seen_as_it_was() -> None:
    """Rectifiers that work in place lead to the last bit where others do."""
    plain, after = (task(model=partial(wide, inplace)).build(seed=0) for inplace in (False, True))
    for decomposed in (0.0, 1.0):
        settings = {"at": (("0", "0"),), "decomposed": decomposed, "recomposed": 1.0}
        one = StableKD(f"{__name__}:narrow", **settings)(plain, task(), seed=2)
        two = StableKD(f"{__name__}:rectified", **settings)(after, task(), seed=2)
        assert all(map(torch.equal, one.parameters(), two.parameters()))


def wide(inplace: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace), nn.Linear(6, 3))


def narrow(inplace: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace), nn.Linear(5, 3))


def rectified() -> nn.Module:
    return narrow(inplace=True)
