"""Sub-networks of a task, from training to files, and the command line."""

import dataclasses
import json

import numpy as np
import onnxruntime
import pytest
import torch
from optuna.distributions import IntDistribution
from optuna.samplers import RandomSampler
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

from netwright.cli.app import app
from netwright.cli.search import search_command
from netwright.core.data import Data
from netwright.core.errors import DataError, NetwrightError, RunDirectoryError, RunLockedError, SettingError
from netwright.core.evaluate import evaluate
from netwright.core.recipe import Recipe
from netwright.core.rundir import RunDirectory
from netwright.core.task import Task
from netwright.search import SearchSpace, explore

OWN = """
import torch
from optuna.distributions import IntDistribution
from torch import nn
from torch.utils.data import TensorDataset
from netwright.core.data import Data
from netwright.core.task import Task
from netwright.search import SearchSpace

def split(seed):
    return TensorDataset(torch.randn(24, 4, generator=torch.Generator().manual_seed(seed)), torch.arange(24) % 3)

def task():
    def score(output, target):
        return float((output.argmax(1) == target).float().mean())
    return Task("own", nn.Linear(4, 3), Data(split(0), split(1), split(2)), nn.functional.cross_entropy, score)

class Stack:
    space = SearchSpace({"depth": IntDistribution(1, 3)})
    def __init__(self, task):
        self.layers = [nn.Linear(4, 4) for _ in range(3)]
    def extract(self, params):
        return nn.Sequential(*self.layers[:params["depth"]], nn.Linear(4, 3))

nothing = 3
"""


def task():
    torch.manual_seed(0)

    def split():
        inputs = torch.randn(200, 6)
        return TensorDataset(inputs, inputs[:, :3].argmax(1))

    def score(output, target):
        return float((output.argmax(1) == target).float().mean())

    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    return Task(
        "toy",
        lambda: model,
        Data(split(), split(), split()),
        nn.functional.cross_entropy,
        score,
        recipe=Recipe(epochs=6, batch_size=32, optimizer_settings={"lr": 1e-2}, schedule_settings={"max_lr": 1e-2}),
    )


def compare_files(found):
    """Every file of the front computes what its candidate does."""
    inputs = torch.randn(5, 6)
    for entry in found.result.front:
        session = onnxruntime.InferenceSession(found.front[entry.number])
        [output] = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        assert np.allclose(output, found.net.extract(entry.params)(inputs).detach().numpy(), atol=1e-4)
    assert len(set(found.front.values())) == len(found.result.front)


def test_from_training_to_files_and_on(tmp_path):
    told = []
    goals = ("score", "macs")
    out = tmp_path / "run"
    found = explore(task(), objectives=goals, evaluations=6, out=out, progress=lambda *word: told.append(word))
    assert len(found.result.evaluations) == 6
    assert [fraction for fraction, _ in told] == sorted(fraction for fraction, _ in told)
    assert told[-1][0] == 1.0
    compare_files(found)
    for entry in found.result.front:
        assert entry.metrics["macs"] == sum(
            layer.weight.numel() for layer in found.net.extract(entry.params) if isinstance(layer, nn.Linear)
        )
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        explore(task(), objectives=goals, evaluations=8, out=out)
    lines = (out / "search" / "evaluations.jsonl").read_text()
    more = explore(task(), objectives=goals, evaluations=8, out=out, resume=True)
    assert (out / "search" / "evaluations.jsonl").read_text().startswith(lines), (
        "what was measured is not measured again"
    )
    assert len(more.result.evaluations) == 8
    assert {path.name for path in (out / "front").iterdir()} == {path.name for path in more.front.values()}
    for old, new in zip(found.net.model.parameters(), more.net.model.parameters(), strict=True):
        assert torch.equal(old, new), "the super-network is not trained again"


