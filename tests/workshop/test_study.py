"""The search: the log is the truth, nothing is proposed twice, kept points are preferred."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from subjects import point

from netwright.core.errors import CorruptRunError
from netwright.core.rundir import RunDirectory
from netwright.workshop.evaluation import Outcome, Request
from netwright.workshop.job import Sampler
from netwright.workshop.point import key
from netwright.workshop.space import Space
from netwright.workshop.study import EVALUATIONS, Entry, Proposal, Study
from netwright.workshop.target import parse_keep, parse_targets

SPACE = Space((("a", 64), ("b", 128)), {"activation": "uint8"})
BASE = replace(point(0.9), latency_ratio=None)


def study(
    run: RunDirectory,
    space: Space = SPACE,
    keep: str = "score>=-0.01",
    target: str = "latency<=0.4x",
    sampler: Sampler = "linas",
    seed: int = 0,
    longest: float = 1.25,
) -> Study:
    return Study(run, space, BASE, parse_targets([target]), parse_keep(keep), seed, sampler, longest=longest)


def open_run(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    return run.open() if path.exists() else run.create({})


def answer(found: Study, proposal: Proposal, val: float = 0.9, latency: float = 0.5) -> Entry:
    request = Request(proposal.number, proposal.steps, 1.0, 5, proposal.params)
    made = point(val, latency, 1.0, *proposal.steps)
    return found.tell(proposal, Outcome(request, made, None, 2.5, epochs=1.25), finished=10.0)


def fail(found: Study, proposal: Proposal) -> Entry:
    request = Request(proposal.number, proposal.steps, 1.0, 5, proposal.params)
    return found.tell(proposal, Outcome(request, None, "NonFiniteLossError: nan", 0.5), finished=11.0)


def ask(found: Study) -> Proposal:
    proposal = found.ask()
    assert proposal is not None
    return proposal


def search(found: Study, count: int, judge: Callable[[Proposal], tuple[float, float]]) -> list[Proposal]:
    proposals = []
    for _ in range(count):
        proposals.append(ask(found))
        answer(found, proposals[-1], *judge(proposals[-1]))
    return proposals


def trials(run: RunDirectory) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(run.path / "study.journal")))
    return optuna.load_study(study_name="netwright", storage=storage).trials


def test_a_line_is_on_disk_as_soon_as_it_is_told(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        found = study(run)
        first = ask(found)
        assert not (run.path / EVALUATIONS).exists()
        entry = answer(found, first, 0.88, 0.3)
        second = ask(found)
        failed = fail(found, second)
        lines = [json.loads(line) for line in (run.path / EVALUATIONS).read_text().splitlines()]
    assert [line["state"] for line in lines] == ["ok", "failed"]
    assert [line["trial"] for line in lines] == [0, 1]
    assert lines[0]["point"]["score"]["val"] == 0.88
    assert lines[0]["params"] == first.params
    assert (lines[0]["seed"], lines[0]["epochs"], lines[0]["seconds"], lines[0]["finished_s"]) == (5, 1.25, 2.5, 10.0)
    assert lines[1]["point"] is None
    assert lines[1]["error"] == "NonFiniteLossError: nan"
    assert found.entries == [entry, failed]
    assert found.failed == 1


def test_the_ladder_comes_first(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        found = study(run)
        ladder = [values for values in SPACE.ladder() if SPACE.steps(values)]
        assert [dict(ask(found).params) for _ in ladder] == ladder


@pytest.mark.parametrize("cheap", [True, False])
def test_later_rungs_take_the_form_that_was_cheaper(cheap: bool, tmp_path: Path) -> None:
    """Where both were tried on the same network; one that failed, or that stands alone, says nothing."""

    def judge(proposal: Proposal) -> tuple[float, float]:
        return 0.9, 2 ** (-proposal.params["thin"] / 4) * (1.0 if proposal.params["int8"] == cheap else 1.5)

    with open_run(tmp_path / "run") as run:
        found = study(run, Space((("a", 64), ("b", 256)), {"activation": "uint8"}))
        assert fail(found, ask(found)).point is None
        assert search(found, 9, judge)[-1].params["int8"] == cheap


@pytest.mark.parametrize("narrow_keeps", [True, False])
def test_a_form_that_loses_the_score_is_not_taken_on(narrow_keeps: bool, tmp_path: Path) -> None:
    """Half the size is no gain where the score goes; for a size two rungs in both forms are enough."""

    space, forms = Space((("a", 64), ("b", 256)), {"activation": "uint8"}, widths=(8, 4)), []
    with open_run(tmp_path / "run") as run:
        found = study(run, space, target="size<=0.1x")
        for _ in range(9):
            proposal = ask(found)
            narrow = proposal.params["bits"] == 4
            request = Request(proposal.number, proposal.steps, 1.0, 5, proposal.params)
            made = point(0.5 if narrow and not narrow_keeps else 0.9, 1.0, 0.5 if narrow else 1.0, *proposal.steps)
            found.tell(proposal, Outcome(request, made, None, 2.5, epochs=1.25), finished=10.0)
            forms += [proposal.params["bits"]] if proposal.params["int8"] else []
    assert forms[:4] == [8, 4, 8, 4]
    assert set(forms[4:]) == {4 if narrow_keeps else 8}


def test_nothing_is_proposed_twice_and_numbers_go_up(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        found = study(run)
        proposals = []
        for number in range(60):
            proposals.append(ask(found))
            if number % 3 == 2:  # three are under way at any time
                for proposal in proposals[-3:]:
                    _ = fail(found, proposal) if proposal.number % 5 == 0 else answer(found, proposal)
    assert [proposal.number for proposal in proposals] == list(range(60))
    assert len({key(proposal.steps) for proposal in proposals}) == 60
    assert all(proposal.steps for proposal in proposals)


def test_a_resumed_study_knows_what_was_and_goes_on(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        found = study(run)
        before = search(found, 7, lambda proposal: (0.85, 0.5))
        fail(found, ask(found))
        lost = ask(found)  # never answered: the run was killed
        entries = list(found.entries)
        log = (run.path / EVALUATIONS).read_bytes()
    with open_run(tmp_path / "run") as run:
        again = study(run)
        assert again.entries == entries
        assert again.failed == 1
        assert (run.path / EVALUATIONS).read_bytes() == log
        old = {key(proposal.steps) for proposal in before}
        fresh = [ask(again) for _ in range(20)]
        assert not old & {key(proposal.steps) for proposal in fresh}
        assert key(lost.steps) in {key(proposal.steps) for proposal in fresh}, "what was lost is proposed again"
        assert [proposal.number for proposal in fresh] == list(range(8, 28))


@pytest.mark.parametrize("damage", ["gone", "garbage", "torn"])
def test_a_lost_journal_is_made_anew_from_the_log(damage: str, tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        found = study(run)
        search(found, 5, lambda proposal: (0.8 + proposal.number / 50, 0.5 - proposal.number / 20))
        fail(found, ask(found))
        told = [trial for trial in trials(run) if trial.state.is_finished()]
        journal = run.path / "study.journal"
        if damage == "gone":
            journal.unlink()
        elif damage == "garbage":
            journal.write_bytes(b"\x00garbage\n" * 7)
        else:
            journal.write_bytes(journal.read_bytes()[:-25])
    with open_run(tmp_path / "run") as run:
        study(run)
        rebuilt = [trial for trial in trials(run) if trial.state.is_finished()]
    assert (
        [trial.state for trial in rebuilt]
        == [trial.state for trial in told]
        == [TrialState.COMPLETE] * 5 + [TrialState.FAIL]
    )
    for one, other in zip(rebuilt[:5], told[:5], strict=True):
        assert one.params == other.params
        assert one.values == other.values
        assert one.constraints == other.constraints
        assert one.constraints == {"score": pytest.approx(0.89 - one.values[0])}
    assert told[2].values == pytest.approx([0.84, 0.4]), "the score goes up, latency comes as a share"


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        found = study(run)
        search(found, 3, lambda proposal: (0.9, 0.5))
        log = run.path / EVALUATIONS
        whole = log.read_bytes()
    log.write_bytes(whole[:-40])
    with open_run(tmp_path / "run") as run:
        again = study(run)
        assert [entry.number for entry in again.entries] == [0, 1]
        answer(again, ask(again))
        assert log.read_bytes().splitlines()[:2] == whole.splitlines()[:2]
        assert len(run.lines(EVALUATIONS)) == 3


@pytest.mark.parametrize("damage", [b'{"trial": 1, "sta\n', b"\xff\xfe\n", b"\n"])
def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(damage: bytes, tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        search(study(run), 3, lambda proposal: (0.9, 0.5))
        log = run.path / EVALUATIONS
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + damage + lines[2])
    with open_run(tmp_path / "run") as run, pytest.raises(CorruptRunError, match=r"evaluations\.jsonl, line 2"):
        study(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line["point"].update(size_bytes="many"),
        lambda line: line["point"].update(macs=10**400),
        lambda line: line["point"].update(steps=[7]),
        lambda line: line["point"]["score"].update(val=None),
        lambda line: line["point"]["latency_ratio"].update(median=[]),
        lambda line: line.update(point=[]),
        lambda line: line.update(params=5),
        lambda line: line.update(seconds="long"),
        lambda line: line.update(params=dict.fromkeys(line["params"], "odd")),
    ],
)
def test_a_figure_that_was_edited_is_named(change: Callable[[dict], None], tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        found = study(run)
        answer(found, ask(found))
        log = run.path / EVALUATIONS
        line = json.loads(log.read_text())
        change(line)
        log.write_text(json.dumps(line) + "\n")
        with pytest.raises(CorruptRunError, match=r"evaluations\.jsonl"):
            study(run)


@pytest.mark.parametrize("line", ["{}", "[]", "7", '{"trial": 1, "point": {"steps": []}}', "null"])
def test_a_line_that_is_json_but_no_evaluation_is_named(line: str, tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        search(study(run), 2, lambda proposal: (0.9, 0.5))
        with (run.path / EVALUATIONS).open("a") as log:
            log.write(line + "\n")
        with pytest.raises(CorruptRunError, match=r"evaluations\.jsonl, line 3, is not an evaluation"):
            study(run)


def test_a_small_space_ends(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        found = study(run, Space((("a", 2),), None))
        first, second = ask(found), ask(found)
        assert {first.steps[0].settings["saliency"], second.steps[0].settings["saliency"]} == {"magnitude", "taylor"}
        assert first.steps[0].settings["ratios"] == {"a": 0.5}
        answer(found, first)
        assert found.ask() is None
        fail(found, second)
        assert found.ask() is None, "what failed is not tried again"
    with open_run(tmp_path / "run") as run:
        assert study(run, Space((("a", 2),), None)).ask() is None


def test_precision_alone_is_a_space_of_one(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        found = study(run, Space((), {"activation": "uint8"}))
        assert [step.method for step in ask(found).steps] == ["netwright.compress:Int8"]
        assert found.ask() is None


def test_more_targets_are_more_objectives_also_on_resume(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        search(study(run), 3, lambda proposal: (0.9, 0.5))
    with open_run(tmp_path / "run") as run:
        study(run, target="latency<=0.4x,size<=0.1x")
        assert [trial.values for trial in trials(run)[:3]] == [pytest.approx([0.9, 0.5, 1.0])] * 3


def by_thinness(proposal: Proposal) -> tuple[float, float]:
    """The smaller, the faster and the worse: below a quarter the score falls under the floor."""
    keep = 2 ** (-proposal.params["thin"] / 4)
    return (0.9 if keep >= 0.25 else 0.9 - (0.25 - keep)), keep


def by_group(proposal: Proposal) -> tuple[float, float]:
    """With less than a quarter of "a" the score falls under the floor; "b" costs more and gives little."""
    a, b = (2 ** (proposal.params[f"offset/{name}"] - proposal.params["thin"] / 4) for name in "ab")
    return 0.9 - max(0.0, 0.25 - a) - 0.0001 / b, a + 3 * b


@pytest.mark.parametrize(("sampler", "judge", "count"), [("linas", by_group, 40), ("nsga2", by_thinness, 60)])
def test_kept_points_are_preferred_once_the_floor_counts(
    sampler: Sampler, judge: Callable[[Proposal], tuple[float, float]], count: int, tmp_path: Path
) -> None:
    def share_kept(name: str, keep: str) -> float:
        late = []
        for seed in range(3):
            with open_run(tmp_path / f"{name}-{seed}") as run:
                late += search(study(run, keep=keep, sampler=sampler, seed=seed), count, judge)[count // 2 :]
        return sum(judge(proposal)[0] >= 0.89 for proposal in late) / len(late)

    with_floor, without = share_kept("floor", "score>=-0.001"), share_kept("free", "score>=-0.9")
    assert with_floor > without + 0.15
    assert with_floor > 0.6


def test_the_floor_is_lowered_by_what_a_full_recovery_may_give_back(tmp_path: Path) -> None:
    """The constraint is the floor for one that was trained in full, and 1.5 times the accepted loss lower for none."""
    for number, (longest, lowered) in enumerate([(1.25, 0.0), (2.5, 0.0075), (1e9, 0.015)]):
        with open_run(tmp_path / str(number)) as run:
            found = study(run, longest=longest)
            entry = answer(found, ask(found), 0.87)
            assert found.trained(entry) == pytest.approx(1.25 / longest)
            violation = 0.9 - 0.01 - 0.87 - lowered
            assert list(trials(run)[0].constraints.values()) == [pytest.approx(violation, abs=1e-9)]


def test_a_search_in_which_everything_fails_is_hopeless(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        found = study(run)
        for number in range(8):
            assert not found.hopeless(workers=2), number
            fail(found, ask(found))
        assert found.hopeless(workers=2)
        assert not found.hopeless(workers=5), "each worker may have begun two"
        assert found.cause() == "NonFiniteLossError: nan"
        answer(found, ask(found))
        assert not found.hopeless(workers=2)
        assert study(run).cause() == found.cause(), "a resumed run knows it too"


def test_what_recoveries_give_back_moves_the_floor_of_all_that_was_evaluated(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        found = study(run, longest=5.0)  # the candidates have had a quarter of it
        for val in (0.9, 0.86):
            answer(found, ask(found), val=val)
        flying, failing = ask(found), ask(found)
        before = [trial.constraints["score"] for trial in found._study.get_trials(states=[TrialState.COMPLETE])]
        assert before == pytest.approx([-0.01 - 0.5 * 0.0225, 0.03 - 0.5 * 0.0225])
        found.learn([0.06])
        answer(found, flying, val=0.85)
        fail(found, failing)
        room = (0.0225 + 2 * 0.06) / 2
        after = [trial.constraints["score"] for trial in found._study.get_trials(states=[TrialState.COMPLETE])]
        assert after == pytest.approx([-0.01 - 0.5 * room, 0.03 - 0.5 * room, 0.04 - 0.5 * room])
        assert len(found.entries) == 4
        assert found.failed == 1
        assert len(found._study.trials) == 4, "what was under way is told to the new study"
        assert key(ask(found).steps) not in {key(flying.steps), key(failing.steps)}