def test_a_folder_has_one_owner_and_one_task(tmp_path):
    goals, out = ("score", "macs"), tmp_path / "run"
    refused = []

    def intrude(fraction, what):
        if not refused:
            with pytest.raises(RunLockedError, match="another running process"):
                explore(task(), objectives=goals, evaluations=3, out=out, resume=True)
            refused.append(what)

    explore(task(), objectives=goals, evaluations=3, epochs=1, out=out, progress=intrude)
    assert refused == ["tracing"], "the folder is owned from before the training"
    other = dataclasses.replace(task(), name="another")
    for _ in range(2):  # a refusal lets go of the folder
        with pytest.raises(RunDirectoryError, match="task='toy', not 'another'"):
            explore(other, objectives=goals, evaluations=4, out=out, resume=True)
    assert len(explore(task(), objectives=goals, evaluations=4, out=out, resume=True).result.evaluations) == 4


class Stack:
    """A super-network of a user's own: the number of layers."""

    space = SearchSpace({"depth": IntDistribution(1, 5)})

    def __init__(self):
        torch.manual_seed(0)
        self.layers, self.head = [nn.Linear(6, 6) for _ in range(5)], nn.Linear(6, 3)

    def extract(self, params):
        return nn.Sequential(*self.layers[: params["depth"]], self.head)


def test_after_a_resumption_every_file_is_its_candidates(tmp_path):
    """A sampler that repeats itself uses up numbers of Optuna's, so that later ones begin before the last one."""
    net, out = Stack(), tmp_path / "run"
    for evaluations, seed in ((3, 6), (5, 2)):
        found = explore(
            task(),
            net,
            objectives=("score", "macs"),
            evaluations=evaluations,
            sampler=RandomSampler(seed=seed),
            out=out,
            resume=out.exists(),
        )
        compare_files(found)
    assert len({entry.number for entry in found.result.evaluations}) == 5


def test_a_super_network_is_resumed_with_its_own_seed(tmp_path):
    goals, out = ("score", "macs"), tmp_path / "run"
    explore(task(), objectives=goals, evaluations=1, epochs=1, out=out, seed=3)
    with pytest.raises(RunDirectoryError, match="seed=3, not 4"):
        explore(task(), objectives=goals, evaluations=3, out=out, resume=True, seed=4)
    mark = out / "run.json"
    stored = json.loads(mark.read_text())
    mark.write_text(json.dumps({name: value for name, value in stored.items() if name != "seed"}))
    assert stored["seed"] == 3
    found = explore(task(), objectives=goals, evaluations=2, out=out, resume=True, seed=3)  # of an older version
    assert len(found.result.evaluations) == 2
    other = tmp_path / "other"
    explore(task(), found.net, objectives=goals, evaluations=1, out=other, seed=3)
    more = explore(task(), found.net, objectives=goals, evaluations=2, out=other, resume=True, seed=4)
    assert len(more.result.evaluations) == 2, "a super-network that is given is the same with any seed"


def test_nothing_is_resumed_without_a_folder():
    with pytest.raises(SettingError, match="resume needs a search to go on with"):
        explore(task(), resume=True)


def test_a_hard_constraint_holds_on_the_front():
    found = explore(task(), objectives=("score", "parameters"), constraints=["macs<=120"], evaluations=12, epochs=1)
    assert found.result.front
    assert all(entry.metrics["macs"] <= 120 for entry in found.result.front)
    assert found.front == {}


def test_what_is_not_measured_is_named():
    with pytest.raises(SettingError, match=r"'speed' is not measured\. Known are score"):
        explore(task(), objectives=("speed",))
    with pytest.raises(SettingError, match="No objective is named"):
        explore(task(), objectives=())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"constraints": ["speed<=3"]}, "Constraint speed<=3 speaks of 'speed'"),
        ({"constraints": ["macs<=1", "macs>=2"]}, "contradict each other"),
        ({"constraints": ["macs"]}, "is not of the form"),
        ({"budget_s": -1.0}, "budget_s must be positive"),
        ({"evaluations": 0}, "evaluations must be at least 1"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(settings, message, tmp_path):
    with pytest.raises(SettingError, match=message):
        explore(task(), out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def call(*arguments):
    assert search_command
    return CliRunner().invoke(app, ["search", *map(str, arguments)])


def test_the_command_searches_a_super_network_of_ones_own(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    out = tmp_path / "run"
    done = call(
        f"{file}:task",
        "--space",
        f"{file}:Stack",
        "--objective",
        "score",
        "--objective",
        "macs",
        "--out",
        out,
        "--json",
    )
    assert done.exit_code == 0, done.output
    front = json.loads(done.stdout)
    assert min(entry["metrics"]["macs"] for entry in front) == 4 * 4 + 4 * 3
    assert all((tmp_path / "run" / "front").joinpath(entry["onnx"].rpartition("/")[2]).is_file() for entry in front)
    page = (out / "report.html").read_text()
    assert "sub-networks on the front of score and macs" in page
    assert "Every candidate of the space was measured" in page


def test_the_command_prints_the_space(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    done = call(f"{file}:task", "--space", f"{file}:Stack", "--dry-run")
    assert done.output.splitlines()[0] == "3 candidates."
    assert "depth" in done.output
    wrong = call(f"{file}:task", "--space", f"{file}:nothing")
    assert isinstance(wrong.exception, SettingError)
    assert "is no super-network" in str(wrong.exception)


def test_the_command_says_that_nothing_meets_a_constraint(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    done = call(f"{file}:task", "--space", f"{file}:Stack", "--constraint", "macs<=5", "--out", tmp_path / "run")
    assert isinstance(done.exception, NetwrightError)
    assert "None of 3 measured candidates meets macs<=5; the nearest misses by 23" in str(done.exception)


def test_a_super_network_is_cut_and_measured_in_other_processes(tmp_path):
    found = explore(task(), objectives=("score", "macs"), evaluations=3, epochs=0.5, workers=2, out=tmp_path / "run")
    assert [entry.error for entry in found.result.evaluations] == [None] * 3
    for entry in found.result.evaluations:  # the same network as when it is cut here
        small = found.net.extract(entry.params)
        assert entry.metrics["parameters"] == sum(value.numel() for value in small.parameters())
        assert entry.metrics["score"] == pytest.approx(evaluate(small, task(), "val"))


def test_splits_that_share_items_are_refused_before_anything_is_written(tmp_path):
    whole = task()
    inputs, targets = whole.data.train.tensors
    leaky = TensorDataset(inputs.flip(0), targets.flip(0))
    with pytest.raises(DataError, match="overlap"):
        explore(
            dataclasses.replace(whole, data=Data(whole.data.train, leaky, whole.data.test)),
            objectives=("score", "macs"),
            evaluations=1,
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_command_is_not_gone_on_with(tmp_path):
    settings = {"kind": "training", "task": "toy", "trained_here": True, "seed": 0}
    RunDirectory(tmp_path / "run").create(settings).close()
    left = tmp_path / "run" / "log.jsonl"
    left.write_text('{"torn')
    with pytest.raises(RunDirectoryError, match="training"):
        explore(task(), evaluations=1, out=tmp_path / "run", resume=True)
    assert left.read_text() == '{"torn'


def test_what_was_measured_otherwise_is_not_mixed(tmp_path):
    goals, out = ("score", "macs"), tmp_path / "run"
    explore(task(), Stack(), objectives=goals, evaluations=1, out=out)
    for change, words in (
        ({"threads": 2}, "threads=1, not 2"),
        ({"batch": 8}, "batch=1, not 8"),
        ({"workers": 2}, "measured_alone=True, not False"),
        ({"engine": "ray"}, "engine='local', not 'ray'"),
    ):
        with pytest.raises(RunDirectoryError, match=words):
            explore(task(), Stack(), objectives=goals, evaluations=2, out=out, resume=True, **change)
    mark = out / "run.json"
    stored = json.loads(mark.read_text())
    mark.write_text(json.dumps({name: stored[name] for name in ("kind", "task", "trained_here")}))  # an older version's
    more = explore(task(), Stack(), objectives=goals, evaluations=2, out=out, resume=True, threads=2, batch=8)
    assert len(more.result.evaluations) == 2
